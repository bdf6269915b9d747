"""An AMF's pod: a registration gets an NGAP id and a TMSI of one chunk, so that one claim moves both.

Its contexts are in a MongoDB collection that all pods of the AMF share. Settings are environment variables,
see README.md.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from drsm_sdk import AgentUnavailable, Drsm, DrsmError, Pod, Pool, PoolEmpty, PoolExhausted, SessionLost

NATS_URL = os.environ.get("DRSM_NATS_URL", "nats://127.0.0.1:4222")
PREFIX = os.environ.get("DRSM_SUBJECT_PREFIX", "drsm")
POOL = os.environ.get("POOL", "amf")
CONTEXTS_URL = os.environ.get("CONTEXTS_URL", "mongodb://127.0.0.1:27017/?replicaSet=rs0")
CONTEXTS_DATABASE = os.environ.get("CONTEXTS_DATABASE", "amf_contexts")
SESSIONS_PER_SECOND = float(os.environ.get("SESSIONS_PER_SECOND", "5"))
SESSIONS_MAX = int(os.environ.get("SESSIONS_MAX", "50"))
RETRY_SECONDS = 1.0
SPACES = ("ngapid", "tmsi")

Context = dict[str, Any]


class Contexts:
    """One document per registered UE: `{ngapid, tmsi, pod}`.

    The scan of a dead pod's chunk asks it, so a context must be in here within the pool's usage lag `W`.
    """

    def __init__(self, client: AsyncMongoClient[Context]) -> None:
        self._ues = client[CONTEXTS_DATABASE]["ues"]

    async def prepare(self) -> None:
        """One index for each space; a second use of an id would be refused."""
        for space in SPACES:
            await self._ues.create_index(space, unique=True)

    async def add(self, ids: Context, pod: str) -> None:
        await self._ues.insert_one({**ids, "pod": pod})

    async def remove(self, ids: Context) -> None:
        await self._ues.delete_one({"ngapid": ids["ngapid"]})

    async def all(self) -> list[Context]:
        """Of all pods, oldest first."""
        return [{space: ue[space] for space in SPACES} async for ue in self._ues.find().sort("_id")]

    async def in_use(self, first: int, last: int, space: str) -> AsyncIterator[int]:
        """Which ids are in use: one range query, on the index of the space that is asked about."""
        async for ue in self._ues.find({space: {"$gte": first, "$lte": last}}, {space: True}):
            yield ue[space]


async def work(pool: Pool, contexts: Contexts, pod: str) -> None:
    """UEs come, and the oldest ones go."""
    while True:
        try:
            ids = await pool.allocate_set(*SPACES, timeout=1.0)
            try:
                await contexts.add(ids, pod)
            except PyMongoError as error:  # it may be there all the same
                print(f"not kept: {error}")
                await forget(pool, contexts, ids)
            else:
                print(f"session {' '.join(map(str, ids.values()))}")
        except (PoolEmpty, PoolExhausted, AgentUnavailable, SessionLost) as error:
            print(f"no ids: {error}")  # the SDK works on it
            await asyncio.sleep(RETRY_SECONDS)
        for ids in await too_many(pool, contexts):
            await forget(pool, contexts, ids)
        await asyncio.sleep(1 / SESSIONS_PER_SECOND)


async def too_many(pool: Pool, contexts: Contexts) -> list[Context]:
    """The oldest of ours: those whose ids are ours, also a dead pod's once its chunk is claimed for us."""
    try:
        known = await contexts.all()
    except PyMongoError as error:
        print(f"not read: {error}")  # no reason to leave: what was issued goes on
        return []
    return [ids for ids in known if pool.valid(ids["ngapid"], space="ngapid")][:-SESSIONS_MAX]


async def forget(pool: Pool, contexts: Contexts, ids: Context) -> None:
    """Give ids back once their context is certainly gone."""
    while True:
        try:
            await contexts.remove(ids)
            break
        except PyMongoError:
            await asyncio.sleep(RETRY_SECONDS)
    for space, id_ in ids.items():
        with suppress(DrsmError):  # lost in this very moment
            pool.release(id_, space=space)


async def tell(pool: Pool) -> None:
    async for news in pool.changes():
        print(news)


async def serve() -> None:
    async with AsyncMongoClient[Context](CONTEXTS_URL) as client:
        contexts = Contexts(client)
        while True:
            try:
                await contexts.prepare()
                async with Drsm.connect(NATS_URL, Pod.from_env(), prefix=PREFIX) as drsm:
                    pool = await drsm.join(POOL, in_use=contexts.in_use)
                    print(f"joined {POOL} as {drsm.pod.name}")
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(tell(pool))
                        tasks.create_task(work(pool, contexts, drsm.pod.name))
            except (AgentUnavailable, PyMongoError) as error:  # not there yet
                print(f"waiting: {error}")
            await asyncio.sleep(RETRY_SECONDS)


async def main() -> None:
    serving = asyncio.create_task(serve())
    for number in (signal.SIGTERM, signal.SIGINT):  # to cancel is to leave `async with`, which says goodbye
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving
    print("left")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DrsmError as error:
        sys.exit(f"amf: {error}")
