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
from drsm_agent.core.position import Position
from drsm_agent.core.table import Hashes, Table
from drsm_agent.errors import OVER, PositionLost, StoreUnavailable
from drsm_agent.metrics import Metrics
from drsm_agent.patience import Patience
from drsm_agent.ports import Batch, Chance, Clock, Snapshot, Store
from drsm_sdk.wire import checksum

LOG_ENTRIES_MAX = 10_000
"""Batches that wait for a publisher. Beyond, the feed stops reading until some are published; the oplog
keeps the rest."""
LOAD_BATCH = 1000
"""Documents that are read into a table at a stretch; it keeps the event loop for 20 to 40 ms."""
STILL_AFTER = 15.0
"""Seconds in which the position must move: an idle primary writes to its oplog each 10 s, and the leader
renews each `T/3`. Where batches come but the position stands, a majority confirms nothing any more."""

STILL_ACTION = "look at the replica set: a majority of its data members must be up"

log = structlog.get_logger("drsm_agent.feed")
HASHES = Hashes(ownership=checksum.ownership, holding=checksum.holding)


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
    """Documents were dropped under a table before it, and no lead has waited since then until pods have
    certainly stopped issuing from what they held."""
    log: deque[Entry] = field(default_factory=deque)
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Follows the store. `run` never returns, and raises StoreBroken when only a person can help; `loaded`
    gives the current table once there is one."""

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
        self._patience = Patience(clock, chance)
        self._heard_at = self._moved_at = float("-inf")
        self._still = False
        self.on_change: Callable[[Entry], None] | None = None

    async def run(self) -> None:
        failed: StoreUnavailable | PositionLost
        while True:
            try:
                await self._follow(await self._load())
            except StoreUnavailable as error:
                log.warning("read_failed", error=str(error), action="trying again")
                failed = error
            except PositionLost as error:
                self._count_end(error)
                log.error(
                    "position_lost",
                    end=error.end,
                    code=error.code,
                    error=str(error),
                    action="reading everything anew",
                )
                # Until a lead has waited it out, whatever else is lost: pods may still issue from it.
                self._after_loss |= error.data_lost
                failed = error
            finally:
                self._forget()
            cancellation.heed()
            await self._patience.wait(failed)

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
        return self._clock() - self._heard_at

    def standstill(self) -> float:
        """Seconds since the stream's position last moved."""
        return self._clock() - self._moved_at

    def stands_still(self) -> bool:
        """Whether it should have moved by now, so that what the table shows may be old."""
        return self.standstill() > STILL_AFTER

    def waited_out(self, state: State) -> None:
        """A lead over this table has outlasted whatever was dropped before it; what is dropped now is not."""
        if state is self._state:
            self._after_loss = state.after_loss = False

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
        self._state, self._end = state, None
        self._heard_at = self._moved_at = self._clock()
        self._ready.set()
        return state

    async def _follow(self, state: State) -> None:
        """One stream after the other, each from where the last one broke off. Raises PositionLost,
        StoreBroken."""
        token: str | None = None
        while True:
            try:
                after, opened = None if token else state.table.started, False
                async with aclosing(self._store.changes(after=after, token=token)) as batches:
                    async for batch in batches:
                        await self._take(state, batch)
                        token = batch.token
                        if opened:  # one that can be opened, but not read, gets nowhere
                            self._patience.restore()
                        opened = True
                raise PositionLost("The change stream ended; read everything anew", end=OVER)
            except StoreUnavailable as error:
                self._count_end(error)
                log.warning(
                    "stream_interrupted",
                    end=error.end,
                    code=error.code,
                    error=str(error),
                    action="going on from its position",
                )
                await self._patience.wait(error)

    def _count_end(self, error: StoreUnavailable | PositionLost) -> None:
        self._metrics.stream_ends.labels(end=error.end, code=str(error.code or "")).inc()

    def _hear(self, batch: Batch) -> None:
        """Note that the stream speaks, and whether its position moves."""
        self._heard_at = now = self._clock()
        if self._end is None or batch.changes or batch.token != self._end.token:
            if self._still:
                log.info("position_moves_again", seconds=round(now - self._moved_at, 1))
            self._moved_at, self._still = now, False
        elif not self._still and self.stands_still():
            self._still = True
            log.warning("position_stands_still", seconds=round(now - self._moved_at, 1), action=STILL_ACTION)

    async def _take(self, state: State, batch: Batch) -> None:
        self._hear(batch)
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


async def read_table(pools: list[str], snapshot: Snapshot) -> Table:
    """The table at a snapshot's cluster time. A hundred thousand chunks take seconds: whatever else runs,
    the lead's renewal above all, has a turn in between."""
    table = Table(pools, snapshot.at, HASHES)
    for space, documents in snapshot.spaces.items():
        for start in range(0, len(documents), LOAD_BATCH):
            table.load(space, documents[start : start + LOAD_BATCH])
            await asyncio.sleep(0)
    return table
