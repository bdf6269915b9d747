"""From the verb of a request to its handler, and what only looks at the table.

A handler gets the decoded message and returns the answer; `Endpoints` does the bytes. `Sessions` has those
about sessions, `Allocations` those about chunks.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from drsm_agent.allocations import Allocations
from drsm_agent.core.documents import Owner
from drsm_agent.core.lease import whole_ms
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import Refused
from drsm_agent.feed import Entry
from drsm_agent.mirrors import Mirrors
from drsm_agent.reign import Reign
from drsm_agent.relay import owner_ref
from drsm_agent.restorer import Restorer
from drsm_agent.sessions import Sessions
from drsm_agent.snapshots import snapshot_owner
from drsm_sdk.wire import messages as m


class Requests:
    """The requests of one lead. `drsm.rpc.<verb>` is in `handlers`, `drsm.rpc.pool.<pool>.<verb>` in
    `pool_handlers`; but `snapshot` is answered in several messages, by `Endpoints` itself."""

    def __init__(
        self,
        reign: Reign,
        restorer: Restorer,
        mirrors: Mirrors,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._table, self._lead, self._use = reign.table, reign.lead, reign.use
        self._definitions, self.pool = reign.definitions, reign.pool
        self._sessions = sessions = Sessions(reign, restorer, tasks)
        self._allocations = allocations = Allocations(reign, restorer, sessions, mirrors, tasks)
        self.handlers: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Any]]]] = {
            "session.open": (m.Open, sessions.open),
            "session.join": (m.Join, sessions.join),
            "session.renew": (m.Renew, sessions.renew),
            "session.report": (m.Report, sessions.report),
            "session.chunks": (m.SessionRef, sessions.chunks),
            "session.close": (m.SessionRef, sessions.close),
            "pools": (m.Empty, self.pools),
        }
        self.pool_handlers: dict[str, tuple[type[Any], Callable[[PoolTable, Any], Awaitable[Any]]]] = {
            "acquire": (m.Acquire, allocations.acquire),
            "release": (m.ChunkList, allocations.release),
            "scanned": (m.ChunkList, allocations.scanned),
            "pods": (m.Empty, self.pods),
            "owner": (m.OwnerQuery, self.owner),
        }

    def note(self, entry: Entry) -> None:
        """What a change means to requests to come."""
        self._allocations.note(entry)
        self._sessions.note(entry)

    async def pods(self, pool: PoolTable, _: m.Empty) -> m.Pods:
        return m.Pods(tuple(self._pod_state(pool, owner) for owner in pool.owners().values()))

    async def owner(self, pool: PoolTable, request: m.OwnerQuery) -> m.OwnerAnswer:
        try:
            n = self._definitions[pool.name].chunk_of(request.id, request.space)
        except ValueError as error:
            raise Refused("bad_request", f"pool {pool.name}: {error}") from None
        chunk = pool.chunks.get(n) if n is not None else None
        if chunk is None:
            return m.OwnerAnswer(chunk=n, owner=None, marked=False)
        return m.OwnerAnswer(chunk=n, owner=snapshot_owner(pool, chunk.owner), marked=chunk.marked)

    async def pools(self, _: m.Empty) -> m.Pools:
        return m.Pools(
            pools=tuple(self._pool_state(pool) for pool in self._table.pools.values()),
            leader=m.LeaderState(self._lead.agent, self._lead.term, whole_ms(self._lead.age())),
        )

    def _pod_state(self, pool: PoolTable, owner: Owner) -> m.PodState:
        held = pool.held.get(owner.key)
        numbers = held.numbers if held else {}
        return m.PodState(
            pod=owner_ref(owner),
            state=pool.state(owner),
            chunks=len(numbers),
            marked=sum(n in pool.marked for n in numbers) if pool.marked else 0,
            use=None if owner.is_go else self._use.get(owner.key, {}).get(pool.name, m.Use()),
        )

    def _pool_state(self, pool: PoolTable) -> m.PoolState:
        definition = self._definitions[pool.name]
        return m.PoolState(
            definition=definition,
            chunks=len(pool.chunks),
            capacity=definition.usable,
            pods=len(pool.live),
            orphans=sum(1 for _ in pool.orphans()),
            marked=len(pool.marked),
        )
