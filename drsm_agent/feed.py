"""MongoDB -> change stream -> table -> log: what every agent follows, leading or not.

The feed reads all documents at one cluster time, folds every later change into the table, and keeps
the events that came of it in a log until somebody has published them. When the stream's position is
lost it reads everything anew; whoever used the old table is told by `lost`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog

from drsm_agent import cancellation
from drsm_agent.core.events import Event, Version
from drsm_agent.core.table import Hashes, Table
from drsm_agent.errors import PositionLost, StoreUnavailable
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Batch, Chance, Clock, Snapshot, Store
from drsm_sdk.wire import checksum

LOG_ENTRIES_MAX = 10_000
"""Batches that wait for a publisher. Beyond, the feed stops reading until some are published; the oplog
keeps the rest."""
LOAD_BATCH = 1000
"""Documents that are read into a table at a stretch; it keeps the event loop for 20 to 40 ms."""
RETRY_MIN, RETRY_MAX = 0.2, 5.0

log = structlog.get_logger("drsm_agent.feed")
HASHES = Hashes(ownership=checksum.ownership, holding=checksum.holding)


@dataclass(frozen=True, slots=True)
class Position:
    """A point between two clusterTimes: the stream resumes right after it. `at` is its last change's."""

    token: str
    at: int
    versions: dict[str, Version]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one batch brought. `index` counts changes since the table began; `position` is the last
    point known to lie between two clusterTimes, at or before this entry's end."""

    index: int
    events: list[Event]
    changed: list[tuple[str, str]]
    position: Position | None


@dataclass(slots=True)
class State:
    """One life of the table: from a full read until the position is lost."""

    table: Table
    after_loss: bool = False
    """Documents were dropped under the table before it."""
    log: deque[Entry] = field(default_factory=deque)
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Follows the store. `run` never returns; `loaded` gives the current table once there is one."""

    def __init__(
        self, store: Store, pools: list[str], clock: Clock, chance: Chance, metrics: Metrics
    ) -> None:
        self._store, self._pools, self._clock, self._chance = store, pools, clock, chance
        self._metrics = metrics
        self._state: State | None = None
        self._ready = asyncio.Event()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._end: Position | None = None
        self._after_loss = False
        self.heard_at = float("-inf")
        self.on_change: Callable[[Entry], None] | None = None

    async def run(self) -> None:
        while True:
            try:
                await self._follow(await self._load_retrying())
            except PositionLost as error:
                log.error(
                    "position_lost", error=str(error), code=error.code, action="reading everything anew"
                )
                self._metrics.position_lost.labels(code=str(error.code)).inc()
                self._after_loss = error.data_lost
            finally:
                self._forget()
            cancellation.heed()

    async def loaded(self) -> State:
        """The current state; waits for the first read."""
        while self._state is None:
            await self._ready.wait()
        return self._state

    @property
    def current(self) -> State | None:
        return self._state

    def staleness(self) -> float:
        """Seconds since the stream last said something, were it only that nothing happened."""
        return self._clock() - self.heard_at

    async def news(self) -> None:
        """Returns when an entry was logged since the last call."""
        await self._news.wait()
        self._news.clear()

    def skip_published(self, state: State, versions: Mapping[str, Version]) -> None:
        """Another agent published everything up to these versions: a standby need not keep it."""
        while state.log and all(
            event.version <= versions.get(event.pool, (0, 0)) for event in state.log[0].events
        ):
            state.log.popleft()
        self._room.set()

    def shorten(self, state: State, through: int) -> None:
        """Entries up to index `through` were published."""
        while state.log and state.log[0].index <= through:
            state.log.popleft()
        self._room.set()

    # --- reading --------------------------------------------------------------------------------

    async def _load(self) -> State:
        snapshot = await self._store.snapshot()
        state = State(await read_table(self._pools, snapshot), self._after_loss)
        counts = {name: len(pool.chunks) for name, pool in state.table.pools.items()}
        log.info("table_read", at=snapshot.at, chunks=counts, sessions=len(state.table.sessions))
        self._state, self._end, self.heard_at = state, None, self._clock()
        self._ready.set()
        return state

    async def _follow(self, state: State) -> None:
        token: str | None = None
        delay = RETRY_MIN
        while True:
            try:
                after = None if token else state.table.started
                async with aclosing(self._store.changes(after=after, token=token)) as batches:
                    async for batch in batches:
                        await self._take(state, batch)
                        token, delay = batch.token, RETRY_MIN
                log.warning("stream_ended", action="opening it again")
            except StoreUnavailable as error:
                log.warning("stream_interrupted", error=str(error))
            await asyncio.sleep(self._chance.jitter(delay))
            delay = min(RETRY_MAX, delay * 2)

    async def _take(self, state: State, batch: Batch) -> None:
        self.heard_at = self._clock()
        boundary = self._boundary(batch)
        events = [event for change in batch.changes for event in state.table.apply(change)]
        last_at = (
            batch.changes[-1].at if batch.changes else (self._end.at if self._end else state.table.started)
        )
        versions = {name: pool.version for name, pool in state.table.pools.items()}
        self._end = Position(batch.token, last_at, versions)
        self._metrics.changes.inc(len(batch.changes))
        entry = Entry(
            index=state.table.applied,
            events=events,
            changed=[(change.space, change.key) for change in batch.changes],
            position=boundary if batch.changes else self._end,
        )
        if state.log and not state.log[-1].changed and not state.log[-1].events:
            state.log.pop()  # of idle batches only the last one's position matters
        state.log.append(entry)
        if self.on_change and batch.changes:
            self.on_change(entry)
        self._news.set()
        while len(state.log) >= LOG_ENTRIES_MAX:
            self._room.clear()
            await self._room.wait()

    def _boundary(self, batch: Batch) -> Position | None:
        """The end of the batch before, if this one shows that it lies between two clusterTimes."""
        if self._end and batch.changes and batch.changes[0].at > self._end.at:
            return self._end
        return None

    def _forget(self) -> None:
        if self._state:
            self._state.lost.set()
        self._state = None
        self._ready.clear()

    async def _load_retrying(self) -> State:
        delay = RETRY_MIN
        while True:
            try:
                return await self._load()
            except StoreUnavailable as error:
                log.warning("read_failed", error=str(error))
            await asyncio.sleep(self._chance.jitter(delay))
            delay = min(RETRY_MAX, delay * 2)


async def read_table(pools: list[str], snapshot: Snapshot) -> Table:
    """The table at a snapshot's cluster time. A hundred thousand chunks take seconds: whatever else runs,
    the lead's renewal above all, has a turn in between."""
    table = Table(pools, snapshot.at, HASHES)
    for space, documents in snapshot.spaces.items():
        for start in range(0, len(documents), LOAD_BATCH):
            table.load(space, documents[start : start + LOAD_BATCH])
            await asyncio.sleep(0)
    return table
