"""The store in memory: the twin of `mongo`, under the same tests.

It keeps the same promises and nothing more: guards, unique `_id`, counts of what really changed, an
oplog with a cluster time for each change, updates as deltas. It is deterministic; whoever simulates
faults extends it (`_reach` is on the way of every operation).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drsm_agent.core.documents import Document, merge
from drsm_agent.core.table import Change
from drsm_agent.core.writes import Delete, Insert, Outcome, Update, Write
from drsm_agent.errors import DROPPED, PositionLost, StoreUnavailable
from drsm_agent.ports import Batch, Snapshot
from drsm_agent.store.spaces import FOLLOWED, UNFOLLOWED, space_of

BATCH = 1000
IDLE_SECONDS = 0.5
FIRST_TIME = 1 << 32  # a cluster time is seconds << 32 | increment
HISTORY_LOST, NO_TOKEN = 286, 50811  # MongoDB's codes

_ABSENT = object()
_BULK_ORDER = (Insert, Update, Delete)  # in which MongoDB's driver sends an unordered bulk


@dataclass(frozen=True, slots=True)
class Dropped:
    """An entry of the oplog: a space was dropped."""

    space: str
    at: int


class MemoryStore:
    """The `Store` port for `pools`."""

    def __init__(self, pools: Iterable[str]) -> None:
        self._followed = (*FOLLOWED, *pools)
        self._spaces: dict[str, dict[str, Document]] = {space: {} for space in (*self._followed, *UNFOLLOWED)}
        self._oplog: list[Change | Dropped] = []
        self._forgotten = 0
        self._now = FIRST_TIME
        self._waiting: list[asyncio.Future[None]] = []
        """Change streams that are at the end of the oplog."""
        self._closed = False
        self._ttl: dict[str, int] = {}
        """After how many seconds beyond `expireAt` documents of a space are to be deleted."""

    async def write(self, writes: Sequence[Write]) -> Outcome:
        await self._reach()
        if not writes:
            return Outcome(changed=0)
        space_of(writes, self._spaces)
        changed, refused = 0, set()
        for index, write in sorted(enumerate(writes), key=_bulk_order):
            match write:
                case Insert():
                    inserted = self._insert(write)
                    changed += inserted
                    refused |= set() if inserted else {index}
                case Update():
                    changed += self._update(write)
                case Delete():
                    changed += self._delete(write)
        return Outcome(changed, frozenset(refused))

    async def read(self, space: str) -> list[Document]:
        await self._reach()
        return self._documents(space)

    async def snapshot(self) -> Snapshot:
        await self._reach()
        spaces = {space: self._documents(space) for space in self._followed}
        return Snapshot(self._now, spaces)

    async def ttl(self, space: str) -> int | None:
        await self._reach()
        return self._ttl.get(space)

    async def has_chunks(self, space: str, database: str | None = None) -> bool:
        await self._reach()
        return database is None and any(key.startswith("chunkid-") for key in self._spaces[space])

    async def has_go(self, space: str) -> bool:
        await self._reach()
        return any(document.get("drsm") is None for document in self._spaces[space].values())

    async def elsewhere(self, spaces: Sequence[str]) -> dict[str, list[str]]:
        await self._reach()
        return {}

    def changes(self, *, after: int | None = None, token: str | None = None) -> AsyncGenerator[Batch, None]:
        return self._batches(self._position(after, token))

    async def close(self) -> None:
        self._closed = True

    def drop(self, space: str) -> None:
        """Drop a space, as an operator may; the change stream ends by it."""
        self._spaces[space].clear()
        self._now += 1
        self._log(Dropped(space, self._now))

    def forget(self) -> None:
        """Lose all of the oplog up to now, as after a long pause."""
        self._forgotten = len(self._oplog)

    async def _reach(self) -> None:
        """What every operation does first. As with a real store others have their turn meanwhile."""
        await asyncio.sleep(0)
        if self._closed:
            raise StoreUnavailable("Expected an open store, found it closed; make a new one")

    def _documents(self, space: str) -> list[Document]:
        return [_copy(document) for document in self._spaces[space].values()]

    # --- writes -----------------------------------------------------------------------------------

    def _insert(self, write: Insert) -> bool:
        documents = self._spaces[write.space]
        if write.key in documents:
            return False
        documents[write.key] = _copy(write.document)
        self._change(write.space, write.key, document=_copy(write.document))
        return True

    def _update(self, write: Update) -> int:
        changed = 0
        for key in self._matching(write)[: None if write.many else 1]:
            document = self._spaces[write.space][key]
            delta = _delta(document, write)
            if delta:
                self._spaces[write.space][key] = merge(document, _copy(delta))
                self._change(write.space, key, updated=delta)
                changed += 1
        return changed

    def _delete(self, write: Delete) -> int:
        keys = self._matching(write)[:1]
        for key in keys:
            del self._spaces[write.space][key]
            self._change(write.space, key, gone=True)
        return len(keys)

    def _matching(self, write: Update | Delete) -> list[str]:
        documents = self._spaces[write.space]
        keys = [write.where["_id"]] if "_id" in write.where else list(documents)
        return [key for key in keys if key in documents and matches(documents[key], write.where)]

    # --- the oplog and the change stream -------------------------------------------------------------

    def _change(self, space: str, key: str, **what: Any) -> None:
        self._now += 1
        token = _token(len(self._oplog) + 1)
        self._log(Change(space=space, key=key, at=self._now, token=token, **what))

    def _log(self, entry: Change | Dropped) -> None:
        self._oplog.append(entry)
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            _wake(news)

    def _position(self, after: int | None, token: str | None) -> int:
        """The index in the oplog that a stream begins with."""
        if (after is None) == (not token):
            raise ValueError("A stream begins either after a cluster time or after a token: give one of them")
        if token:
            return int(token) if token.isdecimal() else -1
        later = (index for index, entry in enumerate(self._oplog) if entry.at > (after or 0))
        return next(later, len(self._oplog))

    async def _batches(self, position: int) -> AsyncGenerator[Batch, None]:
        if not 0 <= position <= len(self._oplog):
            raise PositionLost("The token is not one of this store's; read everything anew", NO_TOKEN)
        while True:
            await self._reach()
            if position < self._forgotten:
                raise PositionLost("The oplog does not reach back to the position", HISTORY_LOST)
            entries = self._oplog[position : position + BATCH]
            position += len(entries)
            yield Batch(self._followed_changes(entries), _token(position))
            if position == len(self._oplog):
                await self._wait_for_news()

    def _followed_changes(self, entries: Iterable[Change | Dropped]) -> list[Change]:
        followed = [entry for entry in entries if entry.space in self._followed]
        for entry in followed:
            if isinstance(entry, Dropped):
                text = f"The change stream saw 'drop' of {entry.space}; read everything anew"
                raise PositionLost(text, end=DROPPED)
        return [entry for entry in followed if isinstance(entry, Change)]

    async def _wait_for_news(self) -> None:
        loop = asyncio.get_running_loop()
        news = loop.create_future()
        self._waiting.append(news)
        idle = loop.call_later(IDLE_SECONDS, _wake, news)
        try:
            await news
        finally:
            idle.cancel()
            if news in self._waiting:
                self._waiting.remove(news)


def _wake(news: "asyncio.Future[None]") -> None:
    if not news.done():
        news.set_result(None)


def matches(document: Document, where: Document) -> bool:
    """Whether a document passes a guard: equality, `$lt`, `$lte` and `$in`, by dotted path."""
    return all(_passes(_value(document, path), wanted) for path, wanted in where.items())


def _passes(value: Any, wanted: Any) -> bool:
    """Nothing is below or above an absent field; None equals it."""
    if not isinstance(wanted, Mapping):
        return bool(value == wanted)
    match wanted:
        case {"$lt": bound}:
            return value is not None and bool(value < bound)
        case {"$lte": bound}:
            return value is not None and bool(value <= bound)
        case {"$in": values}:
            return value in values
    raise ValueError(f"A guard is kept to equality, $lt, $lte and $in, but this one is {wanted}")


def _value(document: Any, path: str, absent: Any = None) -> Any:
    for name in path.split("."):
        document = document.get(name, absent) if isinstance(document, Mapping) else absent
    return document


def _delta(document: Document, update: Update) -> Document:
    """What an update changes, as MongoDB tells it: only what differs, an array as a whole."""
    fields = _copy(update.set)
    delta = {path: value for path, value in fields.items() if _value(document, path, _ABSENT) != value}
    for path, items in update.add_to_set.items():
        present = _value(document, path) or []
        added = [item for item in dict.fromkeys(items["$each"]) if item not in present]
        delta |= {path: present + added} if added else {}
    return delta | {path: (_value(document, path) or 0) + step for path, step in update.inc.items()}


def _copy(document: Document) -> Document:
    """A copy as a database gives it back: tuples have become lists."""
    return merge(document, {})


def _token(position: int) -> str:
    return f"{position:08d}"


def _bulk_order(numbered: tuple[int, Write]) -> int:
    return _BULK_ORDER.index(type(numbered[1]))
