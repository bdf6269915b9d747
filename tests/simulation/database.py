"""MongoDB, simulated: the store's twin with the faults of a replica set.

What is simulated is what a majority sees: a write takes effect at one moment, its answer comes later or
never, and one whose answer never comes may have taken effect, may not have, or may still do so. Elections
make everything wait. Changes of one bulk write may share their clusterTime. Each agent has a view with a
line of its own, which can be cut.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from drsm_agent.core.documents import Document
from drsm_agent.core.table import Change
from drsm_agent.core.writes import Delete, Insert, Outcome, Update, Write
from drsm_agent.errors import StoreUnavailable
from drsm_agent.ports import Batch, Snapshot
from drsm_agent.store.memory import MemoryStore
from tests.simulation.loop import Node

LAG_MOST = 3.0
LATE = 10.0
"""Seconds after which a write whose client has given it up may still take effect."""
PATIENCE = 3.0
"""Seconds after which the driver gives an operation up, as `store.mongo` tells it to."""


EPOCH = 1.7e9
"""The database's time, in seconds since the epoch, when a world begins whose cluster times follow it."""


@dataclass(frozen=True, slots=True)
class Hand:
    """Who writes: a Go pod, the TTL monitor, or an agent, which is nobody in particular. `decided` is when,
    `cause` the change that it answers."""

    who: str = ""
    decided: float = 0.0
    cause: Change | None = None
    knew: frozenset[str] = frozenset()
    """What the decider knew then, as far as the observer asks for it."""


@dataclass(frozen=True, slots=True)
class Backup:
    """All documents as of a cluster time."""

    at: int
    spaces: dict[str, list[Document]]


class Database(MemoryStore):
    """The replica set. `changed` sees every change as it becomes visible to a majority."""

    def __init__(self, pools: Iterable[str], node: Node, chance: random.Random) -> None:
        super().__init__(pools)
        self.node, self.chance = node, chance
        self.changed: Callable[[Change], None] = lambda change: None
        self.ties = 0.3
        self.fates: tuple[str, ...] = ("done", "lost", "late")
        """What may become of a write whose answer never comes."""
        self.lag = 0.0
        """Probability that a batch of the change stream comes late."""
        self.doubt = 0.0
        """Probability that a write's answer never comes."""
        self.doubtful = ""
        """The space in which that happens; in all of them when empty."""
        self.available = asyncio.Event()
        self.available.set()
        self.calm = False
        self.late = 0
        """Writes given up by their clients that will still take effect."""
        self.life = 0
        """Which life of the database this is: a restore begins another."""
        self._in_bulk = False
        self._follows_time = False
        self.hand = Hand()

    def follow_time(self) -> None:
        """From now on the seconds of cluster times are the world's, as on real servers. The agent makes the
        end of keepalives of them, which the TTL monitor goes by."""
        self._follows_time = True
        self._now = int(self.seconds) << 32

    @property
    def seconds(self) -> float:
        """The database's time, in seconds since the epoch."""
        return EPOCH + self.node.now()

    @property
    def end(self) -> int:
        """The cluster time of the last change."""
        return self._now

    def expire(self, space: str) -> None:
        """One round of MongoDB's TTL monitor. Where there is no primary, there is none."""
        if not self.available.is_set():
            return
        for document in self.documents(space):
            ends = document.get("expireAt")
            if isinstance(ends, datetime) and ends <= datetime.fromtimestamp(self.seconds, UTC):
                self.write_now(Delete(space, {"_id": document["_id"]}), Hand("ttl", self.node.now()))

    def write_now(self, write: Write, hand: Hand) -> bool:
        """What has reached the primary takes effect; whether it changed, inserted or deleted anything."""
        self._in_bulk, before, self.hand = False, self.hand, hand
        try:
            match write:
                case Insert():
                    return self._insert(write)
                case Update():
                    return self._update(write) > 0
                case Delete():
                    return self._delete(write) > 0
        finally:
            self.hand = before

    def elect(self, seconds: float) -> None:
        """No primary for a while."""
        self.available.clear()
        self.node.later(seconds, self.available.set)

    def back_up(self) -> Backup:
        """Everything that there is, as of now."""
        return Backup(self._now, {space: self._documents(space) for space in self._spaces})

    def restore(self, backup: Backup) -> None:
        """What was written since is gone; cluster time begins where it was then, or goes on."""
        self.life += 1
        self._now = self.chance.choice([backup.at, self._now]) + 1
        self._spaces = {space: {d["_id"]: d for d in documents} for space, documents in backup.spaces.items()}
        self._oplog.clear()

    def doubts(self, writes: Sequence[Write]) -> bool:
        """Whether the outcome of these shall stay unknown."""
        there = not self.doubtful or any(write.space == self.doubtful for write in writes)
        return there and self.chance.random() < self.doubt

    def delay(self) -> float:
        return 0.001 if self.calm else min(self.chance.expovariate(1 / 0.003), 0.5)

    async def apply(self, writes: Sequence[Write], hand: Hand | None = None) -> Outcome:
        self._in_bulk, self.hand = False, hand or Hand(decided=self.node.now())
        return await super().write(writes)  # nobody else has a turn meanwhile

    def document(self, space: str, key: str) -> Document | None:
        """What a majority has, at once."""
        return self._spaces[space].get(key)

    def documents(self, space: str) -> list[Document]:
        """To look at only: they are no copies."""
        return list(self._spaces[space].values())

    def _change(self, space: str, key: str, **what: Any) -> None:
        if self._in_bulk and not self.calm and self.chance.random() < self.ties:
            self._now -= 1
        elif self._follows_time:
            self._now = max(self._now, int(self.seconds) << 32)
        self._in_bulk = True
        super()._change(space, key, **what)
        entry = self._oplog[-1]
        if isinstance(entry, Change):
            self.changed(entry)

    async def _reach(self) -> None:
        """Delays and faults are the views'; here everything happens at one moment."""


class View:
    """One agent's way to the database: the `Store` port."""

    def __init__(self, database: Database, node: Node) -> None:
        self._database, self.node = database, node
        self.cut = False

    async def write(self, writes: Sequence[Write]) -> Outcome:
        hand = self._hand(writes)
        await self._way()
        database = self._database
        if not database.calm and database.doubts(writes):
            await self._write_in_doubt(writes, hand)
        outcome = await database.apply(writes, hand)
        await self._way_back()
        return outcome

    def _hand(self, writes: Sequence[Write]) -> Hand:
        """The agent, as it decides."""
        return Hand(decided=self._database.node.now())

    async def read(self, space: str) -> list[Document]:
        await self._way()
        documents = await self._database.read(space)
        await self._way_back()
        return documents

    async def snapshot(self) -> Snapshot:
        await self._way()
        snapshot = await self._database.snapshot()
        await self._way_back()
        return snapshot

    async def ttl(self, space: str) -> int | None:
        """Go pods make the index."""
        await self._way()
        return 0

    async def has_chunks(self, space: str, database: str | None = None) -> bool:
        await self._way()
        return await self._database.has_chunks(space, database)

    async def has_go(self, space: str) -> bool:
        await self._way()
        return await self._database.has_go(space)

    async def elsewhere(self, spaces: Sequence[str]) -> dict[str, list[str]]:
        await self._way()
        return {}

    async def changes(
        self, *, after: int | None = None, token: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        database = self._database
        async with aclosing(database.changes(after=after, token=token)) as batches:
            async for batch in batches:
                await self._way()
                if not database.calm and database.chance.random() < database.lag:
                    await asyncio.sleep(database.chance.uniform(0, LAG_MOST))  # the majority is behind
                yield batch

    async def close(self) -> None:
        return

    async def _way(self) -> None:
        """To the primary, as soon as there is one."""
        await asyncio.sleep(self._database.delay())
        if not self.cut and self._database.available.is_set():
            return
        try:
            async with asyncio.timeout(PATIENCE):
                while self.cut or not self._database.available.is_set():
                    await self._database.available.wait()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise StoreUnavailable("the database did not answer") from None

    async def _way_back(self) -> None:
        await asyncio.sleep(self._database.delay())
        if self.cut:
            await asyncio.sleep(PATIENCE)
            raise StoreUnavailable("the answer did not come")

    async def _write_in_doubt(self, writes: Sequence[Write], hand: Hand) -> None:
        """No answer. It has taken effect, or not, or it will: the server goes on without the client."""
        database = self._database
        match database.chance.choice(database.fates):
            case "done":
                await database.apply(writes, hand)
            case "late":
                delay, life = database.chance.uniform(0, LATE), database.life

                def arrive() -> None:
                    database.late -= 1
                    if database.life == life:
                        database.node.start(database.apply(writes, hand))

                database.late += 1
                database.node.later(delay, arrive)
        await asyncio.sleep(database.chance.uniform(0, PATIENCE))
        raise StoreUnavailable("the outcome of a write is unknown")
