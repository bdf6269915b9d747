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
from drsm_sdk.wire.space import Item

BEAT = 0.05
HELD = 40
"""Ids that a pod keeps: nearly all of a chunk of 50, so that each burst has to ask for chunks."""
BURST = 60
BURST_CHANCE = 0.01


Id = tuple[str, str, Item]
"""The pool, the space, and the id in it."""


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
    empty: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    may_lose: frozenset[str] = frozenset()
    """Pods that a fault keeps away for longer than `L`: the agents must declare them dead."""

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
        while True:
            for _ in range(BURST if self._random.random() < BURST_CHANCE else 1):
                if not self._issue():
                    break
            while len(self._mine) > HELD:
                for id_ in self._mine.popleft():
                    self._release(id_)
            for id_ in [id_ for id_ in self._record.orphaned if self._is_mine(id_)]:
                self._record.orphaned.discard(id_)
                self._release(id_)
            await asyncio.sleep(BEAT * self._random.uniform(0.5, 1.5))

    def _issue(self) -> bool:
        several = bool(self._pool.definition.spaces)
        try:
            drawn = (
                self._pool.allocate_set_nowait()
                if several
                else {self._pool.name: self._pool.allocate_nowait()}
            )
        except PoolEmpty:
            self._record.empty += 1
            if not several and (free := self._pool.stats.free):
                self._record.wrong.append(f"{self.name}: PoolEmpty with {free} ids in stock")
            return False
        except (AgentUnavailable, SessionIsLost) as error:
            if self.name not in self._record.may_lose:
                self._record.wrong.append(f"{time.time():.1f} {self.name} could not allocate: {error!r}")
            return False
        except DrsmError as error:
            self._record.wrong.append(f"{self.name}: {error!r}")
            return False
        grants = {self._pool.grant(item, space=space) for space, item in drawn.items()}
        if len(grants) > 1:
            self._record.wrong.append(f"{self.name}: {drawn} are not of one chunk")
        ids = [(self._pool.name, space, item) for space, item in drawn.items()]
        for id_ in ids:
            self._record.issue(Issue(id_, self.name, self._drsm.incarnation, grants.copy().pop()))
        self._mine.append(ids)
        return True

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
