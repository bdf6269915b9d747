"""Pods that allocate and release all the time, and the record of every id that they issued."""

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from drsm_sdk import Drsm, Pool
from drsm_sdk.changes import Lost, Missed, SessionLost
from drsm_sdk.errors import AgentUnavailable, DrsmError, NotAllocated, NotOwner, PoolEmpty
from drsm_sdk.errors import SessionLost as SessionIsLost
from drsm_sdk.scan import InUse
from drsm_sdk.stock import Chunk
from drsm_sdk.wire.space import Item

BEAT = 0.05
HELD = 40
"""Ids that a pod keeps: nearly all of a chunk of 50."""
BURST_CHANCE = 0.001
BEYOND = 10
"""Ids that a burst takes after all that were in stock: it has to wait for a fresh chunk."""
STOCK_MAX = 300
"""With more in stock there is no burst, or the pools would run out: the SDK keeps what such a pace would need
for a minute, which is six times as much, and chunks go back only when it has forgotten that."""
PATIENCE = 15.0
"""Seconds that an application waits for an id when its pod has none in stock. A request that reached a leader
which then died, or stands still, costs the SDK 5 s, before it asks again."""


Id = tuple[str, str, Item]
"""The pool, the space, and the id in it."""
Drawn = dict[str, Item]
"""Of each space one id, all of one chunk."""


@dataclass(frozen=True, slots=True)
class Issue:
    """One id in somebody's hands."""

    id: Id
    pod: str
    incarnation: int | None
    grant: str


@dataclass
class Record:
    """What all pods together have issued; `in_use` stands for the contexts that an application stores."""

    in_use: dict[Id, Issue] = field(default_factory=dict)
    orphaned: set[Id] = field(default_factory=set)
    issued: int = 0
    waited: int = 0
    """How often a pod had nothing in stock and waited, and how often in vain."""
    starved: int = 0
    longest_wait: float = 0.0
    waiting: int = 0
    """Pods that have nothing in stock just now."""
    wrong: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    may_lose: frozenset[str] = frozenset()
    """Pods that a fault keeps away for longer than `L`: the agents must declare them dead."""
    may_starve: bool = False
    """Whether a fault may last longer than anybody waits for an id."""
    bursts: int = 0
    """How often all pods were told to take all that they have in stock, and more, if that is not too much."""

    def issue(self, issue: Issue) -> None:
        self.issued += 1
        if (other := self.in_use.get(issue.id)) is not None:
            self.wrong.append(f"DUPLICATE: {issue} is in use as {other}")
        self.in_use[issue.id] = issue

    def scan_of(self, pool: str) -> InUse:
        """What a claimer's scan is told."""

        async def used(first: Item, last: Item, space: str = pool) -> list[Item]:
            return [
                item
                for its_pool, its_space, item in self.in_use
                if (its_pool, its_space) == (pool, space) and first <= item <= last
            ]

        return used


class LoadedPod:
    """One pod's application: issues an id at each beat, releases the oldest, now and then takes many."""

    def __init__(self, drsm: Drsm, pool: Pool, record: Record, seed: int) -> None:
        self.name = drsm.pod.name
        self._drsm, self._pool, self._record = drsm, pool, record
        self._random = random.Random(seed)
        self._mine: deque[list[Id]] = deque()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work())
            tasks.create_task(self._listen())

    async def _work(self) -> None:
        told = self._record.bursts
        while True:
            free = self._pool.stats.free
            burst = self._random.random() < BURST_CHANCE or told != self._record.bursts
            told = self._record.bursts
            for _ in range(free + BEYOND if burst and free <= STOCK_MAX else 1):
                if not await self._issue():
                    break
            while len(self._mine) > HELD:
                for id_ in self._mine.popleft():
                    self._release(id_)
            for id_ in [id_ for id_ in self._record.orphaned if self._is_mine(id_)]:
                self._record.orphaned.discard(id_)
                self._release(id_)
            await asyncio.sleep(BEAT * self._random.uniform(0.5, 1.5))

    async def _issue(self) -> bool:
        try:
            drawn = self._draw()
            if drawn is None:
                drawn = await self._wait_for_stock()
        except (AgentUnavailable, SessionIsLost) as error:
            if self.name not in self._record.may_lose:
                self._record.wrong.append(f"{time.time():.1f} {self.name} could not allocate: {error!r}")
            return False
        except DrsmError as error:
            self._record.wrong.append(f"{self.name}: {error!r}")
            return False
        if drawn is None:
            return False
        grants = {self._pool.grant(item, space=space) for space, item in drawn.items()}
        if len(grants) > 1:
            self._record.wrong.append(f"{self.name}: {drawn} are not of one chunk")
        ids = [(self._pool.name, space, item) for space, item in drawn.items()]
        for id_ in ids:
            self._record.issue(Issue(id_, self.name, self._drsm.incarnation, grants.copy().pop()))
        self._mine.append(ids)
        return True

    def _draw(self) -> Drawn | None:
        """An id, or one of each space; None when there is no stock, which is looked at."""
        try:
            if self._several:
                return self._pool.allocate_set_nowait()
            return {self._pool.name: self._pool.allocate_nowait()}
        except PoolEmpty:
            if could := [chunk.n for chunk in self._pool._stock if chunk.open and _serves(chunk)]:
                self._record.wrong.append(f"{self.name}: PoolEmpty though chunks {could} have free ids")
            return None

    async def _wait_for_stock(self) -> Drawn | None:
        """None where there need be nothing, as the fault may last longer than anybody waits."""
        self._record.waited += 1
        self._record.waiting += 1
        may_starve, begin = self._record.may_starve, time.monotonic()
        try:
            if self._several:
                return await self._pool.allocate_set(timeout=PATIENCE)
            return {self._pool.name: await self._pool.allocate(timeout=PATIENCE)}
        except (PoolEmpty, AgentUnavailable):
            if may_starve or self._record.may_starve or self.name in self._record.may_lose:
                self._record.starved += 1
                return None
            raise
        finally:
            self._record.waiting -= 1
            self._record.longest_wait = max(self._record.longest_wait, time.monotonic() - begin)

    @property
    def _several(self) -> bool:
        return bool(self._pool.definition.spaces)

    def _is_mine(self, id_: Id) -> bool:
        pool, space, item = id_
        return pool == self._pool.name and self._pool.valid(item, space=space)

    def _release(self, id_: Id) -> None:
        _, space, item = id_
        try:
            self._pool.release(item, space=space)
        except (NotOwner, NotAllocated):  # with its chunk it became another's: whoever owns it releases it
            self._record.orphaned.add(id_)
        else:
            self._record.in_use.pop(id_, None)

    async def _listen(self) -> None:
        async for change in self._pool.changes():
            match change:
                case SessionLost(reason=reason):
                    self._record.lost[f"{self.name} {reason}"] += 1
                    if self.name not in self._record.may_lose:
                        self._record.wrong.append(f"{time.time():.1f} {self.name} lost its session: {reason}")
                    self._record.orphaned |= {id_ for ids in self._mine for id_ in ids}
                    self._mine.clear()
                case Lost(chunks=chunks):
                    self._record.wrong.append(f"{self.name} lost chunks {chunks} though its session lives")
                case Missed(count=count):
                    self._record.wrong.append(f"{self.name} was too slow for {count} changes")
                case _:
                    pass


def _serves(chunk: Chunk) -> bool:
    """Whether it has a free id of each space."""
    return all(block.free for block in chunk.blocks)
