"""A demux: follows the table of one pool, prints what happens to it, and how fresh it is.

Settings are environment variables, see README.md. A load balancer would call `demux.owner(id)` for each
message; no call of a demux waits, and none of them can allocate.
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from contextlib import suppress

from drsm_sdk import AgentUnavailable, Demux, DrsmError
from drsm_sdk.wire import messages as event

NATS_URL = os.environ.get("DRSM_NATS_URL", "nats://127.0.0.1:4222")
PREFIX = os.environ.get("DRSM_SUBJECT_PREFIX", "drsm")
POOL = os.environ.get("POOL", "amfid")
REPORT_SECONDS = float(os.environ.get("REPORT_SECONDS", "3"))
RETRY_SECONDS = 1.0


async def follow() -> None:
    while True:
        try:
            async with Demux.connect(NATS_URL, POOL, prefix=PREFIX) as demux:
                reporting = asyncio.create_task(report(demux))
                try:
                    async for news in demux.events():
                        print(line(news))
                finally:
                    reporting.cancel()
        except AgentUnavailable as error:  # not there yet: containers start in any order
            print(f"waiting: {error}")
        await asyncio.sleep(RETRY_SECONDS)


async def report(demux: Demux) -> None:
    """Lost connections and new leaders heal by themselves; whether they have can be seen here."""
    while True:
        chunks = Counter(owner.key for owner in demux.chunks().values())
        pods = [f"{pod.name} {pod.state} with {chunks[pod.key]} chunks" for pod in demux.pods()]
        fresh = "synced" if demux.synced else "not synced"
        print(f"{fresh}, {demux.staleness:.1f} s old: {', '.join(pods) or 'no pods'}")
        await asyncio.sleep(REPORT_SECONDS)


def line(news: object) -> str:
    match news:
        case event.PodUp(pod):
            return f"{pod.name} is up at {pod.ip}, incarnation {pod.incarnation}"
        case event.PodDown(pod, reason):
            return f"{pod.name} is down ({reason}), incarnation {pod.incarnation}"
        case event.ChunkAllocated(owner, chunks):
            return f"{owner.name} owns chunks {list(chunks)}"
        case event.ChunkClaimed(owner, previous, chunks):
            return f"{owner.name} owns chunks {list(chunks)}, claimed from {previous.name}"
        case event.ChunkScanned(owner, chunks):
            return f"{owner.name} scanned chunks {list(chunks)}"
        case event.ChunkReleased(previous, chunks):
            return f"{previous.name} gave back chunks {list(chunks)}"
    return str(news)


async def main() -> None:
    following = asyncio.create_task(follow())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, following.cancel)
    with suppress(asyncio.CancelledError):
        await following


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DrsmError as error:
        sys.exit(f"demux: {error}")
