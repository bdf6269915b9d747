"""A pod that owns exactly so many chunks until it is killed: `python -m tests.bench.victim`.

It speaks the protocol itself: the SDK asks for as many chunks as its rate of issuing calls for, and gives
the others back.
"""

import argparse
import asyncio

import nats

from drsm_sdk.wire.messages import ACQUIRE_COUNT_MAX
from drsm_sdk.wire.subjects import Subjects
from tests.bench.children import say, told
from tests.harness import Requester, renewing


async def own(asking: Requester, name: str, chunks: int) -> int:
    """Open a session and acquire; returns its incarnation."""
    incarnation = (await asking.open(name)).incarnation
    for first in range(0, chunks, ACQUIRE_COUNT_MAX):
        count = min(ACQUIRE_COUNT_MAX, chunks - first)
        await asking.acquire(name, incarnation, count, request_id=f"{name}-{first}")
        await asking.renew(name, incarnation)
    return incarnation


async def run(arguments: argparse.Namespace) -> None:
    say("ready")
    client = await nats.connect(arguments.nats)
    try:
        asking = Requester(client, Subjects(arguments.prefix))
        incarnation = await own(asking, arguments.name, arguments.chunks)
        async with renewing(asking, (arguments.name, incarnation)):
            say("owns")
            await told()
    finally:
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--chunks", type=int, required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
