"""What an operator should look at: the table in numbers, and in it pods that never release an id, chunks that
nobody scans, and what stands in the way of Go DRSM pods on the same collection. These are told once each, and
counted in metrics for as long as it lasts."""

import asyncio

import structlog

from drsm_agent.core import usage
from drsm_agent.core.documents import LIVE
from drsm_agent.core.numbers import go_knows
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import StoreUnavailable
from drsm_agent.go_pods import cannot_honour, go_knows_too_many
from drsm_agent.ports import Store
from drsm_agent.reign import Reign

LOOK_INTERVAL = 1.0
"""Sooner than anybody asks for metrics. Not at every event: over many pools and pods a look takes longer than
all that has to be done then."""
LOOK_SHARE, LOOK_INTERVAL_MAX = 0.05, 10.0
"""A look at 1000 pods in 64 pools takes 0.07 s, at a million marked chunks over a second: a twentieth of the
time is enough for it."""

TTL_INTERVAL = 60.0
"""Seconds between two looks at the index by which MongoDB deletes keepalives."""
TTL_MISSING, CANNOT_HONOUR, NUMBERS_RUN_OUT = "ttl_index", "definition", "numbers"
"""What may stand in the way of Go pods, as the metric names it."""

log = structlog.get_logger("drsm_agent.alarms")


class Alarms:
    """The gauges and alarms of one reign."""

    def __init__(self, reign: Reign, store: Store) -> None:
        self._table, self._definitions, self._use = reign.table, reign.definitions, reign.use
        self._clock, self._metrics = reign.clock, reign.metrics
        self._marks = {name: usage.Marks() for name in reign.table.pools}
        self._told: set[tuple[str, str]] = set()
        self._overdue: set[str] = set()
        self._store = store
        self._go_told: set[tuple[str, str]] = set()
        self._ttl: dict[str, int | None] = {}
        self._ttl_at = float("-inf")

    async def run(self) -> None:
        while True:
            began = self._clock()
            await self.look()
            took = self._clock() - began
            await asyncio.sleep(min(max(LOOK_INTERVAL, took / LOOK_SHARE), LOOK_INTERVAL_MAX))

    async def look(self) -> None:
        """Measure and tell; others have their turn after each pool."""
        await self._look_at_ttl()
        only: dict[tuple[str, str], bool] = {}
        beside_go: dict[tuple[str, str], bool] = {}
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
            beside_go |= self._beside_go(pool)
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

        for pool_name, alarm in usage.news(beside_go, self._go_told):
            self._tell_of_go(self._table.pools[pool_name], alarm)

    # --- Go pods ------------------------------------------------------------------------------------

    async def _look_at_ttl(self) -> None:
        """Whether MongoDB deletes what has expired, for pools that Go pods use: now and then."""
        with_go = [pool.name for pool in self._table.pools.values() if pool.has_go]
        if not with_go or self._clock() - self._ttl_at < TTL_INTERVAL:
            return
        self._ttl_at = self._clock()
        try:
            self._ttl = {name: await self._store.ttl(name) for name in with_go}
        except StoreUnavailable as error:
            log.warning("put_off", error=str(error))

    def _beside_go(self, pool: PoolTable) -> dict[tuple[str, str], bool]:
        """Which alarms a pool has, none without Go pods."""
        definition = self._definitions[pool.name]
        alarms = {
            TTL_MISSING: pool.has_go and self._ttl.get(pool.name, 0) != 0,
            CANNOT_HONOUR: pool.has_go and bool(self._not_honoured(pool)),
            NUMBERS_RUN_OUT: go_knows_too_many(pool, definition.capacity),
        }
        for alarm, rings in alarms.items():
            if pool.has_go or any(told == pool.name for told, _ in self._go_told):
                self._metrics.go_alarms.labels(pool=pool.name, alarm=alarm).set(rings)
        return {(pool.name, alarm): rings for alarm, rings in alarms.items()}

    def _not_honoured(self, pool: PoolTable) -> list[str]:
        definition = self._definitions[pool.name]
        outside = max(pool.chunks, default=0) >= definition.capacity
        return cannot_honour(definition) + (["Go pods own numbers beyond its bits"] if outside else [])

    def _tell_of_go(self, pool: PoolTable, alarm: str) -> None:
        if alarm == TTL_MISSING:
            found = self._ttl.get(pool.name)
            log.error(
                "ttl_index_missing",
                pool=pool.name,
                found="no index" if found is None else f"expireAfterSeconds {found}",
                action="Go pods do not learn that another one is dead: create an index of the pool's "
                "collection on expireAt with expireAfterSeconds 0; drop one with another value",
            )
        elif alarm == CANNOT_HONOUR:
            log.error(
                "go_cannot_honour",
                pool=pool.name,
                reasons=self._not_honoured(pool),
                action="Go pods use this pool, and issue other ids than its definition says: make it what "
                "they use (docs/migration.md), or stop them",
            )
        else:
            log.error(
                "go_numbers_run_out",
                pool=pool.name,
                known=go_knows(self._definitions[pool.name].capacity, pool.chunks, pool.known_free),
                capacity=self._definitions[pool.name].capacity,
                action="Go pods never forget a number, and stand still once they know all: restart them one "
                "by one. Until then only numbers are granted that they know",
            )

    # --- The table in numbers -------------------------------------------------------------------------

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
