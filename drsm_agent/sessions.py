"""Requests about sessions: open, join, renew, report, chunks, close; and whether an asker's session lives.

Whatever one of them writes is guarded, comes back through the change stream, is published, and only then
answered (G4). Requests of one moment share one bulk write (`Flight`). The first request of a session besides
makes it live, whatever it asks (`Sessions.living`).
"""

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from drsm_agent.core import writes
from drsm_agent.core.documents import DEAD, LIVE, OPENED, Session
from drsm_agent.core.events import DOWN
from drsm_agent.core.lease import holder_duration, renew_period, whole_ms
from drsm_agent.core.restore import TERMS_AHEAD
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.core.usage import asked_back
from drsm_agent.errors import Refused, StoreUnavailable
from drsm_agent.feed import Entry
from drsm_agent.flight import Flight
from drsm_agent.go_pods import go_knows_too_many
from drsm_agent.reign import Reign
from drsm_agent.restorer import Restorer
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition

AHEAD_MAX = 10_000
"""Incarnations of terms to come that are remembered: as many as there may be pods."""
AHEAD_SECONDS = 0.25
"""Renewals of one of them that are further apart than this are a living pod's; closer ones may be garbage
that came twice. Pods whose renewal failed try again much later than this."""
IN_DOUBT_MAX = 4096
"""Sessions whose insert was not answered that are remembered for when the request comes again, as many as
requests may be under way. It comes again within seconds, if at all."""

log = structlog.get_logger("drsm_agent.sessions")


class Sessions:
    """The sessions of one lead, as those see them who ask."""

    def __init__(self, reign: Reign, restorer: Restorer, tasks: asyncio.TaskGroup) -> None:
        self._table, self._pool, self._relay, self._lead = reign.table, reign.pool, reign.relay, reign.lead
        self._leases, self._liveness, self._definitions = reign.leases, reign.liveness, reign.definitions
        self._clock, self._metrics, self._use = reign.clock, reign.metrics, reign.use
        self._grants, self._restorer, self._hearing = reign.grants, restorer, reign.hearing
        self._ahead: dict[Key, float] = {}
        """When each incarnation of a term to come was first heard of."""
        self._usage_lag = max(pool.usage_lag_ms for pool in reign.definitions.values()) / 1000
        self._in_doubt: dict[tuple[str, str], Session] = {}
        """By pod and request: sessions whose insert was not answered."""
        self._opens: Flight[m.Open, Session] = Flight(tasks, self._open_all)
        self._activations: Flight[Key, None] = Flight(tasks, self._activate_all)
        self._joins: Flight[m.Join, None] = Flight(tasks, self._join_all)
        self._closes: Flight[Key, None] = Flight(tasks, self._close_all)
        self._put_backs: Flight[m.Report, None] = Flight(tasks, self._put_back_all)

    def note(self, entry: Entry) -> None:
        """Who is down uses nothing any more."""
        for event in entry.events:
            if event.kind == DOWN and event.owner:
                self._use.pop(event.owner.key, None)

    # --- Requests ----------------------------------------------------------------------------------

    async def open(self, request: m.Open) -> m.Opened:
        for pool in request.pools:
            self._pool(pool)
        session = self._table.opened_by(request.pod.name, request.request_id)
        if session is None:
            session = await self._opens.board((request.pod.name, request.request_id), request)
        if session.state == DEAD:
            raise _lost(session.reason)
        await self._promise(session)
        liveness_ms = self._extend(session.key)
        return m.Opened(
            incarnation=session.incarnation,
            definitions=self._defined(request.pools),
            liveness_ms=liveness_ms,
            allocation_ms=self._allocation_ms(session, agrees=False),
            renew_ms=whole_ms(self._renew_period()),
        )

    async def join(self, request: m.Join) -> m.Joined:
        for pool in request.pools:
            self._pool(pool)
        session = await self.living(request.pod, request.incarnation)
        if (count := len({*session.pools, *request.pools})) > m.POOLS_PER_SESSION_MAX:
            message = f"pools: expected at most {m.POOLS_PER_SESSION_MAX} of one session, found {count}"
            raise Refused("bad_request", f"{message}; join fewer, or define one pool with several spaces")
        if not set(request.pools) <= set(session.pools):
            await self._joins.board((session.key, request.pools), request)
        return m.Joined(self._defined(request.pools))

    async def renew(self, request: m.Renew) -> m.Renewed:
        if self._is_ahead(request.incarnation):
            self._note_ahead(request.pod, request.incarnation)
        session = await self.living(request.pod, request.incarnation)
        await self._promise(session)
        liveness_ms = self._extend(session.key)
        held = {pool: self._held(pool, session.key) for pool in session.pools if pool in self._table.pools}
        if use := {pool: use for pool, use in request.use.items() if pool in held}:
            self._use[session.key] = use
        said = {pool: chunks for pool, chunks in request.held.items() if self._restorer.counts(pool)}
        return m.Renewed(
            liveness_ms=liveness_ms,
            allocation_ms=self._allocation_ms(session, agrees=_agree(said, held)),
            renew_ms=whole_ms(self._renew_period()),
            held=held,
            give_back=self._asked_back(session),
        )

    async def chunks(self, request: m.SessionRef) -> m.SessionChunks:
        session = await self.living(request.pod, request.incarnation)
        self._restorer.check_reported(session)
        owned = self._table.chunks_of(session.key)
        answer = m.SessionChunks(
            chunks=tuple(
                (pool, chunk.n, chunk.grant, chunk.hold_ms if chunk.marked else None) for pool, chunk in owned
            ),
            version={p: self._table.pools[p].version for p in session.pools if p in self._table.pools},
        )
        await self._relay.caught_up()  # only what was published counts
        return answer

    async def close(self, request: m.SessionRef) -> m.Empty:
        """Accepted of a dead or unknown incarnation too; it then changes nothing."""
        session = self._table.sessions.get((request.pod, request.incarnation))
        if session and session.state != DEAD:
            self._liveness.end([session.key], "closed")
            await self._closes.board(session.key, session.key)
        return m.Empty()

    async def report(self, request: m.Report) -> m.Reported:
        """A pod saw another history and says what it holds. Only an announced restore takes any of it; then
        a session that the database has lost is put back first."""
        if self._restorer.lost(request):
            await self._put_backs.board((request.pod, request.incarnation), request)
        session = await self.living(request.pod, request.incarnation)
        if not self._restorer.takes(session):
            return m.Reported(accepted=0)
        reported = {pool for pool, *_ in request.chunks if pool in self._table.pools}
        if missing := tuple(sorted(reported - set(session.pools))):
            join = m.Join(request.pod, request.incarnation, missing)
            await self._joins.board((session.key, missing), join)
        return m.Reported(await self._restorer.report(session.key, request))

    # --- Who asks ----------------------------------------------------------------------------------

    async def living(self, pod: str, incarnation: int) -> Session:
        """The session of a request, made live if this is its first one. Raises Refused: session_lost."""
        session = self.session(pod, incarnation)
        if session.state == OPENED:
            await self._activations.board(session.key, session.key)
            session = self.session(pod, incarnation)
            if session.state != LIVE:
                raise _unknown_outcome("activation")
        return session

    def session(self, pod: str, incarnation: int) -> Session:
        """The session of a request, live or still to be. Raises Refused: session_lost."""
        session = self._table.sessions.get((pod, incarnation))
        if session is None:
            self._check_term(incarnation)
            raise _lost("unknown")
        if session.state == DEAD:
            raise _lost(session.reason)
        if reason := self._liveness.ending(session.key):
            raise _lost(reason)
        return session

    async def member(self, pool: PoolTable, pod: str, incarnation: int) -> Session:
        """The living session of a request about `pool`. Raises Refused: session_lost, not_joined."""
        session = await self.living(pod, incarnation)
        if pool.name not in session.pools:
            raise Refused(
                "not_joined", f"the session has not joined pool {pool.name}; send session.join first"
            )
        return session

    def _check_term(self, incarnation: int) -> None:
        """No verdict on a session of a term that is still to come: the database went back."""
        if self._is_ahead(incarnation):
            message = "this session is newer than the database: was it restored? Run `drsm-agent restored`"
            raise Refused("store_unavailable", message, reason="went_back", retry=True)

    def _is_ahead(self, incarnation: int) -> bool:
        return self._lead.term < incarnation >> 32 <= self._lead.term + TERMS_AHEAD

    def _note_ahead(self, pod: str, incarnation: int) -> None:
        """Pods that renew sessions of a term that is still to come show a restore that nobody announced.

        Nothing is granted or claimed then, until such pods have certainly stopped. A living pod renews again
        and again; what is said only once, or all at once, is garbage. (Whoever may send requests may pretend
        this; NATS permissions say who may.)"""
        now = self._clock()
        first = self._ahead.get((pod, incarnation))
        if first is not None and now - first > AHEAD_SECONDS:
            if self._grants.left() <= 0:
                log.critical(
                    "database_went_back",
                    pod=pod,
                    its_term=incarnation >> 32,
                    term=self._lead.term,
                    action="nothing is granted or claimed; if the database was restored from a backup, stop "
                    "all agents, run `drsm-agent restored`, and start them again",
                )
            self._grants.put_off(self._restorer.longest_ms / 1000 + self._usage_lag)
        elif first is None and len(self._ahead) < AHEAD_MAX:
            self._ahead[(pod, incarnation)] = now

    # --- Flights: one bulk write for all that wait -------------------------------------------------

    async def _open_all(self, opening: Sequence[m.Open]) -> Sequence[Session | Exception]:
        await self._relay.read_back()
        sessions = [self._decided(request) for request in opening]
        new = [session for session in sessions if session.key not in self._table.sessions]
        if new:
            self._in_doubt |= {(session.pod, session.request_id): session for session in new}
            while len(self._in_doubt) > IN_DOUBT_MAX:
                del self._in_doubt[next(iter(self._in_doubt))]
            await self._relay.commit([writes.open_session(session) for session in new])
            for session in new:
                self._in_doubt.pop((session.pod, session.request_id), None)
        for session in new:
            log.info(
                "session_opened",
                pod=session.pod,
                incarnation=session.incarnation,
                ip=session.ip,
                instance=session.instance,
            )
        return [self._table.sessions.get(session.key) or _unknown_outcome("open") for session in sessions]

    def _decided(self, request: m.Open) -> Session:
        """What this request has opened or opens. The write of a try before may yet take effect, after it was
        looked for: the same is decided again, and it does no harm."""
        of = request.pod.name, request.request_id
        doubted = self._in_doubt.pop(of, None)
        return self._table.opened_by(*of) or doubted or self._new_session(request)

    def _new_session(self, request: m.Open) -> Session:
        return Session(
            pod=request.pod.name,
            ip=request.pod.ip,
            instance=request.pod.instance,
            incarnation=self._lead.next_incarnation(),
            term=self._lead.term,
            state=OPENED,
            pools=tuple(dict.fromkeys(request.pools)),
            request_id=request.request_id,
            promised_ms=whole_ms(self._leases.allocation),
        )

    async def _activate_all(self, keys: Sequence[Key]) -> Sequence[Exception | None]:
        """First requests: these incarnations live from now on, and supersede lower ones of their names."""
        newest = dict(sorted(keys))
        older = [
            session
            for session in self._table.alive()
            if session.pod in newest and session.incarnation < newest[session.pod]
        ]
        self._liveness.end([session.key for session in older], "superseded")
        for session in older:
            log.warning(
                "session_superseded", pod=session.pod, incarnation=session.incarnation, by=newest[session.pod]
            )
        term = self._lead.term
        await self._relay.commit(
            [writes.activate(pod, incarnation, term) for pod, incarnation in keys]
            + [writes.end_session(*session.key, "superseded", term) for session in older],
            lambda: all(self._state_of(key) in {LIVE, DEAD} for key in keys),
        )
        self._metrics.deaths.labels(reason="superseded").inc(len(older))
        return [None] * len(keys)

    def _state_of(self, key: Key) -> str:
        session = self._table.sessions.get(key)
        return session.state if session else DEAD

    async def _join_all(self, joining: Sequence[m.Join]) -> Sequence[Exception | None]:
        term = self._lead.term
        await self._relay.commit(
            [writes.join(j.pod, j.incarnation, j.pools, term) for j in joining],
            lambda: all(self._has_joined(request) for request in joining),
        )
        return [None] * len(joining)

    def _has_joined(self, request: m.Join) -> bool:
        session = self._table.sessions.get((request.pod, request.incarnation))
        return session is None or set(request.pools) <= set(session.pools)

    async def _close_all(self, keys: Sequence[Key]) -> Sequence[Exception | None]:
        await self._relay.commit([writes.end_session(*key, "closed", self._lead.term) for key in keys])
        self._metrics.deaths.labels(reason="closed").inc(len(keys))
        for pod, incarnation in keys:
            log.info("session_closed", pod=pod, incarnation=incarnation)
        return [None] * len(keys)

    async def _put_back_all(self, reports: Sequence[m.Report]) -> Sequence[Exception | None]:
        await self._relay.read_back()
        refused = {(r.pod, r.incarnation): self._superseded(r) for r in reports}
        new = [r for r in reports if not refused[r.pod, r.incarnation] and self._restorer.lost(r)]
        if new:
            await self._relay.commit([writes.open_session(self._lost_session(report)) for report in new])
        for report in new:
            log.warning("session_put_back", pod=report.pod, incarnation=report.incarnation)
        return [refused[report.pod, report.incarnation] for report in reports]

    def _superseded(self, report: m.Report) -> Exception | None:
        """A newer incarnation of the name lives already: this one is over, whatever the database lost."""
        newer = any(
            session.pod == report.pod and session.incarnation > report.incarnation and session.state != OPENED
            for session in self._table.sessions.values()
        )
        return _lost("superseded") if newer else None

    def _lost_session(self, report: m.Report) -> Session:
        return Session(
            pod=report.pod,
            ip=report.ip,
            instance=report.instance,
            incarnation=report.incarnation,
            term=self._lead.term,
            state=OPENED,
            pools=tuple(pool for pool in dict.fromkeys(report.pools) if pool in self._table.pools),
            request_id=f"lost-{report.incarnation}",
            promised_ms=self._restorer.longest_ms,
        )

    # --- What an answer promises -------------------------------------------------------------------

    async def _promise(self, session: Session) -> None:
        """Record a larger `A` than this session was promised so far, before the answer that promises it."""
        promised_ms = whole_ms(self._leases.allocation)
        if session.promised_ms < promised_ms:
            await self._relay.commit([writes.promise(*session.key, promised_ms, self._lead.term)])

    def _extend(self, key: Key) -> int:
        """Start the liveness lease anew, before the answer that promises it leaves (rule R2); returns what
        the answer may promise, in milliseconds."""
        self._hearing.heard()
        pods = len(self._liveness) + (key not in self._liveness)  # as the renewal period counts them
        lease = self._leases.effective_liveness(pods)
        if not self._liveness.extend(key, self._clock() + lease):
            raise _lost(self._liveness.ending(key) or "expired")
        return whole_ms(holder_duration(lease))

    def _allocation_ms(self, session: Session, *, agrees: bool) -> int:
        """The allocation lease that an answer may promise; none, for now, to a session from before a restore
        that may hold what the database gives to others."""
        if not self._restorer.may_issue(session, agrees=agrees):
            return 0
        return whole_ms(holder_duration(self._leases.allocation))

    def _renew_period(self) -> float:
        return renew_period(len(self._liveness))

    def _asked_back(self, session: Session) -> dict[str, int]:
        """How many empty chunks of each pool a pod is asked for, as the pool runs out."""
        asked = {}
        for name, use in self._use.get(session.key, {}).items():
            pool, definition = self._table.pools[name], self._definitions[name]
            usable = definition.usable
            if go_knows_too_many(pool, definition.capacity):
                usable = len(pool.chunks) + len(pool.known_free)
            free_ids = use.free if usable else 0
            count = asked_back(usable, len(pool.chunks), free_ids, definition.ids_per_chunk)
            if count:
                asked[name] = count
        return asked

    def _held(self, pool: str, key: Key) -> tuple[int, int]:
        held = self._table.pools[pool].held.get(key)
        return (len(held.numbers), held.checksum) if held else (0, 0)

    def _defined(self, pools: Sequence[str]) -> tuple[Definition, ...]:
        return tuple(self._definitions[pool] for pool in pools)


def _agree(said: Mapping[str, tuple[int, int]], seen: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a pod holds just what the table gives it; of a pool that is not named it holds nothing."""
    return all(said.get(pool, (0, 0)) == seen.get(pool, (0, 0)) for pool in said.keys() | seen.keys())


def _lost(reason: str) -> Refused:
    return Refused(
        "session_lost", f"this incarnation's session is over ({reason}); open a new one", reason=reason
    )


def _unknown_outcome(what: str) -> StoreUnavailable:
    return StoreUnavailable(f"the {what} was written but is not in the table")
