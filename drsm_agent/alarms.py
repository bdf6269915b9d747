"""What an operator should look at: pods that never release an id, chunks that nobody scans. Told once each,
and counted in metrics for as long as it lasts."""

import structlog

from drsm_agent.core import usage
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.reign import Reign
from drsm_sdk.wire import messages as m

log = structlog.get_logger("drsm_agent.alarms")


class Alarms:
    """The alarms of one reign; `look` now and then."""

    def __init__(self, reign: Reign) -> None:
        self._table, self._definitions, self._use = reign.table, reign.definitions, reign.use
        self._clock, self._metrics = reign.clock, reign.metrics
        self._marks = {name: usage.Marks() for name in reign.table.pools}
        self._told: set[tuple[str, str]] = set()
        self._overdue: set[str] = set()

    def look(self) -> None:
        only: dict[tuple[str, str], bool] = {}
        late: dict[str, bool] = {}
        for pool in self._table.pools.values():
            leaking = {(pool.name, pod): self._leaks(pool, (pod, n)) for pod, n in pool.live}
            self._metrics.only_allocating.labels(pool=pool.name).set(sum(leaking.values()))
            only |= leaking
            overdue = self._overdue_in(pool)
            self._metrics.marked_overdue.labels(pool=pool.name).set(len(overdue))
            late[pool.name] = bool(overdue)
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

    def _leaks(self, pool: PoolTable, key: Key) -> bool:
        said = self._use.get(key, {}).get(pool.name, m.Use())
        definition = self._definitions[pool.name]
        ids = definition.ids_per_chunk * len(definition.parts)  # what is said is of all spaces together
        return usage.only_allocates(said.issued, said.released, ids)

    def _overdue_in(self, pool: PoolTable) -> list[int]:
        marked = ((n, pool.chunks[n].grant, pool.chunks[n].hold_ms) for n in pool.marked)
        return self._marks[pool.name].overdue(marked, self._clock())
