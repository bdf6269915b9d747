"""Deaths and claims: sleeps to the next deadline, then ends sessions and moves their chunks.

Death comes in steps, each one guarded write, in this order (rule R5): the session's document says
dead; each of its chunks is claimed; last, when nobody may issue from them any more, its keepalive mirror
goes (`mirrors`). Orphans are found from the table's state, at every chunk event, at
the start and by a slow audit, not only at the moment of death.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import structlog

from drsm_agent.core import writes
from drsm_agent.core.documents import DEAD, Chunk, Owner, Session
from drsm_agent.core.lease import renew_period
from drsm_agent.core.placement import Placed, hold_ms, plan
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import StoreUnavailable
from drsm_agent.feed import Entry
from drsm_agent.mirrors import Mirrors
from drsm_agent.probe import Probe
from drsm_agent.reign import Reign

WRITES_MAX = 1000
"""Claims of one bulk write; a death of more chunks takes several."""
AUDIT_INTERVAL = 10.0
"""The slow audit: what no event announced, and what a failed write left."""
PURGE_AFTER = 3600.0
"""A dead session's document is kept this long beyond `A + W`, for people who look for a reason."""
RETRY_DELAY = 0.5
MASS_EXPIRY_MIN, MASS_EXPIRY_SHARE = 2, 0.3
"""More than two and more than 30 % of all sessions within one renewal period: rather our fault than
theirs (Eureka's self-preservation draws a similar line)."""

log = structlog.get_logger("drsm_agent.reaper")
T = TypeVar("T")


class Reaper:
    """Ends sessions, claims orphans and purges what is left, for one reign."""

    def __init__(self, reign: Reign, probe: Probe, mirrors: Mirrors) -> None:
        self._table, self._relay, self._lead = reign.table, reign.relay, reign.lead
        self._leases, self._liveness, self._definitions = reign.leases, reign.liveness, reign.definitions
        self._clock, self._chance, self._metrics = reign.clock, reign.chance, reign.metrics
        self._go_hold_ms = round(reign.go.hold * 1000)
        self._grants, self._probe = reign.grants, probe
        self._mirrors, self._go_pods = mirrors, mirrors.go_pods
        self._news = asyncio.Event()
        self._dead_since: dict[Key, float] = {}
        self._spared_at = float("-inf")
        self._blind = False

    def note(self, entry: Entry) -> None:
        """Something changed: look again."""
        if entry.events:
            self._news.set()

    async def run(self) -> None:
        while True:
            self._go_pods.note_health()
            try:
                await self._expire_due()
                await self._claim_orphans()
                await self._purge()
                await self._go_pods.look()
                wait = self._until_next()
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))
                wait = RETRY_DELAY
            try:
                async with asyncio.timeout(wait):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    def _until_next(self) -> float:
        """Seconds to sleep: to the next lease that may lapse, at most one audit interval."""
        now = self._clock()
        times = (
            self._liveness.next_deadline(),
            self._liveness.next_lapse(now),
            self._go_pods.next_look(),
        )
        waits = [at - now for at in times if at is not None]
        return min([AUDIT_INTERVAL, *(wait if wait > 0 else self._probe.period for wait in waits)])

    # --- Step one: sessions -----------------------------------------------------------------------

    async def _expire_due(self) -> None:
        now = self._clock()
        self._adopt(now)
        due = self._judged(now)
        self._liveness.end(due, "expired")
        for pod, incarnation in due:
            log.warning("session_expired", pod=pod, incarnation=incarnation)
        self._metrics.deaths.labels(reason="expired").inc(len(due))
        for batch in _batches(self._undone()):
            term = self._lead.term
            await self._relay.commit([writes.end_session(*key, reason, term) for key, reason in batch])

    def _judged(self, now: float) -> list[Key]:
        """Sessions to expire. Nobody while this leader cannot hear itself, nor right after: then, and when
        many would go at once, everyone gets one more full `L`, once (rule R7)."""
        due = self._liveness.due(now)
        if not self._probe.healthy(now):
            if due and not self._blind:
                log.warning("not_judging", due=len(due), reason="no request to myself came back lately")
            self._blind = bool(due)
            return []
        self._blind = False
        pods = len(self._liveness)
        lease = self._leases.effective_liveness(pods)
        soon = len(self._liveness.due(now + renew_period(pods))) if due else 0
        many = soon > max(MASS_EXPIRY_MIN, MASS_EXPIRY_SHARE * pods)
        recovered = self._probe.recovered()
        if recovered or (many and now - self._spared_at > 2 * lease):
            log.warning("sparing", due=soon, reason="was cut off" if recovered else "many at once")
            self._liveness.extend_all(now + lease)
            self._spared_at = now
            return []
        return due

    def _adopt(self, now: float) -> None:
        """A session that nobody has a lease for came of a write whose outcome was unknown: it gets one."""
        for session in self._table.alive():
            if session.key not in self._liveness and not self._liveness.ending(session.key):
                pods = len(self._liveness)
                self._liveness.extend(session.key, now + self._leases.effective_liveness(pods))

    def _undone(self) -> list[tuple[Key, str]]:
        """Sessions whose end was decided but is not yet written."""
        return [
            (key, reason)
            for key, reason in self._liveness.ended().items()
            if (session := self._table.sessions.get(key)) and session.state != DEAD
        ]

    # --- Step two: chunks -------------------------------------------------------------------------

    async def _claim_orphans(self) -> None:
        if not self._grants.allowed():
            return
        for pool in self._table.pools.values():
            orphans = self._claimable(pool)
            if not orphans:  # as a rule; counting what each living pod owns would cost the most here
                continue
            living = self._living(pool)
            await self._mirrors.ensure(pool, [owner for owner in living if not owner.is_go])
            placed = plan(orphans, {o: n for o, n in living.items() if self._mirrors.may_receive(pool, o)})
            placed.sort(key=lambda claim: claim.owner)  # then its neighbours go out as one event
            for batch in _batches(placed):
                outcome = await self._relay.commit([self._claim(pool, claim) for claim in batch])
                self._metrics.claims.inc(outcome.changed)
                by = dict(Counter(claim.owner.name for claim in batch))
                log.info("claimed", pool=pool.name, chunks=outcome.changed, by=by)

    def _claimable(self, pool: PoolTable) -> list[Chunk]:
        """Not what lies outside of the pool, where a Go pod may have put it: no SDK pod takes that up."""
        if all(owner.is_go for owner in pool.live.values()):  # nobody could claim them
            return []
        capacity = self._definitions[pool.name].capacity
        claimable: list[Chunk] = []
        for key, held in pool.held.items():
            if key not in pool.live and self._may_claim(pool, pool.chunks[next(iter(held.numbers))].owner):
                claimable += (pool.chunks[n] for n in held.numbers if n < capacity)
        return claimable

    def _may_claim(self, pool: PoolTable, former: Owner) -> bool:
        """Whether the owner's death is final, and nobody may still be routed to it for good reason."""
        now = self._clock()
        if former.is_go:
            return self._go_pods.is_silent(pool.name, former.name)
        session = self._table.sessions.get(former.key)
        if session is None:
            return True
        if session.state != DEAD:
            return False
        return session.reason != "superseded" or self._liveness.lapsed(former.key, now)

    def _living(self, pool: PoolTable) -> dict[Owner, int]:
        """Pods that may claim, with the number of chunks that each owns."""
        return {
            owner: len(pool.held[key].numbers) if key in pool.held else 0
            for key, owner in pool.live.items()
            if not self._liveness.ending(key)
        }

    def _claim(self, pool: PoolTable, claim: Placed) -> writes.Update:
        drsm = claim.orphan.drsm
        former = self._table.sessions.get(drsm.owner.key) if drsm else None
        usage_lag = self._definitions[pool.name].usage_lag_ms
        allocation_ms = round(self._leases.allocation * 1000)
        hold, grant = (
            hold_ms(claim.orphan, former, allocation_ms, usage_lag, self._go_hold_ms),
            self._chance.token(),
        )
        if self._go_pods.may_live(pool, claim.orphan):
            hold = max(hold, self._go_hold_ms)
        self._go_pods.claiming(pool.name, claim.orphan, grant)
        return writes.claim(pool.name, claim.orphan, claim.owner, grant, hold)

    # --- Last: what is left of the dead ---------------------------------------------------------------

    async def _purge(self) -> None:
        over = [
            session
            for session in self._table.sessions.values()
            if session.state == DEAD
            and self._dead_for(session) >= PURGE_AFTER + self._after(session)
            and not self._table.chunks_of(session.key)
        ]
        for batch in _batches(over):
            await self._relay.commit([writes.purge_session(*s.key, self._lead.term) for s in batch])
            for session in batch:
                self._liveness.forget(session.key)
                self._dead_since.pop(session.key, None)

    def _dead_for(self, session: Session) -> float:
        """Seconds since this leader first saw the session dead."""
        now = self._clock()
        return now - self._dead_since.setdefault(session.key, now)

    def _after(self, session: Session) -> float:
        """`A + W`, in seconds, for a session's largest `A` and the largest `W` of its pools."""
        lags = [self._definitions[p].usage_lag_ms for p in session.pools if p in self._definitions]
        return (session.promised_ms + max(lags, default=0)) / 1000


def _batches(items: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), WRITES_MAX):
        yield items[start : start + WRITES_MAX]
