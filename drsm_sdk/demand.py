"""How many ids a pod should have in stock, from how fast its stock shrinks. Pure.

What counts is ids issued less ids that became free again: a pod that issues and releases ten thousand
a second needs no more than one that does nothing.
"""

from dataclasses import dataclass
from math import ceil, exp

from drsm_sdk.wire.messages import ACQUIRE_COUNT_MAX

AHEAD = 60.0  # seconds that the stock should last
RISE, FALL = 10.0, 60.0  # seconds; a burst must not empty a small pool for everybody else
HYSTERESIS = 1.5


@dataclass(slots=True)
class Rate:
    """Ids per second: rises within about 10 s of a higher pace, falls within about a minute of a lower."""

    value: float = 0.0
    _at: float | None = None
    _total: int = 0

    def sample(self, now: float, total: int) -> None:
        """`total` ids were drawn from the stock up to `now` (seconds); it may fall."""
        if self._at is not None and now > self._at:
            pace = max(total - self._total, 0) / (now - self._at)
            weight = 1 - exp(-(now - self._at) / (RISE if pace > self.value else FALL))
            self.value += (pace - self.value) * weight
        self._at, self._total = now, total


def wanted(rate: float, slots: int) -> int:
    """Ids that should be free: enough for the next minute, at least one chunk."""
    return max(ceil(rate * AHEAD), slots)


def sparing(slots: int) -> int:
    """The same while the pool runs out: half a chunk, so that one which has not all its ids will do."""
    return max(slots // 2, 1)


def chunks_to_ask(free: int, wanted_ids: int, slots: int) -> int:
    """How many chunks to ask for; 0 when there is enough."""
    return min(max(ceil((wanted_ids - free) / slots), 0), ACQUIRE_COUNT_MAX)


def ids_to_keep(wanted_ids: int) -> int:
    """Free ids that stay when chunks go back; more than `wanted`, or they would be asked back at once."""
    return ceil(wanted_ids * HYSTERESIS)
