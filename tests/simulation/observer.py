"""The all-knowing observer: what must hold after every step, and once everything has healed."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from drsm_agent.core.documents import DEAD, read_chunk, session_key
from drsm_agent.core.table import Change
from drsm_sdk.wire import checksum, codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.database import Database
from tests.simulation.network import Packet
from tests.simulation.pools import POOL, Id, Places

Key = tuple[str, int]


class Violation(AssertionError):
    """A guarantee was broken."""


@dataclass(slots=True, eq=False)
class Issue:
    """An id that is issued: by whom, under which grant."""

    owner: Key
    grant: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and when the server had it."""

    subject: str
    at: float
    body: dict[str, Any]


@dataclass
class Observer:
    """Sees every write, every message at the server, and every id that is issued."""

    database: Database
    subjects: Subjects
    clock: Any
    places: Places
    timeline: list[str] = field(default_factory=list)
    in_use: dict[Id, Issue] = field(default_factory=dict)
    issued: int = 0
    claims: int = 0
    waived: frozenset[str] = frozenset()
    """Guarantees that this world's clocks do not allow."""
    contradicted: list[tuple[int, float]] = field(default_factory=list)
    """Incarnations that counted on their lease when or after they were declared dead, with what was left:
    what an alarm of wrong clocks must tell."""
    liveness_left: Callable[[int], float] = lambda incarnation: 0.0
    """Seconds for which a living pod may still count on not being declared dead."""
    may_issue: Callable[[Key], bool] = lambda owner: True
    """Whether an incarnation counts on its allocation lease, whatever the database says."""
    holds: Callable[[Key, int, str], bool] = lambda owner, n, grant: True
    """Whether a living pod holds a chunk by a grant (by whichever when empty), whatever the database says."""
    was_restored: bool = False
    quarantine: float = 0.0
    """Seconds for which a released id is not issued again, by the slowest clock."""
    _released_at: dict[Id, float] = field(default_factory=dict)
    _announced: set[tuple[int, str, int]] = field(default_factory=set)
    _issuers: dict[int, list[tuple[Key, str]]] = field(default_factory=lambda: defaultdict(list))
    _table: dict[int, Key] = field(default_factory=dict)
    _grants: dict[int, str] = field(default_factory=dict)
    _mirrors: dict[str, int] = field(default_factory=dict)
    _sums: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    _sum: int = 0
    _histories: set[str] = field(default_factory=set)
    _lost_histories: set[str] = field(default_factory=set)
    _lost_sums: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    _dead_at: dict[int, float] = field(default_factory=dict)
    _expired: set[int] = field(default_factory=set)
    _asked: dict[str, "Asked"] = field(default_factory=dict)
    _answered: dict[tuple[str, str], Any] = field(default_factory=dict)
    _versions: dict[str, tuple[str, m.Version]] = field(default_factory=dict)

    def note(self, who: str, what: str) -> None:
        self.timeline.append(f"{self.clock():9.3f}  {who:<10} {what}")

    def broken(self, guarantee: str, what: str) -> None:
        if guarantee in self.waived:
            return
        self.note("OBSERVER", f"{guarantee} broken: {what}")
        raise Violation(f"{guarantee}: {what}")

    # --- ids (G1, G4) -----------------------------------------------------------------------------

    def issue(self, id_: Id, owner: Key, grant: str, lease_left: float) -> Issue:
        """A pod hands an id to its application, `lease_left` seconds before its allocation lease ends."""
        self.issued += 1
        if lease_left <= 0:
            self.broken("R4", f"id {id_} issued by {owner} {-lease_left:.3f} s after its lease had run out")
        n = self.places.chunk_of(id_)
        if self.places.never_issued(id_):
            self.broken("G1", f"id {id_} was issued, which never is")
        rested = self.clock() - self._released_at.get(id_, float("-inf"))
        if rested < self.quarantine and not self.was_restored:
            self.broken("10", f"id {id_} issued by {owner} {rested:.3f} s after it was released")
        if (issue := self.in_use.get(id_)) is not None and not self._forgotten(issue.owner, n, issue.grant):
            self.broken("G1", f"id {id_} issued by {owner} is in use since {issue.owner} issued it")
        if (n, *owner) not in self._announced:
            self.broken("G4", f"id {id_} issued by {owner} before its ownership of chunk {n} was announced")
        issuers = self._issuers[n]
        if not issuers or issuers[-1] != (owner, grant):
            if (owner, grant) in issuers and not self._forgotten(issuers[-1][0], n):
                self.broken("G1", f"chunk {n} is issued from by {owner} again, after {issuers[-1][0]}")
            issuers.append((owner, grant))
        issue = self.in_use[id_] = Issue(owner, grant)
        return issue

    def may_hand_out(self, owner: Key, ids: Iterable[Id]) -> None:
        """A pod may issue these at any moment, and its lease allows it."""
        for id_ in ids:
            issue = self.in_use.get(id_)
            if issue is not None and not self._forgotten(issue.owner, self.places.chunk_of(id_), issue.grant):
                self.broken("G1", f"id {id_} is free at {owner}, and in use since {issue.owner} issued it")

    def _forgotten(self, owner: Key, n: int, grant: str = "") -> bool:
        """What was issued in the time that a restore has lost nobody can know, if its owner was not heard of
        since for so long that it may not issue any more, or has let go of the chunk: of this grant of it, as
        it may have been granted the same number again."""
        return self.was_restored and not (self.may_issue(owner) and self.holds(owner, n, grant))

    def release(self, id_: Id, issue: Issue) -> None:
        if self.in_use.get(id_) is issue:
            del self.in_use[id_]
            self._released_at[id_] = self.clock()

    # --- the database (G2) ------------------------------------------------------------------------

    def changed(self, change: Change) -> None:
        if change.space == "drsm_sessions":
            self._session_changed(change)
        elif change.space == POOL and change.key.startswith("chunkid-"):
            self._chunk_changed(change)
        elif change.space == POOL:
            self._mirror_changed(change)

    def restored(self) -> None:
        """The database is what it was at its backup: what it has forgotten, has not happened."""
        self.was_restored = True
        self._table, self._sum, self._grants, self._answered = {}, 0, {}, {}
        self._lost_sums, self._sums = self._sums, defaultdict(set)
        self._lost_histories = set(self._histories)
        for chunk in map(read_chunk, self.database.documents(POOL)):
            if chunk is not None:
                self._table[chunk.n], self._grants[chunk.n] = chunk.owner.key, chunk.grant
                self._sum += checksum.ownership(chunk.n, *chunk.owner.key)
        dead = {
            int(document["_id"].rpartition(":")[2])
            for document in self.database.documents("drsm_sessions")
            if document["state"] == DEAD
        }
        self._dead_at = {one: at for one, at in self._dead_at.items() if one in dead}
        self._expired &= dead

    def _session_changed(self, change: Change) -> None:
        document = self.database.document("drsm_sessions", change.key)
        incarnation = int(change.key.rpartition(":")[2])
        if document is not None and document["state"] == DEAD and incarnation not in self._dead_at:
            self._dead_at[incarnation] = self.clock()
            reason = document.get("reason")
            self.note("mongodb", f"session {change.key} is dead: {reason}")
            if reason == "expired":
                self._expired.add(incarnation)
                self.counts_on(incarnation, self.liveness_left(incarnation))

    def _chunk_changed(self, change: Change) -> None:
        n = int(change.key.removeprefix("chunkid-"))
        document = self.database.document(POOL, change.key)
        former, grant = self._table.pop(n, None), self._grants.pop(n, "")
        if former is not None:
            self._sum -= checksum.ownership(n, *former)
        chunk = read_chunk(document) if document is not None else None
        if chunk is None and former is not None and self.holds(former, n, grant):
            self.broken("G1", f"chunk {n} was released while {former} holds it by grant {grant}")
        if chunk is not None:
            owner = chunk.owner.key
            self._table[n], self._grants[n] = owner, chunk.grant
            self._sum += checksum.ownership(n, *owner)
            if former is not None and former != owner:
                self._claimed(n, former, owner)
        self._sums[change.at].add((len(self._table), self._sum % checksum.MODULUS))

    def _claimed(self, n: int, former: Key, owner: Key) -> None:
        self.claims += 1
        self.note(
            "mongodb",
            f"chunk {n} of {former[0]}:{former[1] & 0xFFFF} claimed by {owner[0]}:{owner[1] & 0xFFFF}",
        )
        self._check_claim(n, former, owner)

    def _check_claim(self, n: int, former: Key, owner: Key) -> None:
        if former[1] not in self._dead_at and (not self.was_restored or self.holds(former, n, "")):
            self.broken("G2", f"chunk {n} was taken from {former}, whose session lives")

    def _mirror_changed(self, change: Change) -> None:
        """What Go pods take for a sign of life stays as long as the session that it mirrors."""
        incarnation = self._mirrors.pop(change.key, None)
        document = self.database.document(POOL, change.key)
        if document is not None:
            self._mirrors[change.key] = document["drsm"]["incarnation"]
        elif incarnation is not None and not self.was_restored:
            session = self.database.document("drsm_sessions", session_key(change.key, incarnation))
            if session is not None and session["state"] != DEAD:
                self.broken("G2", f"the keepalive of {change.key}:{incarnation}, which lives, was deleted")

    # --- the server (G4, G5, R2, R5) ------------------------------------------------------------------

    def heard(self, packet: Packet) -> None:
        if packet.subject.startswith(f"{self.subjects.prefix}.evt."):
            self._event(packet)
        elif packet.reply and packet.subject.startswith(f"{self.subjects.prefix}.rpc."):
            self._asked[packet.reply] = Asked(packet.subject, self.clock(), codec.decode(packet.data))
        elif asked := self._asked.get(packet.subject):
            self._answer(asked, packet)

    def _event(self, packet: Packet) -> None:
        kind = m.EVENT_KINDS[self.subjects.event_verb(packet.subject)]
        fields = codec.decode(packet.data)
        head, body = codec.from_map(m.EventHead, fields), codec.from_map(kind, fields)
        self._histories.add(head.history)
        if not isinstance(body, m.Sync):
            self.note("nats", m.summary(head, body))
        match body:
            case m.ChunkAllocated(owner, chunks) | m.ChunkClaimed(owner, _, chunks):
                self._announced |= {(n, owner.name, owner.incarnation) for n in chunks}
            case m.Reset():  # consumers take a snapshot now, and it has all of these
                self._announced |= {(n, *owner) for n, owner in self._table.items()}

    def _answer(self, asked: "Asked", packet: Packet) -> None:
        if m.ERROR_HEADER in packet.headers or packet.headers.get("Status"):
            return
        incarnation = asked.body.get("incarnation")
        dead_at = self._dead_at.get(incarnation) if isinstance(incarnation, int) else None
        if dead_at is not None and dead_at < asked.at and not asked.subject.endswith(("close", "report")):
            self.broken("R5", f"{asked.subject} of incarnation {incarnation} succeeded after its death")
        if asked.subject.endswith(".session.open"):
            self._opened(asked, codec.decode(packet.data)["incarnation"])
        elif asked.subject.endswith(".acquire"):
            self._acquired(asked, [(n, grant) for n, grant in codec.decode(packet.data)["chunks"]])

    # --- repeats ----------------------------------------------------------------------------------

    def _opened(self, asked: "Asked", incarnation: int) -> None:
        """An `open` that is repeated opens nothing new."""
        request = asked.body["pod"]["name"], asked.body["request_id"]
        if (first := self._answered.setdefault(request, incarnation)) != incarnation:
            self.broken(
                "repeats", f"open {request} was answered with incarnation {incarnation}, after {first}"
            )

    def _acquired(self, asked: "Asked", chunks: list[tuple[int, str]]) -> None:
        """Nor does an `acquire` grant anything new, as long as its pod still has something of the first."""
        owner = asked.body["pod"], asked.body["incarnation"]
        request = owner[0], asked.body["request_id"]
        first = self._answered.setdefault(request, chunks)
        still = [(n, g) for n, g in first if self._table.get(n) == owner and self._grants.get(n) == g]
        if still and not set(first) & set(chunks):
            self.broken("repeats", f"acquire {request} was answered with {chunks}, after {first}")

    def spoke(self, agent: str, subject: str, *, leads: bool) -> None:
        """An agent sends an event or an answer."""
        if not leads and (subject in self._asked or subject.startswith(f"{self.subjects.prefix}.evt.")):
            self.broken("R2", f"{agent} sends {subject} without a valid lead")

    def counts_on(self, incarnation: int, left: float) -> None:
        """A pod believes that it cannot be declared dead for `left` seconds."""
        if left > 0 and incarnation in self._expired:
            if all(incarnation != known for known, _ in self.contradicted):
                self.contradicted.append((incarnation, left))
            self.broken("R1", f"incarnation {incarnation} is dead and counts on its lease for {left:.3f} s")

    def told_its_end(self, incarnation: int, reason: str) -> None:
        """An event has ended a pod's session."""
        if incarnation not in self._dead_at and not self.was_restored:
            self.broken("G2", f"incarnation {incarnation} lives, and was told that it is over: {reason}")

    def demux_ended(self, who: str) -> None:
        """The next one of its name begins without a table."""
        self._versions.pop(who, None)

    def demux_holds(self, who: str, history: str, version: m.Version, table: tuple[int, int]) -> None:
        """A demux has a table of so many chunks and this checksum, as of a version."""
        sums = self._lost_sums if history in self._lost_histories else self._sums
        known = sums.get(version[0])
        if known is not None and table not in known:
            self.broken("G5", f"{who} has a table at {version} that the database never had")
        before = self._versions.get(who)
        if before is not None and before[0] == history and version < before[1]:
            self.broken("G5", f"{who} went back from {before[1]} to {version} within history {history}")
        self._versions[who] = (history, version)
