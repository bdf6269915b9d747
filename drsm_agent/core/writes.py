"""Every write of the agent, each with its guard. One decision is one write.

A guard is a filter in MongoDB's language, kept to equality, `$lt`, `$lte` and `$in`, so that the
in-memory store can hold the same promise. Where a guard does not match, somebody decided otherwise
first: that is an outcome, not an error. `_id` is unique and the arbiter of every race.

`term` in a guard (rules R5, R8): a new leader stamps its term on all sessions that are not dead
before anything else, so that nothing an older leader still has under way can match.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from drsm_agent.core.documents import (
    DEAD,
    GO_INCARNATION,
    GO_OWNERS_MAX,
    LIVE,
    NO_END,
    OPENED,
    Chunk,
    Document,
    Drsm,
    GoState,
    Keepalive,
    Owner,
    Session,
    chunk_key,
    go_state_fields,
    our_instance,
    owner_fields,
    session_key,
)
from drsm_agent.core.table import SESSIONS, STAMPS

LEADER, POSITION, SETTINGS = "drsm_leader", "drsm_position", "drsm_settings"


@dataclass(frozen=True, slots=True)
class Insert:
    """Refused when a document with its `_id` exists."""

    space: str
    document: Document

    @property
    def key(self) -> str:
        return str(self.document["_id"])


@dataclass(frozen=True, slots=True)
class Update:
    """Set and push fields of the document that matches; `many` of all that match."""

    space: str
    where: Document
    set: Document = field(default_factory=dict)
    add_to_set: Document = field(default_factory=dict)
    inc: Document = field(default_factory=dict)
    many: bool = False

    @property
    def key(self) -> str:
        return str(self.where["_id"])


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the document that matches."""

    space: str
    where: Document

    @property
    def key(self) -> str:
        return str(self.where["_id"])


Write = Insert | Update | Delete


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a list of writes to one space: how many changed something, and which inserts (by
    index) found their `_id` taken."""

    changed: int
    refused: frozenset[int] = frozenset()


# --- Sessions -----------------------------------------------------------------------------------


def open_session(session: Session) -> Insert:
    return Insert(SESSIONS, session.document)


def activate(pod: str, incarnation: int, term: int) -> Update:
    """The first request of an incarnation: from now on it lives."""
    guard = _session_guard(pod, incarnation, term) | {"state": OPENED}
    return Update(SESSIONS, guard, set={"state": LIVE, "term": term})


def join(pod: str, incarnation: int, pools: tuple[str, ...], term: int) -> Update:
    guard = _session_guard(pod, incarnation, term) | {"state": {"$in": [OPENED, LIVE]}}
    return Update(SESSIONS, guard, set={"term": term}, add_to_set={"pools": {"$each": list(pools)}})


def promise(pod: str, incarnation: int, promised_ms: int, term: int) -> Update:
    """Record a larger allocation lease, before the answer that promises it leaves."""
    guard = _session_guard(pod, incarnation, term) | {"promised_ms": {"$lt": promised_ms}}
    return Update(SESSIONS, guard, set={"promised_ms": promised_ms})


def end_session(pod: str, incarnation: int, reason: str, term: int) -> Update:
    """Terminal. `reason` is `expired`, `closed` or `superseded`."""
    guard = _session_guard(pod, incarnation, term) | {"state": {"$in": [OPENED, LIVE]}}
    return Update(SESSIONS, guard, set={"state": DEAD, "reason": reason, "term": term})


def purge_session(pod: str, incarnation: int, term: int) -> Delete:
    """A dead session that no chunk names any more."""
    return Delete(SESSIONS, _session_guard(pod, incarnation, term) | {"state": DEAD})


def stamp_sessions(term: int) -> Update:
    """A new leader's first write: whatever an older leader decides from now on finds no match."""
    guard = {"state": {"$in": [OPENED, LIVE]}, "term": {"$lt": term}}
    return Update(SESSIONS, guard, set={"term": term}, many=True)


def _session_guard(pod: str, incarnation: int, term: int) -> Document:
    return {"_id": session_key(pod, incarnation), "term": {"$lte": term}}


# --- Chunks -------------------------------------------------------------------------------------

_NOBODYS = Drsm("", "", "", GO_INCARNATION)
"""A `drsm` that is stale whoever owns the chunk, beside which `go_owners` are kept."""


def allocate(pool: str, n: int, owner: Owner, grant: str, request_id: str) -> Insert:
    """A free chunk to a pod. `_id` decides between two that picked the same number."""
    return Insert(pool, _owned(n, owner, Drsm(*_who(owner), grant=grant, request_id=request_id)).document)


def claim(pool: str, orphan: Chunk, owner: Owner, grant: str, hold_ms: int) -> Update:
    """An orphan to a living pod, marked: what its former owners issued is not yet known. Also a chunk to its
    own owner anew, when a Go pod that it came from goes on issuing from it."""
    drsm = Drsm(
        *_who(owner),
        grant=grant,
        marked=True,
        hold_ms=hold_ms,
        go_owners=_came_from(orphan),
        returned=_is_returned(orphan, owner),
    )
    fields = _owned(orphan.n, owner, drsm).document
    changed = {name: fields[name] for name in ("podId", "podIp", "podInstance", "drsm")}
    return Update(pool, _chunk_guard(orphan), set=changed)


def _is_returned(orphan: Chunk, owner: Owner) -> bool:
    """Whether a claim gives a chunk to the next life of the pod that had it. (What was a Go pod's may have
    its name, as one that was migrated.)"""
    former = orphan.owner
    return former.name == owner.name and not former.is_go and former.key != owner.key


def put_back(
    pool: str, n: int, seen: Chunk | None, owner: Owner, *, grant: str, hold_ms: int | None
) -> Insert | Update:
    """After a restore: a chunk to the pod that holds it; marked, with a hold, unless `hold_ms` is None."""
    drsm = Drsm(
        *_who(owner),
        grant=grant,
        marked=hold_ms is not None,
        hold_ms=hold_ms or 0,
        go_owners=_came_from(seen) if seen else (),
    )
    fields = _owned(n, owner, drsm).document
    if seen is None:
        return Insert(pool, fields)
    changed = {name: fields[name] for name in ("podId", "podIp", "podInstance", "drsm")}
    return Update(pool, _chunk_guard(seen), set=changed)


def give_back_to_go(pool: str, chunk: Chunk, go: Owner) -> Update:
    """A chunk to the Go pod that it came from and that lives after all, while nothing was issued from it
    since its claim."""
    return _to_go(pool, chunk, go, _chunk_guard(chunk) | {"drsm.marked": True})


def leave_to_go(pool: str, chunk: Chunk, go: Owner) -> Update:
    """A dead pod's chunk to the Go pod that lives under its name, to which Go pods route it already."""
    return _to_go(pool, chunk, go, _chunk_guard(chunk))


def remember_go(pool: str, chunk: Chunk, former: str) -> Update:
    """A Go pod has claimed a chunk of another Go pod, which may have stood still: it came from both."""
    drsm = chunk.drsm or _NOBODYS
    drsm = replace(drsm, go_owners=_adding(drsm, former))
    return Update(pool, _chunk_guard(chunk), set={"drsm": drsm.document})


def _to_go(pool: str, chunk: Chunk, go: Owner, guard: Document) -> Update:
    """As if the Go pod had claimed it. What `drsm` is left with is nobody's, also where name, address and
    instance are those of the pod that had it."""
    who = {"podId": go.name, "podIp": go.ip, "podInstance": go.instance}
    return Update(pool, guard, set=who | {"drsm": replace(_NOBODYS, go_owners=chunk.go_owners).document})


def release(pool: str, chunk: Chunk) -> Delete:
    """An owned chunk back to the free ones. A marked one does not match."""
    return Delete(pool, _chunk_guard(chunk) | {"drsm.marked": False})


def clear_mark(pool: str, chunk: Chunk) -> Update:
    """A finished scan: what is in use is known again, and earlier holds do not count any more."""
    guard = _chunk_guard(chunk) | {"drsm.marked": True}
    return Update(pool, guard, set={"drsm.marked": False, "drsm.hold_ms": 0})


def _chunk_guard(chunk: Chunk) -> Document:
    """The owner as it was seen: pod, incarnation and grant, or a Go pod and the `drsm` it left. None matches
    a field that is not there."""
    guard: Document = {
        "_id": chunk_key(chunk.n),
        "podId": chunk.pod,
        "podIp": chunk.ip,
        "podInstance": chunk.instance,
    }
    if chunk.drsm is None:
        return guard | {"drsm": chunk.odd}
    grant = chunk.drsm.grant or {"$in": ["", None]}  # one without a grant may lack the field
    return guard | {"drsm.incarnation": chunk.drsm.incarnation, "drsm.grant": grant}


def _came_from(chunk: Chunk) -> tuple[str, ...]:
    """The Go pods that the next owner's chunk comes from."""
    return _adding(chunk.drsm, chunk.pod) if chunk.owner.is_go else chunk.go_owners


def _adding(drsm: Drsm | None, name: str) -> tuple[str, ...]:
    names = drsm.go_owners if drsm else ()
    return (*(one for one in names if one != name), name)[-GO_OWNERS_MAX:]


def _owned(n: int, owner: Owner, drsm: Drsm) -> Chunk:
    return Chunk(n=n, pod=owner.name, ip=owner.ip, instance=owner.instance, drsm=drsm)


def _who(owner: Owner) -> tuple[str, str, str, int]:
    return (owner.name, owner.ip, owner.instance, owner.incarnation)


# --- Keepalives -----------------------------------------------------------------------------------
#
# Whose a keepalive is say its `podInstance` and its end, and whether anybody has renewed it since says its
# `expireAt`: every guard names these two as they were seen. Each is a plain insert, update or delete; none is
# an upsert, as a renewal must not revive what Go pods have seen deleted.


def mirror_keepalive(pool: str, owner: Owner, expire_at: Any) -> Insert:
    """An incarnation as Go pods see it; of incarnation 0 a stand-in for a Go pod that has none any more."""
    return Insert(pool, {"_id": owner.name} | _mirror(owner, expire_at))


def take_over_keepalive(pool: str, seen: Keepalive, owner: Owner, expire_at: Any) -> Update:
    """The mirror of an older incarnation, or a Go pod's keepalive, becomes the mirror of this one. In one
    write: a Go pod that saw it deleted would claim the chunks of everybody with this name. It goes on saying
    what is known of the Go pod, whose next renewal makes it the Go pod's again."""
    fields = _mirror(owner, expire_at)
    if told := seen.go_state:
        fields["drsm"] |= {"go": go_state_fields(told)}
    return Update(pool, _keepalive_guard(seen), set=fields)


def prolong_keepalive(pool: str, seen: Keepalive, expire_at: Any) -> Update:
    """Put off the end of a mirror."""
    return Update(pool, _keepalive_guard(seen), set={"expireAt": expire_at, "drsm.end": expire_at})


def forget_go(pool: str, seen: Keepalive, mirrored: Owner) -> Update:
    """A mirror says nothing more of the Go pod of its name."""
    drsm = owner_fields(mirrored) | {"end": seen.expire_at}
    return Update(pool, _keepalive_guard(seen), set={"drsm": drsm})


def note_silence(pool: str, seen: Keepalive, go: Owner) -> Update:
    """The Go pod that owns chunks, or whose keepalive stood unchanged, is down."""
    drsm: Document = dict(seen.document.get("drsm", {}))
    if seen.mirrored:
        drsm["go"] = go_state_fields(GoState(go, down=True))
    else:
        drsm["silent"] = NO_END if seen.expire_at is None else seen.expire_at
    return Update(pool, _keepalive_guard(seen), set={"drsm": drsm})


def delete_keepalive(pool: str, seen: Keepalive) -> Delete:
    """Go pods that see it claim the chunks that name it."""
    return Delete(pool, _keepalive_guard(seen))


def _mirror(owner: Owner, expire_at: Any) -> Document:
    return {
        "type": "keepalive",
        "podId": owner.name,
        "podIp": owner.ip,
        "podInstance": our_instance(owner),
        "expireAt": expire_at,
        "drsm": owner_fields(owner) | {"end": expire_at},
    }


def _keepalive_guard(seen: Keepalive) -> Document:
    return {"_id": seen.pod, "type": "keepalive", "podInstance": seen.instance, "expireAt": seen.expire_at}


# --- The lead, the position, the stamp ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaderRecord:
    """The leader lease. `holder` is empty once a leader gave it up; `ttl_ms` is the holder's `T`."""

    holder: str
    term: int
    counter: int
    ttl_ms: int

    @property
    def document(self) -> Document:
        return {"_id": "leader"} | asdict(self)


def read_leader(documents: Sequence[Document]) -> LeaderRecord | None:
    """None before anybody has ever led."""
    for document in documents:
        return LeaderRecord(
            holder=str(document["holder"]),
            term=int(document["term"]),
            counter=int(document["counter"]),
            ttl_ms=int(document["ttl_ms"]),
        )
    return None


def first_lead(record: LeaderRecord) -> Insert:
    return Insert(LEADER, record.document)


def take_lead(seen: LeaderRecord, record: LeaderRecord) -> Update:
    """Take over a record that has not changed since it was seen."""
    return Update(LEADER, {"_id": "leader"} | asdict(seen), set=asdict(record))


def renew_lead(record: LeaderRecord) -> Update:
    """Every renewal that arrives changes the record, also after one whose outcome stayed unknown."""
    guard = {"_id": "leader", "holder": record.holder, "term": record.term}
    return Update(LEADER, guard, set={"ttl_ms": record.ttl_ms}, inc={"counter": 1})


def give_up_lead(record: LeaderRecord) -> Update:
    guard = {"_id": "leader", "holder": record.holder, "term": record.term}
    return Update(LEADER, guard, set=asdict(replace(record, holder="")))


def stand_by() -> Update:
    """A standby shows that it waits, and that NATS carries its messages. Not among what is compared of the
    record, so no other standby takes it for a renewal."""
    return Update(LEADER, {"_id": "leader"}, inc={"standbys": 1})


def note_serving(record: LeaderRecord) -> Update:
    """Requests are answered in this term. Not among what is compared of the record; standbys tell by it who
    leads from who only has won the lead."""
    guard = {"_id": "leader", "holder": record.holder, "term": record.term}
    return Update(LEADER, guard, set={"serving": record.term})


def is_served(documents: Sequence[Document], record: LeaderRecord) -> bool:
    """Whether the holder of a leader's record answers requests, as the record says."""
    return any(document.get("serving") == record.term for document in documents)


def note_hand_over(record: LeaderRecord, *, handed_over: bool) -> Update:
    """A leader hands over as it hears no pod: the next one shall not do it again, until it has heard one."""
    guard = {"_id": "leader", "holder": record.holder, "term": record.term}
    return Update(LEADER, guard, set={"handed_over": handed_over})


def first_position() -> Insert:
    """What the guard of `save_position` needs to match, from the start."""
    return Insert(POSITION, {"_id": "position", "term": 0})


def first_stamp() -> Insert:
    """What the guard of `touch_stamp` needs to match, from the start."""
    return Insert(STAMPS, {"_id": "stamp", "term": 0, "n": 0})


def save_position(term: int, position: Document) -> Update:
    """What was published and flushed, so that the next leader goes on from there. It counts its saves, so
    that one which repeats another of unknown outcome is still seen to match."""
    guard = {"_id": "position", "term": {"$lte": term}}
    return Update(POSITION, guard, set={"term": term} | position, inc={"saves": 1})


def touch_stamp(term: int, agent: str, number: int = 0) -> Update:
    """A write whose only purpose is to come back in the change stream: what was written before it has
    then come too. The number tells it from the term's earlier ones."""
    return Update(
        STAMPS,
        {"_id": "stamp", "term": {"$lte": term}},
        set={"term": term, "agent": agent, "number": number},
        inc={"n": 1},
    )
