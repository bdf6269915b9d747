"""The bare substrate: a collection written with majority and journal, and a change stream on it."""

import asyncio
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any, Self

from pymongo import AsyncMongoClient, UpdateOne

Document = dict[str, Any]


class RawMongo:
    """MongoDB with nothing between; `async with RawMongo(url, database) as raw:`."""

    def __init__(self, url: str, database: str) -> None:
        self._client = AsyncMongoClient[Document](url, w="majority", journal=True)
        self._collection = self._client[database]["raw"]
        self._next = 0
        self._awaited: set[int] = set()
        self._all_seen = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._stream = await self._collection.watch()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading
        await self._stream.close()
        await self._client.close()

    async def insert_and_see(self) -> None:
        """One insert, until its change event is here."""
        (id_,) = self._new_ids(1)
        await self._seen([id_], self._collection.insert_one(_document(id_)))

    async def insert_at_once(self, count: int) -> None:
        """So many inserts, each a request of its own, all at once."""
        await asyncio.gather(*[self._collection.insert_one(_document(id_)) for id_ in self._new_ids(count)])

    async def insert_many(self, count: int) -> list[int]:
        """So many inserts as one bulk."""
        ids = self._new_ids(count)
        await self._collection.insert_many([_document(id_) for id_ in ids])
        return ids

    async def update_and_see(self, ids: Iterable[int]) -> None:
        """Guarded updates of one bulk, until all their change events are here."""
        updates = [UpdateOne({"_id": id_, "pod": "a"}, {"$set": {"pod": "b"}}) for id_ in ids]
        await self._seen(ids, self._collection.bulk_write(updates, ordered=False))

    async def _seen(self, ids: Iterable[int], write: Awaitable[object]) -> None:
        self._awaited = set(ids)
        self._all_seen.clear()
        await write
        await self._all_seen.wait()

    def _new_ids(self, count: int) -> list[int]:
        ids = list(range(self._next, self._next + count))
        self._next += count
        return ids

    async def _read(self) -> None:
        async for change in self._stream:
            self._awaited.discard(change["documentKey"]["_id"])
            if not self._awaited:
                self._all_seen.set()


def _document(id_: int) -> Document:
    """About as large as a chunk's."""
    return {"_id": id_, "type": "chunk", "pod": "a", "ip": "10.0.0.1", "grant": f"{id_:016x}"}
