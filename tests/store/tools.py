"""What the store tests share: a few records, and ways to read a change stream up to a known point."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase

from drsm_agent.core.documents import OPENED, Chunk, Document, Drsm, Owner, Session
from drsm_agent.core.table import STAMPS, Change
from drsm_agent.core.writes import Insert, Outcome, Update, Write, touch_stamp
from drsm_agent.ports import Batch
from drsm_agent.store.memory import MemoryStore
from drsm_agent.store.mongo import MongoStore

POOLS = ("amfid", "smfid")
TERM = 7
INCARNATION = TERM << 32 | 12345
POD = Owner("amf-1", "10.0.0.1", "instance-1", INCARNATION)
OTHER = Owner("amf-2", "10.0.0.2", "instance-2", INCARNATION + 1)
GRANT = "00112233445566aa"
PATIENCE_SECONDS = 30.0

AnyStore = MemoryStore | MongoStore


def session(state: str = OPENED, term: int = TERM, owner: Owner = POD) -> Session:
    return Session(
        pod=owner.name,
        ip=owner.ip,
        instance=owner.instance,
        incarnation=owner.incarnation,
        term=term,
        state=state,
        pools=(),
        request_id="request-1",
        promised_ms=300_000,
    )


def chunk(n: int = 3, owner: Owner = POD, *, marked: bool = False) -> Chunk:
    drsm = Drsm(
        owner.name, owner.ip, owner.instance, owner.incarnation, grant=GRANT, marked=marked, request_id="r"
    )
    return Chunk(n=n, pod=owner.name, ip=owner.ip, instance=owner.instance, drsm=drsm)


def go_chunk(n: int = 3, pod: str = "go-1") -> Chunk:
    return Chunk(n=n, pod=pod, ip="10.0.9.9", instance="")


def foreign(chunk: Chunk, **changes: Any) -> Chunk:
    """The chunk as it was seen, had its `drsm` said something else."""
    assert chunk.drsm
    return replace(chunk, drsm=replace(chunk.drsm, **changes))


async def put(store: AnyStore, space: str, *documents: Document) -> None:
    await store.write([Insert(space, document) for document in documents])


async def only(store: AnyStore, write: Write) -> int:
    """How many documents the write changed."""
    outcome: Outcome = await store.write([write])
    return outcome.changed


async def found(store: AnyStore, space: str, key: str) -> Document | None:
    return {str(document["_id"]): document for document in await store.read(space)}.get(key)


async def until_stamp(batches: AsyncIterator[Batch], n: int) -> list[Change]:
    """All changes up to the n-th touch of the stamp."""
    changes: list[Change] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for batch in batches:
            changes += batch.changes
            if any(change.space == STAMPS and _count(change) == n for change in batch.changes):
                return changes
    raise AssertionError("The change stream ended without an error")


def _count(change: Change) -> Any:
    return (change.document or change.updated or {}).get("n")


async def stamp(store: AnyStore) -> None:
    """Write the stamp's document, so that it can be touched."""
    await put(store, STAMPS, {"_id": "stamp", "term": 0, "n": 0})


async def changes_of(store: AnyStore, writes: Iterable[Write]) -> list[Change]:
    """What the change stream tells of the writes, made one after another."""
    await stamp(store)
    at = (await store.snapshot()).at
    for write in writes:
        await store.write([write])
    await store.write([touch_stamp(TERM, "agent")])
    async with aclosing(store.changes(after=at)) as batches:
        return (await until_stamp(batches, 1))[:-1]


async def eventually(probe: Callable[[], Awaitable[object]]) -> None:
    """Ask until the answer is true, where there is nothing to wait on."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if await probe():
                return
            await asyncio.sleep(0.005)


async def first(batches: AsyncIterator[Batch]) -> Batch:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await anext(batches)


def setting(space: str, key: str, **fields: Any) -> Update:
    """A write without a guard, as somebody else may make it."""
    return Update(space, {"_id": key}, set=fields)


@dataclass(frozen=True)
class Stand:
    """A MongoStore and, beside it, the driver's own client."""

    url: str
    name: str
    client: AsyncIOMotorClient[Document]
    store: MongoStore

    @property
    def database(self) -> AsyncIOMotorDatabase[Document]:
        return self.client[self.name]

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        name: str,
        pools: dict[str, str] | None = None,
        timeout: float = PATIENCE_SECONDS,
    ) -> AsyncIterator[Self]:
        client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(url)
        async with MongoStore(url, name, pools or dict.fromkeys(POOLS, name), timeout=timeout) as store:
            yield cls(url, name, client, store)
        client.close()


def stamped(touches: int) -> Document:
    """The stamp document after so many touches."""
    return {"_id": "stamp", "term": TERM, "n": touches, "agent": "agent", "number": 0}
