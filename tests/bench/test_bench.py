"""The benchmarks still run: nothing here looks at a time."""

import asyncio
from io import StringIO
from statistics import median

from rich.console import Console

from drsm_agent.embedded import Stack
from tests.bench import table
from tests.bench.__main__ import BENCHMARKS
from tests.bench.measure import Row, in_turns
from tests.bench.setting import TINY, Setting

ROWS = {"pair": 1, "lookup": 1, "acquire": 1, "renew": 1, "start": 5, "kill": 3, "idle": 3}


async def test_every_benchmark_produces_its_rows(stack: Stack) -> None:
    """Every row has samples, of the substrate as many as of ours, and can be shown. All benchmarks run at
    once here: what they measure then means nothing, but it takes seconds."""
    setting = Setting(stack, TINY)
    measured = await asyncio.gather(*[benchmark(setting) for benchmark in BENCHMARKS.values()])
    for name, rows in zip(BENCHMARKS, measured, strict=True):
        assert len(rows) == ROWS[name]
        for row in rows:
            assert row.samples
            assert len(row.raw) in {0, len(row.samples)}
            assert row.what in table.markdown(rows)


def test_the_table_shows_median_spread_and_ratio() -> None:
    """The numbers that people read."""
    row = Row(what="x", samples=[0.001, 0.002, 0.004], against="y", raw=[0.0005], go="z")
    printed = StringIO()
    Console(file=printed, width=200).print(table.rich_table([row]))
    for text in ("2.00 ms", "1.00 ms .. 4.00 ms (3)", "500 µs", "4.0", "z"):
        assert text in printed.getvalue()
        assert text in table.markdown([row])


def test_many_samples_are_spread_from_the_first_to_the_last_tenth() -> None:
    """Single outliers are the machine's."""
    low, high = Row(what="x", samples=[*range(1, 100), 10_000]).spread
    assert 5 < low < 15
    assert 85 < high < 95


async def test_samples_are_taken_in_turns_and_the_first_ones_dropped() -> None:
    """Both sides meet the same machine, warmed up."""
    order: list[str] = []

    async def ours() -> float:
        order.append("ours")
        return float(len(order))

    async def raw() -> float:
        order.append("raw")
        return float(len(order))

    samples, beside = await in_turns(2, ours, raw)
    assert order == ["ours", "raw"] * 3
    assert (median(samples), median(beside)) == (4.0, 5.0)
