"""Keepalive mirrors: what Go DRSM pods on the same collection see of our sessions.

A mirror follows its session and never decides anything: `expireAt` is kept far ahead, a missing one
is inserted again (the TTL monitor takes it when no agent ran for long), and it is deleted last, when
no chunk names the incarnation and nobody may still issue from one (rule R5).
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime

import structlog

from drsm_agent.core import writes
from drsm_agent.core.documents import DEAD, GO_INCARNATION, Keepalive, Owner
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import StoreUnavailable
from drsm_agent.reign import Reign

LEASES_AHEAD = 3
"""`expireAt` is set three `A` ahead every half `A`, so it is never less than two ahead."""
CHECK_INTERVAL = 5.0
"""How long a new pod may lack its mirror; a Go pod looks at other pods' keepalives no more often."""

log = structlog.get_logger("drsm_agent.mirrors")


class Mirrors:
    """Keeps the mirrors of one lead's sessions, with one bulk write per pool and round."""

    def __init__(self, reign: Reign) -> None:
        self._table, self._relay, self._leases = reign.table, reign.relay, reign.leases
        self._definitions, self._clock, self._wall_clock = reign.definitions, reign.clock, reign.wall_clock
        self._over_since: dict[tuple[str, str, int], float] = {}
        self._prolonged_at = float("-inf")

    async def run(self) -> None:
        while True:
            try:
                await self._round()
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))
            await asyncio.sleep(CHECK_INTERVAL)

    async def _round(self) -> None:
        now = self._clock()
        prolong = now - self._prolonged_at >= self._leases.allocation / 2
        ahead = self._wall_clock() + LEASES_AHEAD * self._leases.allocation
        expire_at = datetime.fromtimestamp(ahead, tz=UTC)
        for pool in self._table.pools.values():
            decided = [*self._living(pool, expire_at, prolong=prolong), *self._over(pool, now)]
            if decided:
                await self._relay.write_unseen(decided)
        if prolong:
            self._prolonged_at = now

    def _living(self, pool: PoolTable, expire_at: datetime, *, prolong: bool) -> Iterator[writes.Write]:
        for owner in pool.live.values():
            if owner.incarnation == GO_INCARNATION:
                continue
            mirror = pool.keepalives.get(owner.name)
            shown = _mirrored(mirror) if mirror else None
            if mirror is None:
                yield writes.mirror_keepalive(pool.name, owner, expire_at)
            elif shown and shown.incarnation < owner.incarnation:
                yield writes.hand_over_mirror(pool.name, shown, owner, expire_at)
            elif prolong and shown == owner:
                yield writes.prolong_mirror(pool.name, owner, expire_at)

    def _over(self, pool: PoolTable, now: float) -> Iterator[writes.Write]:
        alive = {owner.name for owner in pool.live.values()}  # the newer incarnation takes the place
        for mirror in pool.keepalives.values():
            owner = _mirrored(mirror)
            if owner is None or owner.name in alive or owner.key in pool.held:
                continue
            since = self._over_since.setdefault((pool.name, *owner.key), now)
            if now - since >= self._patience(pool, owner):
                self._over_since.pop((pool.name, *owner.key))
                yield writes.delete_mirror(pool.name, owner)

    def _patience(self, pool: PoolTable, owner: Owner) -> float:
        """`A + W` for a dead session; one that is not dead, but not live either, keeps its mirror."""
        session = self._table.sessions.get(owner.key)
        if session and session.state != DEAD:
            return float("inf")
        promised_ms = session.promised_ms if session else round(self._leases.allocation * 1000)
        return (promised_ms + self._definitions[pool.name].usage_lag_ms) / 1000


def _mirrored(keepalive: Keepalive) -> Owner | None:
    """The incarnation that a keepalive mirrors; None for a Go pod's own."""
    if keepalive.drsm is None or keepalive.go_owner is not None:
        return None
    drsm = keepalive.drsm
    return Owner(drsm.pod, drsm.ip, drsm.instance, drsm.incarnation)
