"""What an operator should look at: the table in numbers, and in it pods that never release an id, and chunks
that nobody scans. These are told once each, and counted in metrics for as long as it lasts."""

import asyncio

import structlog

from drsm_agent.core import usage
from drsm_agent.core.documents import LIVE
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.reign import Reign

LOOK_INTERVAL = 1.0
"""Sooner than anybody asks for metrics. Not at every event: over many pools and pods a look takes longer than
all that has to be done then."""
LOOK_SHARE, LOOK_INTERVAL_MAX = 0.05, 10.0
"""A look at 1000 pods in 64 pools takes 0.07 s, at a million marked chunks over a second: a twentieth of the
time is enough for it."""

log = structlog.get_logger("drsm_agent.alarms")


class Alarms:
    """The gauges and alarms of one reign."""

    def __init__(self, reign: Reign) -> None:
        self._table, self._definitions, self._use = reign.table, reign.definitions, reign.use
        self._clock, self._metrics = reign.clock, reign.metrics
        self._marks = {name: usage.Marks() for name in reign.table.pools}
        self._told: set[tuple[str, str]] = set()
        self._overdue: set[str] = set()

    async def run(self) -> None:
        while True:
            began = self._clock()
            await self.look()
            took = self._clock() - began
            await asyncio.sleep(min(max(LOOK_INTERVAL, took / LOOK_SHARE), LOOK_INTERVAL_MAX))

    async def look(self) -> None:
        """Measure and tell; others have their turn after each pool."""
        only: dict[tuple[str, str], bool] = {}
        late: dict[str, bool] = {}
        self._metrics.sessions.set(sum(s.state == LIVE for s in self._table.sessions.values()))
        for pool in self._table.pools.values():
            self._measure(pool)
            leaking = self._leaking_in(pool)
            self._metrics.only_allocating.labels(pool=pool.name).set(len(leaking))
            only |= {(pool.name, pod): True for pod, _ in leaking}
            overdue = self._overdue_in(pool)
            self._metrics.marked_overdue.labels(pool=pool.name).set(len(overdue))
            late[pool.name] = bool(overdue)
            await asyncio.sleep(0)
        for pool_name, pod in usage.news(only, self._told):
            log.warning(
                "only_allocates",
                pool=pool_name,
                pod=pod,
                action="it never released an id since its session began: does the application?",
            )
        for pool_name in usage.news(late, self._overdue):
            log.warning(
                "marked_chunks_pile_up",
                pool=pool_name,
                action="claimed chunks are not scanned: look at the pods' scans (`drsm chunks --marked`), "
                "or set `unscanned` of the pool",
            )

    def _measure(self, pool: PoolTable) -> None:
        self._metrics.chunks.labels(pool=pool.name).set(len(pool.chunks))
        self._metrics.usable.labels(pool=pool.name).set(self._definitions[pool.name].usable)
        self._metrics.orphans.labels(pool=pool.name).set(sum(1 for _ in pool.orphans()))
        self._metrics.marked.labels(pool=pool.name).set(len(pool.marked))

    def _leaking_in(self, pool: PoolTable) -> list[Key]:
        definition = self._definitions[pool.name]
        ids = definition.ids_per_chunk * len(definition.parts)  # what is said is of all spaces together
        said = ((key, self._use[key].get(pool.name)) for key in pool.live if key in self._use)
        return [key for key, use in said if use and usage.only_allocates(use.issued, use.released, ids)]

    def _overdue_in(self, pool: PoolTable) -> list[int]:
        marked = ((n, pool.chunks[n].grant, pool.chunks[n].hold_ms) for n in pool.marked)
        return self._marks[pool.name].overdue(marked, self._clock())
