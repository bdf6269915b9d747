"""Samples, taken in turns with the bare substrate's, and what is told of them."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

PERCENTILES_FROM = 10
"""From so many samples on the spread is p10..p90, below it is the smallest and the largest."""

Measured = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    samples  seconds each, or what `unit` says
    raw      the same of the bare substrate, which `against` names
    go       what was measured for Go DRSM
    """

    what: str
    samples: Sequence[float]
    unit: str = "s"
    against: str = ""
    raw: Sequence[float] = ()
    go: str = ""

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        if len(self.samples) < PERCENTILES_FROM:
            return min(self.samples), max(self.samples)
        tenths = quantiles(self.samples, n=10)
        return tenths[0], tenths[-1]

    @property
    def ratio(self) -> float | None:
        return self.median / median(self.raw) if self.raw else None


async def in_turns(rounds: int, ours: Measured, raw: Measured) -> tuple[list[float], list[float]]:
    """`rounds` samples of each, one after the other, so that both meet the same machine. The first round
    only warms up."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        samples[0].append(await ours())
        samples[1].append(await raw())
    return samples[0][1:], samples[1][1:]


async def seconds(work: Awaitable[object]) -> float:
    """How long `work` takes."""
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun
