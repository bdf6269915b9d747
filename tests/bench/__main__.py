"""`python -m tests.bench`: measure everything on servers of its own, and print one table."""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from rich.console import Console

from drsm_agent.embedded import Stack
from tests.bench import fleet, local, requests, table
from tests.bench.measure import Row
from tests.bench.setting import FULL, QUICK, Scale, Setting

BENCHMARKS: dict[str, Callable[[Setting], Awaitable[list[Row]]]] = {
    "pair": local.pair,
    "lookup": local.lookup,
    "acquire": requests.acquire,
    "renew": requests.renew,
    "start": fleet.start,
    "kill": fleet.kill,
    "idle": fleet.idle,
}

WIDE = 160
"""Columns of the table where no terminal says how many there are."""


async def measure(scale: Scale, names: Sequence[str], console: Console) -> list[Row]:
    rows: list[Row] = []
    async with Stack() as stack:
        for name in names:
            console.print(f"[dim]{name} ...[/]")
            rows += await BENCHMARKS[name](Setting(stack, scale))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: half a minute instead of minutes")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be given several times")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    arguments = parser.parse_args()
    rows = asyncio.run(
        measure(QUICK if arguments.quick else FULL, arguments.only or list(BENCHMARKS), Console(stderr=True))
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(table.plain(rows), indent=1))
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    if arguments.markdown:
        console.out(table.markdown(rows), highlight=False)
    else:
        console.print(table.rich_table(rows))


if __name__ == "__main__":
    main()
