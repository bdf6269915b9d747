"""A random fault every 20 s: `python -m tests.fault.soak --minutes 15 --seed 1`. 1 if any was felt."""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.fault.faults import FAULTS
from tests.fault.world import World, world

EVERY_SECONDS = 20.0


async def soak(w: World, turns: Iterable[object], *, every: float, seed: int) -> list[str]:
    """Break `w` at random at each turn; what was wrong. The same seed, the same faults."""
    chance, wrong = random.Random(seed), []
    for _ in turns:
        began = time.monotonic()
        name = chance.choice(list(FAULTS))
        try:
            row = await w.strike(name, FAULTS[name])
            said = f"{name}: outage {row.outage:.1f} s, healed after {row.demuxes_after_end:.1f} s"
            sys.stderr.write(f"{time.strftime('%T')} {said}, {row.rss_mib} MiB, {row.issued} ids\n")
        except (AssertionError, TimeoutError) as error:
            wrong.append(f"{name}: {error}")
            sys.stderr.write(f"{time.strftime('%T')} {name} FAILED\n{error}\n")
        await asyncio.sleep(max(began + every - time.monotonic(), 0.0))
    return wrong


def lasting(seconds: float) -> Iterator[None]:
    """Turns until so many seconds have passed."""
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        yield


async def _run(arguments: argparse.Namespace) -> int:
    async with world() as w:
        turns = lasting(arguments.minutes * 60)
        wrong = await soak(w, turns, every=EVERY_SECONDS, seed=arguments.seed)
        sys.stdout.write(f"{w.table_of_faults()}\n{w.record.issued} ids, {len(wrong)} faults were felt\n")
        if arguments.json:
            w.report(arguments.json)
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args(argv)
    logging.getLogger("drsm_sdk").setLevel(logging.CRITICAL)
    sys.stderr.write(f"seed {arguments.seed}\n")
    return asyncio.run(_run(arguments))


if __name__ == "__main__":
    sys.exit(main())
