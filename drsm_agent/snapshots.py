"""A pool's table as the pages of a snapshot: all of one version, each small enough for one message.

Five hundred demuxes that were cut off together all ask within a second. So a snapshot is copied and encoded
once for all who ask while nothing changes, page by page so that others have their turn in between, and few
are on their way at a time: an answer to a renewal never waits behind megabytes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from drsm_agent.core.documents import Owner
from drsm_agent.core.events import Version
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import Refused
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition

PAGE_SHARE_OF_PAYLOAD = 0.5
"""Half of what the server takes: the estimate below leaves out map keys and headers."""
JSON_SHARE_OF_PAYLOAD = 0.1
"""JSON spells a letter that is not ASCII with three times its bytes, and a number with twice its own."""
OWNER_BYTES = 96
"""What an owner takes on a page beside its texts."""
CHUNK_BYTES = 18
"""A chunk number at most, twice: a marked one stands on the page twice."""

SENDING_MAX = 4
"""Snapshots that are being sent at once; the server lacks a page or some of each."""
WAITING_MAX = 1024
"""Askers that wait for their turn: a quarter of all requests that are answered at once."""
TURN_TIMEOUT = 2.0
"""Seconds that an asker waits for it. Nobody can be seen to have given up, and consumers do after 5 s: so one
that waited is told to come back, and the queue is never full of those that have gone."""

Row = tuple[m.SnapshotOwner, list[int]]


class PoolPages:
    """`pool` as it stands now, for messages of at most `max_payload` bytes. The copy is made at once; what it
    takes to make pages of it, four times as long, is done when they are taken."""

    def __init__(
        self, pool: PoolTable, definition: Definition, max_payload: int, *, as_json: bool = False
    ) -> None:
        share = JSON_SHARE_OF_PAYLOAD if as_json else PAGE_SHARE_OF_PAYLOAD
        self._version, self._definition = pool.version, definition
        self._marked = frozenset(pool.marked)
        self._cut = deque(_cut(pool, int(max_payload * share)))
        self.count = len(self._cut)

    def __iter__(self) -> Iterator[m.SnapshotPage]:
        """Pages 0.., each once."""
        while self._cut:
            number = self.count - len(self._cut)
            rows = self._cut.popleft()
            yield m.SnapshotPage(
                version=self._version,
                page=number,
                owners=tuple(owner for owner, _ in rows),
                chunks=tuple((i, tuple(numbers)) for i, (_, numbers) in enumerate(rows) if numbers),
                marked=tuple(n for _, numbers in rows for n in numbers if n in self._marked),
                definition=self._definition if number == 0 else None,
                last=not self._cut,
            )


@dataclass(frozen=True, slots=True)
class _Key:
    """What must be equal for two askers to get the same bytes."""

    version: Version
    max_payload: int
    as_json: bool


class _Encoded:
    """A snapshot's messages. Whoever is the first to need one encodes it, for all."""

    def __init__(self, key: _Key, pages: PoolPages, stamp: dict[str, Any]) -> None:
        self.key, self.count = key, pages.count
        self._pages, self._stamp = iter(pages), stamp
        self._messages: list[bytes] = []

    def message(self, number: int) -> bytes:
        while len(self._messages) <= number:
            body = codec.to_map(next(self._pages)) | self._stamp
            self._messages.append(codec.encode(body, as_json=self.key.as_json))
        return self._messages[number]


class Snapshots:
    """The snapshots of one lead, whose `stamp` is on every page. Of each pool the last one is kept."""

    def __init__(self, definitions: Mapping[str, Definition], stamp: dict[str, Any]) -> None:
        self._definitions, self._stamp = definitions, stamp
        self._kept: dict[str, _Encoded] = {}
        self._sending = asyncio.Semaphore(SENDING_MAX)
        self._waiting = 0

    async def send(
        self, pool: PoolTable, max_payload: int, send: Callable[[bytes], Awaitable[None]], *, as_json: bool
    ) -> m.SnapshotEnd:
        """Hand the pages to `send` one by one, all as `pool` is when this asker's turn comes; others have
        theirs between two pages. Returns what says that these were all. Raises Refused when too many ask at
        once, and what `send` raises."""
        async with self._turn():
            encoded = self._encoded(pool, _Key(pool.version, max_payload, as_json))
            for number in range(encoded.count):
                await asyncio.sleep(0)
                await send(encoded.message(number))
            return m.SnapshotEnd(encoded.key.version, encoded.count)

    def _encoded(self, pool: PoolTable, key: _Key) -> _Encoded:
        kept = self._kept.get(pool.name)
        if kept is None or kept.key != key:
            pages = PoolPages(pool, self._definitions[pool.name], key.max_payload, as_json=key.as_json)
            kept = self._kept[pool.name] = _Encoded(key, pages, self._stamp)
        return kept

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= WAITING_MAX:
            raise _overloaded()
        self._waiting += 1
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await self._sending.acquire()
        except TimeoutError:
            raise _overloaded() from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._sending.release()


def _overloaded() -> Refused:
    return Refused("store_unavailable", "too many snapshots at once", reason="overloaded", retry=True)


def snapshot_owner(pool: PoolTable, owner: Owner) -> m.SnapshotOwner:
    owner = pool.shown(owner)
    return m.SnapshotOwner(owner.name, owner.ip, owner.instance, owner.incarnation, pool.state(owner))


def _cut(pool: PoolTable, room: int) -> Iterator[list[Row]]:
    """Owners with their chunks, cut where a page is full; always at least one page."""
    page: list[Row] = []
    left = room
    for owner in pool.owners().values():
        shown = snapshot_owner(pool, owner)
        head = OWNER_BYTES + sum(len(text.encode()) for text in (owner.name, owner.ip, owner.instance))
        for numbers in _fitting(pool, owner, (room - head) // CHUNK_BYTES):
            size = head + CHUNK_BYTES * len(numbers)
            if page and size > left:
                yield page
                page, left = [], room
            page.append((shown, numbers))
            left -= size
    yield page


def _fitting(pool: PoolTable, owner: Owner, most: int) -> Iterator[list[int]]:
    """An owner's chunk numbers in runs of at most `most`; one empty run if it owns none."""
    held = pool.held.get(owner.key)
    numbers = list(held.numbers) if held else []
    step = max(1, most)
    for start in range(0, max(1, len(numbers)), step):
        yield numbers[start : start + step]
