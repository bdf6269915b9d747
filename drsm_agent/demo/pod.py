"""A pod of the demonstration: `python -m drsm_agent.demo.pod`, an AMF that knows only ids.

It obeys lines on standard input (`allocate N`, `release N`, `stop`) and tells what happens to it as
JSON lines on standard output. It uses nothing but the SDK's public surface.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drsm_agent.demo.contexts import Contexts
from drsm_sdk import Drsm, Pod, Pool
from drsm_sdk.changes import Gained, Lost, Scanned, SessionLost, SessionRenewed

CONNECT_TIMEOUT = 20.0
ALLOCATE_TIMEOUT = 10.0
BLOCK_BITS = 10
"""What `DRSM_POOLS` has by default; only to show chunk numbers."""


def say(what: str, **fields: Any) -> None:
    """One JSON line for whoever started this pod."""
    print(json.dumps({"say": what} | fields), flush=True)


class DemoPod:
    """Allocates and releases as it is told, and keeps its contexts where the others can see them."""

    def __init__(self, name: str, pool: Pool, contexts: Contexts) -> None:
        self._name, self._pool, self._contexts = name, pool, contexts

    async def obey(self, line: str) -> bool:
        """Carry out one command. False when it was the last."""
        match line.split():
            case ["allocate", count]:
                await self._allocate(int(count))
            case ["release", count]:
                self._release(int(count))
            case _:
                return False
        return True

    async def _allocate(self, count: int) -> None:
        ids = [await self._pool.allocate(timeout=ALLOCATE_TIMEOUT) for _ in range(count)]
        await asyncio.to_thread(self._contexts.add, ids, self._name)
        chunks = sorted({id_ >> BLOCK_BITS for id_ in ids})
        say("allocated", count=len(ids), first=ids[0], last=ids[-1], chunks=chunks)

    def _release(self, count: int) -> None:
        ids = self._contexts.of(self._name)[:count]
        self._contexts.remove(ids)
        for id_ in ids:
            self._pool.release(id_)
        say("released", count=len(ids))

    async def tell_changes(self) -> None:
        async for change in self._pool.changes():
            match change:
                case Gained():
                    say("gained", chunks=len(change.chunks), marked=change.marked)
                case Scanned():
                    say("scanned", chunk=change.chunk, in_use=change.in_use, freed=change.freed)
                case Lost():
                    say("lost", chunks=len(change.chunks))
                case SessionLost():
                    say("session_lost", reason=change.reason)
                case SessionRenewed():
                    say("session_renewed", incarnation=change.incarnation)


async def run(arguments: argparse.Namespace) -> None:
    contexts = Contexts(arguments.contexts)
    pod = Pod(name=arguments.name, ip=arguments.ip, instance=arguments.instance)
    connecting = Drsm.connect(arguments.nats, pod, prefix=arguments.prefix, timeout=CONNECT_TIMEOUT)
    async with connecting as drsm:
        pool = await drsm.join(arguments.pool, in_use=contexts.in_use)
        say("joined", incarnation=drsm.incarnation)
        demo = DemoPod(arguments.name, pool, contexts)
        telling = asyncio.create_task(demo.tell_changes())
        while (line := await asyncio.to_thread(sys.stdin.readline)) and await demo.obey(line):
            pass
        telling.cancel()
    say("stopped")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nats", required=True, help="URL of the NATS server")
    parser.add_argument("--name", required=True)
    parser.add_argument("--ip", default="127.0.0.1")
    parser.add_argument("--instance", default="demo")
    parser.add_argument("--pool", default="amfid")
    parser.add_argument("--prefix", default="drsm")
    parser.add_argument("--contexts", type=Path, required=True, help="file shared by all pods")
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
