"""The rows as a table for people, as Markdown, and as JSON."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from tests.bench.measure import PERCENTILES_FROM, Row

HEADINGS = ("what", "median", "spread (n)", "beside", "its median", "ratio", "Go DRSM")
SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def rich_table(rows: Sequence[Row]) -> Table:
    table = Table(*HEADINGS, caption=f"spread: p10..p90, below {PERCENTILES_FROM} samples min..max")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All samples, for a program."""
    return [
        {
            "what": row.what,
            "unit": row.unit,
            "samples": list(row.samples),
            "against": row.against,
            "raw": list(row.raw),
        }
        for row in rows
    ]


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.spread
    return (
        row.what,
        shown(row.median, row.unit),
        f"{shown(low, row.unit)} .. {shown(high, row.unit)} ({len(row.samples)})",
        row.against,
        shown(median(row.raw), row.unit) if row.raw else "",
        f"{row.ratio:.1f}" if row.ratio else "",
        row.go,
    )


def shown(value: float, unit: str) -> str:
    """A value with three digits; seconds in the unit that suits them."""
    if unit != "s":
        return f"{value:.{0 if value >= 100 else 1}f} {unit}".rstrip()
    factor, name = next((scale for scale in SCALES if value >= scale[0]), SCALES[-1])
    value /= factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"
