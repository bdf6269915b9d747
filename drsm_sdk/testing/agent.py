"""What an agent knows and says, in memory: one table per pool, requests in, answers and events out.

It speaks the wire protocol in its true bytes, and does what `docs/protocol.md` says that an agent does, as
far as one process can see it. No connection and no task of its own: whoever drives it hands it
requests (`serve`), calls `settle` after each and now and then, and `confirm` every two seconds.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from drsm_sdk.ambient import Chance, Clock
from drsm_sdk.testing.tables import Row, Session, Table
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.checksum import MODULUS, holding, ownership
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import OwnerRef
from drsm_sdk.wire.subjects import Route, Subjects

Publish = Callable[[str, bytes, Mapping[str, str]], None]
Packed = tuple[bytes, dict[str, str]]
"""The bytes of a message and its headers."""


class Refused(Exception):
    """An error answer."""

    def __init__(self, error: str, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.failure = wire.Failure(error, message, reason)


@dataclass(frozen=True, slots=True)
class Timing:
    """The agent's durations in seconds. `hold` stands for `A + W`, whatever `allocation` is."""

    hold: float
    liveness: float
    allocation: float
    renew: float

    @property
    def answered(self) -> tuple[int, int, int]:
        """Liveness, allocation and renewal in milliseconds, as answers carry them. Not shortened as the real
        agent does: here both sides read one clock."""
        return _ms(self.liveness), _ms(self.allocation), _ms(self.renew)


class Agent:
    """The leader of a domain in memory, once it was told to `lead`. `ended` says of each session that is over
    why; times are seconds of `clock`."""

    def __init__(
        self,
        subjects: Subjects,
        definitions: Iterable[Definition],
        publish: Publish,
        *,
        timing: Timing,
        clock: Clock,
        chance: Chance,
    ) -> None:
        self.subjects, self.timing = subjects, timing
        self.stamp = wire.Stamp("stand-in", 0, chance.token())
        self.tables = {one.name: Table(one, one.capacity) for one in definitions}
        self.sessions: dict[int, Session] = {}
        self.ended: dict[int, str] = {}
        self._publish, self._clock, self._chance = publish, clock, chance
        self._opened_by: dict[tuple[str, str], int] = {}
        self._lead_since = clock()
        self._session_handlers: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
            "session.open": (wire.Open, self.open),
            "session.join": (wire.Join, self.join),
            "session.renew": (wire.Renew, self.renew),
            "session.report": (wire.Report, self.report),
            "session.chunks": (wire.SessionRef, self.chunks_of),
            "session.close": (wire.SessionRef, self.close),
            "pools": (wire.Empty, self.pools),
            "probe": (wire.Probe, lambda probe: probe),
        }
        self._pool_handlers: dict[str, tuple[type[Any], Callable[[Table, Any], Any]]] = {
            "acquire": (wire.Acquire, self.acquire),
            "release": (wire.ChunkList, self.release),
            "scanned": (wire.ChunkList, self.scanned),
            "snapshot": (wire.Empty, lambda table, _: self.snapshot(table)),
            "pods": (wire.Empty, self.pods),
            "owner": (wire.OwnerQuery, self.owner),
        }

    # --- bytes ----------------------------------------------------------------------------------

    def serve(self, subject: str, data: bytes) -> list[Packed]:
        """The answer to a request; none on a subject that the protocol does not know."""
        route = self.subjects.route(subject)
        if route is None:
            return []
        try:
            if len(data) > codec.REQUEST_BYTES_MAX:
                raise Refused("too_large", f"a request has at most {codec.REQUEST_BYTES_MAX} bytes")
            answer = self.answer(route, codec.decode(data))
        except Refused as refused:
            answer = refused.failure
        except codec.DecodeError as error:
            answer = wire.Failure("bad_request", str(error))
        return [self.packed(part) for part in (answer if isinstance(answer, list) else [answer])]

    def answer(self, route: Route, body: Mapping[str, Any]) -> Any:
        """The message that answers a request, or several in a list. Raises Refused and DecodeError."""
        if route.pool is None:
            kind, handler = self._session_handlers[route.verb]
            return handler(codec.from_map(kind, body))
        table = self._table(route.pool)
        kind, pool_handler = self._pool_handlers[route.verb]
        return pool_handler(table, codec.from_map(kind, body))

    def packed(self, part: Any) -> Packed:
        """One message of an answer, with the stamp of who said it."""
        headers = {wire.CONTENT_TYPE_HEADER: wire.CONTENT_TYPE}
        if isinstance(part, wire.Failure):
            said = part.message.encode("ascii", "replace").decode()[:200]
            headers |= {wire.ERROR_CODE_HEADER: str(part.code), wire.ERROR_HEADER: said}
        return codec.encode(codec.to_map(part) | codec.to_map(self.stamp)), headers

    # --- requests about sessions ----------------------------------------------------------------

    def open(self, request: wire.Open) -> wire.Opened:
        definitions = self._defined(request.pools)
        key = (request.pod.name, request.request_id)
        incarnation = self._opened_by.get(key)
        if incarnation is None:
            incarnation = self._opened_by[key] = self.stamp.term << 32 | len(self.sessions) + 1
            pod = request.pod
            owner = OwnerRef(pod.name, pod.ip, pod.instance, incarnation)
            self.sessions[incarnation] = Session(owner, dict.fromkeys(request.pools), self._lease())
        self._session(request.pod.name, incarnation).until = self._lease()
        return wire.Opened(incarnation, definitions, *self.timing.answered)

    def join(self, request: wire.Join) -> wire.Joined:
        definitions = self._defined(request.pools)
        session = self._living(request.pod, request.incarnation)
        if (count := len({*session.pools, *request.pools})) > wire.POOLS_PER_SESSION_MAX:
            most = wire.POOLS_PER_SESSION_MAX
            raise Refused("bad_request", f"pools: expected at most {most} of one session, found {count}")
        for pool in request.pools:
            if pool not in session.pools:
                session.pools[pool] = None
                self._up(session, pool)
        return wire.Joined(definitions)

    def renew(self, request: wire.Renew) -> wire.Renewed:
        session = self._living(request.pod, request.incarnation)
        session.until = self._lease()
        session.use = {pool: use for pool, use in request.use.items() if pool in session.pools}
        return wire.Renewed(
            *self.timing.answered, {pool: self._held(session, pool) for pool in session.pools}
        )

    def report(self, request: wire.Report) -> wire.Reported:
        """Only an announced restore takes any of it, and there is none here."""
        self._living(request.pod, request.incarnation)
        return wire.Reported(accepted=0)

    def chunks_of(self, request: wire.SessionRef) -> wire.SessionChunks:
        session = self._living(request.pod, request.incarnation)
        tables = [self.tables[pool] for pool in session.pools]
        return wire.SessionChunks(
            tuple(
                (table.name, n, row.grant, row.hold_ms)
                for table in tables
                for n, row in table.owned(session.owner).items()
            ),
            {table.name: (table.version, 0) for table in tables},
        )

    def close(self, request: wire.SessionRef) -> wire.Empty:
        """Accepted of a dead or unknown incarnation too; it then changes nothing."""
        session = self.sessions.get(request.incarnation)
        if session is not None and session.owner.name == request.pod:
            self.end(session, "closed")
        return wire.Empty()

    # --- requests about a pool ------------------------------------------------------------------

    def acquire(self, table: Table, request: wire.Acquire) -> wire.Acquired:
        owner = self._member(table, request.pod, request.incarnation).owner
        owned = table.owned(owner).items()
        numbers = [n for n, row in owned if row.request_id == request.request_id] or table.free(request.count)
        if not numbers:
            level = f"{len(table.rows)} of {table.definition.usable} owned"
            raise Refused("pool_exhausted", f"not one chunk of pool {table.name} is free: {level}")
        if numbers[0] not in table.rows:
            self.allocate(table, owner, numbers, request.request_id)
        granted = tuple((n, table.rows[n].grant) for n in numbers)
        return wire.Acquired(granted, (table.version, 0), table.definition.revision)

    def release(self, table: Table, request: wire.ChunkList) -> wire.Released:
        owner = self._member(table, request.pod, request.incarnation).owner
        found = table.match(owner, request.chunks)
        marked = {n for n, row in found.items() if row.hold_ms is not None}
        taken = [n for n in found if n not in marked]
        for n in taken:
            table.release(n)
        if taken:
            self.announce(table, wire.ChunkReleased(owner, tuple(taken)))
        return wire.Released(tuple(n for n, _ in request.chunks if n not in marked))

    def scanned(self, table: Table, request: wire.ChunkList) -> wire.Cleared:
        owner = self._member(table, request.pod, request.incarnation).owner
        found = table.match(owner, request.chunks)
        marked = [n for n, row in found.items() if row.hold_ms is not None]
        for n in marked:
            found[n].hold_ms = None
        if marked:
            self.announce(table, wire.ChunkScanned(owner, tuple(marked)))
        return wire.Cleared(tuple(found))

    def snapshot(self, table: Table) -> list[wire.SnapshotPage | wire.SnapshotEnd]:
        """The whole table as one page, for nothing here limits its size; and the end."""
        owners = table.owners()
        held = [(i, tuple(table.owned(owner))) for i, owner in enumerate(owners)]
        page = wire.SnapshotPage(
            version=(table.version, 0),
            page=0,
            owners=tuple(self._shown(table, owner) for owner in owners),
            chunks=tuple((i, numbers) for i, numbers in held if numbers),
            marked=tuple(n for n, row in table.rows.items() if row.hold_ms is not None),
            definition=table.definition,
            last=True,
        )
        return [page, wire.SnapshotEnd(page.version, 1)]

    def pods(self, table: Table, _: wire.Empty) -> wire.Pods:
        return wire.Pods(tuple(self._pod_state(table, owner) for owner in table.owners()))

    def owner(self, table: Table, request: wire.OwnerQuery) -> wire.OwnerAnswer:
        try:
            n = table.definition.chunk_of(request.id, request.space)
        except ValueError as error:
            raise Refused("bad_request", f"pool {table.name}: {error}") from None
        row = table.rows.get(n) if n is not None else None
        if row is None:
            return wire.OwnerAnswer(n, None, marked=False)
        return wire.OwnerAnswer(n, self._shown(table, row.owner), marked=row.hold_ms is not None)

    def pools(self, _: wire.Empty) -> wire.Pools:
        since = _ms(self._clock() - self._lead_since)
        return wire.Pools(
            tuple(self._pool_state(table) for table in self.tables.values()),
            wire.LeaderState(self.stamp.agent, self.stamp.term, since),
        )

    # --- what happens ---------------------------------------------------------------------------

    def lead(self) -> None:
        """As if another agent led from now on: a higher term, and everybody gets a full lease."""
        self.stamp = replace(self.stamp, term=self.stamp.term + 1)
        self._lead_since = self._clock()
        self.spare()

    def spare(self) -> None:
        """Every session gets a full lease: nobody could have renewed of late."""
        for session in self.alive():
            session.until = self._lease()

    def settle(self) -> None:
        """End the sessions that were silent for too long, and have orphans claimed."""
        now = self._clock()
        for session in self.alive():
            if session.until <= now:
                self.end(session, "expired")
        for table in self.tables.values():
            self._claim_orphans(table, now)

    def confirm(self) -> None:
        """Publish what the tables are: `sync`."""
        for table in self.tables.values():
            rows = table.rows.items()
            said = sum(ownership(n, row.owner.name, row.owner.incarnation) for n, row in rows)
            sync = wire.Sync(len(table.live), len(table.rows), said % MODULUS, table.definition.revision)
            self._send(table, sync, prev=table.version)

    def alive(self, name: str | None = None) -> list[Session]:
        """Sessions that are not over; all, or those of one pod name."""
        return [
            session
            for incarnation, session in self.sessions.items()
            if incarnation not in self.ended and name in {None, session.owner.name}
        ]

    def end(self, session: Session, reason: str) -> None:
        """A session is over. Its chunks are claimed by the next `settle`."""
        owner = session.owner
        if owner.incarnation in self.ended:
            return
        self.ended[owner.incarnation] = reason
        for pool in session.pools:
            table = self.tables[pool]
            if owner in table.live:
                del table.live[owner]
                self.announce(table, wire.PodDown(owner, reason))

    def allocate(self, table: Table, owner: OwnerRef, numbers: Sequence[int], request_id: str = "") -> None:
        """Grant free chunks."""
        for n in numbers:
            table.rows[n] = Row(owner, self._chance.token(), request_id=request_id)
        self.announce(table, wire.ChunkAllocated(owner, tuple(numbers)))

    def claim(self, table: Table, owner: OwnerRef, numbers: Sequence[int], hold_ms: int) -> None:
        """Move chunks of one former owner to another: with new grants, marked."""
        previous = table.rows[numbers[0]].owner
        for start in range(0, len(numbers), wire.CHUNKS_PER_EVENT):
            part = numbers[start : start + wire.CHUNKS_PER_EVENT]
            grants = tuple(self._chance.token() for _ in part)
            for n, grant in zip(part, grants, strict=True):
                table.rows[n] = Row(owner, grant, hold_ms)
            self.announce(table, wire.ChunkClaimed(owner, previous, tuple(part), grants, hold_ms))

    def announce(self, table: Table, body: wire.EventBody) -> None:
        """Publish a change that was just made, as the pool's next version."""
        if not isinstance(body, wire.PodUp | wire.PodDown | wire.Sync | wire.Reset):
            body = replace(body, prefixes=table.definition.prefixes(body.chunks))
        table.version += 1
        self._send(table, body, prev=table.version - 1)

    # --- inside ---------------------------------------------------------------------------------

    def _claim_orphans(self, table: Table, now: float) -> None:
        """The dead pod's own name first, then whoever has fewest chunks."""
        orphans = [n for n in sorted(table.rows) if self._may_be_claimed(table.rows[n].owner, now)]
        if not orphans or not table.live:
            return
        namesakes = {owner.name: owner for owner in table.live}
        owned = {owner: len(table.owned(owner)) for owner in table.live}
        moves: dict[tuple[OwnerRef, OwnerRef, int], list[int]] = defaultdict(list)
        for n in sorted(orphans, key=lambda n: table.rows[n].owner.name not in namesakes):
            row = table.rows[n]
            fewest = min(owned, key=lambda owner: (owned[owner], owner.name))
            owner = namesakes.get(row.owner.name, fewest)
            owned[owner] += 1
            moves[owner, row.owner, self._hold_ms(table, row)].append(n)
        for (owner, _, hold_ms), numbers in moves.items():
            self.claim(table, owner, numbers, hold_ms)

    def _may_be_claimed(self, owner: OwnerRef, now: float) -> bool:
        """Of the dead; of a superseded one not before its lease has run out."""
        reason = self.ended.get(owner.incarnation)
        return reason is not None and (
            reason != "superseded" or self.sessions[owner.incarnation].until <= now
        )

    def _hold_ms(self, table: Table, row: Row) -> int:
        """`W`, if that is less, after a graceful close of an owner whose chunk was unmarked."""
        hold = _ms(self.timing.hold)
        closed = self.ended[row.owner.incarnation] == "closed" and row.hold_ms is None
        return min(hold, table.definition.usage_lag_ms) if closed else hold

    def _send(self, table: Table, body: wire.EventBody, *, prev: int) -> None:
        head = wire.EventHead(
            pool=table.name,
            version=(table.version, 0),
            prev=(prev, 0),
            agent=self.stamp.agent,
            term=self.stamp.term,
            history=self.stamp.history,
            at=round(time.time() * 1000),
        )
        headers = {wire.CONTENT_TYPE_HEADER: wire.CONTENT_TYPE, wire.SUMMARY_HEADER: wire.summary(head, body)}
        subject = self.subjects.event(table.name, wire.EVENT_VERBS[type(body)])
        self._publish(subject, codec.encode(codec.to_map(head) | codec.to_map(body)), headers)

    def _living(self, pod: str, incarnation: int) -> Session:
        """The session of a request; at its first one it supersedes the lower ones of its name."""
        session = self._session(pod, incarnation)
        if not session.live:
            session.live = True
            for pool in session.pools:
                self._up(session, pool)
            for other in self.alive(pod):
                if other.owner.incarnation < incarnation:
                    self.end(other, "superseded")
        return session

    def _session(self, pod: str, incarnation: int) -> Session:
        session = self.sessions.get(incarnation)
        known = session is not None and session.owner.name == pod
        reason = self.ended.get(incarnation) if known else "unknown"
        if session is None or reason is not None:
            message = f"this incarnation's session is over ({reason}); open a new one"
            raise Refused("session_lost", message, reason or "unknown")
        return session

    def _member(self, table: Table, pod: str, incarnation: int) -> Session:
        session = self._living(pod, incarnation)
        if table.name not in session.pools:
            message = f"the session has not joined pool {table.name}; send session.join first"
            raise Refused("not_joined", message)
        return session

    def _up(self, session: Session, pool: str) -> None:
        table = self.tables[pool]
        table.live[session.owner] = None
        self.announce(table, wire.PodUp(session.owner))

    def _lease(self) -> float:
        return self._clock() + self.timing.liveness

    def _table(self, pool: str) -> Table:
        if pool not in self.tables:
            message = "this domain has no such pool; the request `pools` lists them"
            raise Refused("unknown_pool", message)
        return self.tables[pool]

    def _defined(self, pools: Iterable[str]) -> tuple[Definition, ...]:
        return tuple(self._table(pool).definition for pool in pools)

    def _held(self, session: Session, pool: str) -> tuple[int, int]:
        rows = self.tables[pool].owned(session.owner)
        said = sum(holding(n, row.grant, marked=row.hold_ms is not None) for n, row in rows.items())
        return len(rows), said % MODULUS

    def _shown(self, table: Table, owner: OwnerRef) -> wire.SnapshotOwner:
        return wire.SnapshotOwner(owner.name, owner.ip, owner.instance, owner.incarnation, table.state(owner))

    def _pod_state(self, table: Table, owner: OwnerRef) -> wire.PodState:
        rows = table.owned(owner).values()
        session = self.sessions.get(owner.incarnation)
        use = session.use.get(table.name) if session is not None else None
        marked = sum(row.hold_ms is not None for row in rows)
        return wire.PodState(owner, table.state(owner), len(rows), marked, use or wire.Use())

    def _pool_state(self, table: Table) -> wire.PoolState:
        rows = table.rows.values()
        return wire.PoolState(
            definition=table.definition,
            chunks=len(rows),
            capacity=table.capacity,
            pods=len(table.live),
            orphans=sum(row.owner not in table.live for row in rows),
            marked=sum(row.hold_ms is not None for row in rows),
        )


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
