"""The table: who owns what, folded from the change stream, and nothing else.

State flows one way: write -> oplog -> change stream -> this table -> events. Nothing edits it from
the agent's own writes. Every change gets the version `(clusterTime, part)`; `part` numbers the
stream's changes of one clusterTime (bulk writes of MongoDB 8, sharded clusters), so that two agents
that read the same stream give the same versions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from drsm_agent.core import documents as docs
from drsm_agent.core import events as ev
from drsm_agent.core.documents import DEAD, LIVE, Chunk, Document, Keepalive, Owner, Session
from drsm_agent.core.events import Event, Version

K = TypeVar("K")
V = TypeVar("V")

SESSIONS = "drsm_sessions"
STAMPS = "drsm_stamps"
GONE_SECONDS = 60
ODD_MAX = 10_000
"""Documents of a pool's collection that are kept although they are neither chunk nor keepalive. There are
none as a rule; one that is not kept is seen when everything is read anew."""
SILENT, DELETED = "silent", "deleted"
"""Why a Go pod is down: its keepalive stands unchanged, or was deleted. After the latter it is unknown
whether one that has chunks is about to renew."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """A chunk's part in the two checksums of the protocol."""

    ownership: Callable[[int, str, int], int]
    """of (n, owner's name, incarnation): in a pool's `sync`"""
    holding: Callable[[int, str, bool], int]
    """of (n, grant, marked): in what one pod holds"""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one document. `document` is the whole of it (insert, replace); otherwise `updated`
    and `removed` are to be merged into what is known, or with `gone` the document was deleted."""

    space: str
    key: str
    at: int
    token: str = ""
    document: Document | None = None
    updated: Mapping[str, Any] | None = None
    removed: tuple[str, ...] = ()
    gone: bool = False


@dataclass(slots=True)
class Held:
    """What one incarnation owns in a pool, in the order in which it got it."""

    numbers: dict[int, None] = field(default_factory=dict)
    checksum: int = 0


LIVING, GONE, UNKNOWN = "live", "down", "unknown"
"""What an owner's state may be, in snapshots and at consumers."""


@dataclass(slots=True)
class PoolTable:
    """One pool: its chunks, who holds which, and what of it a consumer must have heard.

    Of Go pods `live` has those with a keepalive that is not known to be silent, `down` those of which a
    keepalive says that they are, and `go_keepalives` counts their own. `signs` counts, by name, what
    shows that one lives: its renewals, and chunks that it has allocated or claimed. `from_go` are the SDK
    pods' chunks that came from each of them. `gone` are keepalives that were deleted of late, and when,
    by the database's time; another one may have been inserted since. `go_since` is when each Go pod's
    life began, as far as its keepalive shows, and `known_free` are the free numbers that one of them has
    seen owned and never takes again, with when they became free. Those that are owned they know, too.
    `odd` is what is kept of documents of the collection that are no chunks, and from which no keepalive
    can be read.
    """

    name: str
    version: Version
    chunks: dict[int, Chunk] = field(default_factory=dict)
    held: dict[tuple[str, int], Held] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    requests: dict[str, dict[int, None]] = field(default_factory=dict)
    keepalives: dict[str, Keepalive] = field(default_factory=dict)
    live: dict[tuple[str, int], Owner] = field(default_factory=dict)
    down: dict[tuple[str, int], Owner] = field(default_factory=dict)
    signs: dict[str, int] = field(default_factory=dict, compare=False)
    from_go: dict[str, dict[int, None]] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict, compare=False)
    go_since: dict[str, int] = field(default_factory=dict, compare=False)
    known_free: dict[int, int] = field(default_factory=dict, compare=False)
    odd: dict[str, Document] = field(default_factory=dict, compare=False)
    go_keepalives: int = 0
    go_chunks: int = 0
    checksum: int = 0

    @property
    def has_go(self) -> bool:
        """Whether a Go pod has a keepalive here, or a chunk."""
        return bool(self.go_keepalives or self.go_chunks)

    def owners(self) -> dict[tuple[str, int], Owner]:
        """Every pod that is up or owns a chunk, and Go pods that are known to be down."""
        owning = {
            key: self.shown(self.chunks[next(iter(held.numbers))].owner) for key, held in self.held.items()
        }
        return owning | self.down | self.live

    def shown(self, owner: Owner) -> Owner:
        """An owner as consumers know it. A Go pod that has started anew elsewhere under its name has its old
        chunks too, and its keepalive says where."""
        if owner.is_go:
            return self.live.get(owner.key) or self.down.get(owner.key) or owner
        return owner

    def state(self, owner: Owner) -> str:
        """`live`, `down`, or `unknown`: a Go pod that has chunks and of which no keepalive says anything. It
        has none in its first five seconds, and none once MongoDB has deleted it."""
        if owner.key in self.live:
            return LIVING
        return UNKNOWN if owner.is_go and owner.key not in self.down else GONE

    def orphans(self) -> Iterator[Chunk]:
        """Chunks whose owner is not up."""
        for key, held in self.held.items():
            if key not in self.live:
                yield from (self.chunks[n] for n in held.numbers)


class Table:
    """All pools and sessions of a domain, at one point of the oplog.

    `started` is the cluster time of the read that it began with, as seconds << 32 | increment.
    """

    def __init__(self, pools: Iterable[str], at: int, hashes: Hashes) -> None:
        self._hashes = hashes
        self.started = at
        self._last_at, self._part = at, 0
        self.pools = {name: PoolTable(name, (at, 0)) for name in pools}
        self.sessions: dict[tuple[str, int], Session] = {}
        self._by_request: dict[tuple[str, str], dict[int, Session]] = {}
        self.stamp: Document = {}
        self.applied = 0

    @property
    def seconds(self) -> int:
        """The database's time at the last change, in seconds since the epoch."""
        return self._last_at >> 32

    def load(self, space: str, documents: Iterable[Document]) -> None:
        """Take in what was read at the table's first cluster time. No events come of it."""
        for document in documents:
            self._put(space, str(document["_id"]), document, (self._last_at, 0))

    def resume(self, versions: Mapping[str, Version]) -> None:
        """Go on in a history in which consumers hold these versions. The last leader's table may have begun
        later than this one: then a pool in which nothing has happened since has a later version there, and no
        consumer could tell this table's from what comes late."""
        for name, version in versions.items():
            pool = self.pools[name]
            if version > (0, 0) and (pool.version == (self.started, 0) or pool.version < version):
                pool.version = version

    def apply(self, change: Change) -> list[Event]:
        """Fold one change of the stream; returns what consumers must hear of it, in order."""
        self._part = self._part + 1 if change.at == self._last_at else 0
        self._last_at = change.at
        self.applied += 1
        version = (change.at, self._part)
        if change.gone:
            return self._put(change.space, change.key, None, version, change.token)
        document = change.document
        if document is None:
            known = self._known(change.space, change.key)
            document = docs.merge(known, change.updated or {}, change.removed)
        return self._put(change.space, change.key, document, version, change.token)

    def is_live(self, session: Session | None) -> bool:
        return session is not None and session.state == LIVE

    def alive(self) -> list[Session]:
        """Sessions that are not dead, whether they have spoken yet or not."""
        return [session for session in self.sessions.values() if session.state != DEAD]

    def opened_by(self, pod: str, request_id: str) -> Session | None:
        """The session that a request has opened. A former leader's write of another one may come late: the
        newest is the one that was answered."""
        opened = self._by_request.get((pod, request_id), {})
        return opened[max(opened)] if opened else None

    def chunks_of(self, key: tuple[str, int]) -> list[tuple[str, Chunk]]:
        """All chunks of one incarnation, with their pools."""
        return [
            (pool.name, pool.chunks[n])
            for pool in self.pools.values()
            if key in pool.held
            for n in pool.held[key].numbers
        ]

    # --- folding --------------------------------------------------------------------------------

    def _known(self, space: str, key: str) -> Document:
        """The document that an update is merged into, as far as the table keeps it."""
        if space == STAMPS:
            return self.stamp
        if space == SESSIONS:
            number = docs.session_number(key)
            session = self.sessions.get(number) if number else None
            return session.document if session else {"_id": key}
        pool = self.pools[space]
        n = docs.chunk_number(key)
        if n is not None:
            chunk = pool.chunks.get(n)
            return chunk.document if chunk else {"_id": key}
        keepalive = pool.keepalives.get(key)
        return {"_id": key} | (keepalive.document if keepalive else pool.odd.get(key, {}))

    def _put(
        self, space: str, key: str, document: Document | None, version: Version, token: str = ""
    ) -> list[Event]:
        if space == STAMPS:
            self.stamp = document or {}
            return []
        if space == SESSIONS:
            return self._put_session(key, document, version, token)
        pool = self.pools[space]
        n = docs.chunk_number(key)
        if n is not None:
            return self._put_chunk(pool, n, docs.read_chunk(document) if document else None, version, token)
        return self._put_keepalive(pool, key, document, version, token)

    def _put_chunk(
        self, pool: PoolTable, n: int, new: Chunk | None, version: Version, token: str
    ) -> list[Event]:
        old = pool.chunks.get(n)
        self._index(pool, old, new)
        if (
            new is not None
            and new.owner.is_go
            and (old is None or (old.owner != new.owner and old.drsm == new.drsm))
        ):
            self._sign(pool, new.pod)  # what the agent gives to a Go pod changes `drsm`, too
        _note_known(pool, old, new, version[0])
        if old is None and new is None:
            return []
        if old is None:
            return (
                [self._event(pool, ev.ALLOCATED, version, token, owner=pool.shown(new.owner), chunks=(n,))]
                if new
                else []
            )
        if new is None:
            return [
                self._event(pool, ev.RELEASED, version, token, previous=pool.shown(old.owner), chunks=(n,))
            ]
        if (new.owner, new.grant) != (old.owner, old.grant):
            return [
                self._event(
                    pool,
                    ev.CLAIMED,
                    version,
                    token,
                    owner=pool.shown(new.owner),
                    previous=pool.shown(old.owner),
                    chunks=(n,),
                    grants=(new.grant,),
                    hold_ms=new.hold_ms,
                )
            ]
        if old.marked and not new.marked:
            return [self._event(pool, ev.SCANNED, version, token, owner=new.owner, chunks=(n,))]
        return []

    def _index(self, pool: PoolTable, old: Chunk | None, new: Chunk | None) -> None:
        if old is not None:
            del pool.chunks[old.n]
            pool.marked.discard(old.n)
            key = old.owner.key
            pool.checksum -= self._hashes.ownership(old.n, *key)
            held = pool.held[key]
            del held.numbers[old.n]
            held.checksum = (held.checksum - self._hashes.holding(old.n, old.grant, old.marked)) % 2**64
            if not held.numbers:
                del pool.held[key]
            if old.request_id:
                _drop(pool.requests, old.request_id, old.n)
            pool.go_chunks -= old.owner.is_go
            for name in _came_from(old):
                _drop(pool.from_go, name, old.n)
        if new is not None:
            key = new.owner.key
            pool.chunks[new.n] = new
            pool.checksum += self._hashes.ownership(new.n, *key)
            held = pool.held.setdefault(key, Held())
            held.numbers[new.n] = None
            held.checksum = (held.checksum + self._hashes.holding(new.n, new.grant, new.marked)) % 2**64
            if new.request_id:
                pool.requests.setdefault(new.request_id, {})[new.n] = None
            if new.marked:
                pool.marked.add(new.n)
            pool.go_chunks += new.owner.is_go
            for name in _came_from(new):
                pool.from_go.setdefault(name, {})[new.n] = None
        pool.checksum %= 2**64

    def _put_session(self, key: str, document: Document | None, version: Version, token: str) -> list[Event]:
        number = docs.session_number(key)
        if number is None:
            return []
        new = docs.read_session(document) if document else None
        old = self.sessions.pop(number, None)
        if old:
            _drop(self._by_request, (old.pod, old.request_id), old.incarnation)
        if new:
            self.sessions[new.key] = new
            self._by_request.setdefault((new.pod, new.request_id), {})[new.incarnation] = new
        before = old.pools if old and self.is_live(old) else ()
        after = new.pools if new and self.is_live(new) else ()
        reason = (new.reason if new else "") or "expired"
        out: list[Event] = []
        for pool in self.pools.values():
            if old and pool.name in before and pool.name not in after:
                out += self._down(pool, old.owner, reason, version, token)
            if new and pool.name in after and pool.name not in before:
                out += self._up(pool, new.owner, version, token)
        return out

    def _put_keepalive(
        self, pool: PoolTable, key: str, document: Document | None, version: Version, token: str
    ) -> list[Event]:
        new = docs.read_keepalive(document) if document else None
        old = pool.keepalives.pop(key, None)
        pool.odd.pop(key, None)
        if document and not new and len(pool.odd) < ODD_MAX:
            pool.odd[key] = docs.odd_fields(document)
        if new:
            pool.keepalives[key] = new
            if new.mirrored is None and (old is None or old.mirrored or old.expire_at != new.expire_at):
                self._sign(pool, new.pod)
        elif old:
            _note_gone(pool, key, version[0])
        for keepalive, step in ((old, -1), (new, 1)):
            pool.go_keepalives += step if keepalive and keepalive.go_owner else 0
        _note_lives(pool, old, new, version[0])
        return self._judged(pool, old, new, version, token)

    def _judged(
        self, pool: PoolTable, old: Keepalive | None, new: Keepalive | None, version: Version, token: str
    ) -> list[Event]:
        """What consumers must hear of a Go pod, whose state is a function of the documents
        (`PoolTable.state`)."""
        before, after = old and old.go_state, new and new.go_state
        if before == after:
            return []
        if before:
            pool.live.pop(before.owner.key, None)
            pool.down.pop(before.owner.key, None)
        if after and not after.down:  # also one that comes back with another address: one change is one event
            return self._up(pool, after.owner, version, token)
        if after:
            pool.down[after.owner.key] = after.owner
            return self._down(pool, after.owner, SILENT, version, token)
        return self._down(pool, _of_chunks(pool, before.owner), DELETED, version, token) if before else []

    @staticmethod
    def _sign(pool: PoolTable, name: str) -> None:
        pool.signs[name] = pool.signs.get(name, 0) + 1

    def _up(self, pool: PoolTable, owner: Owner, version: Version, token: str) -> list[Event]:
        pool.live[owner.key] = owner
        return [self._event(pool, ev.UP, version, token, owner=owner)]

    def _down(self, pool: PoolTable, owner: Owner, reason: str, version: Version, token: str) -> list[Event]:
        pool.live.pop(owner.key, None)
        return [self._event(pool, ev.DOWN, version, token, owner=owner, reason=reason)]

    @staticmethod
    def _event(pool: PoolTable, kind: str, version: Version, token: str, **fields: Any) -> Event:
        prev, pool.version = pool.version, version
        return Event(pool=pool.name, kind=kind, version=version, prev=prev, token=token, **fields)


def _drop(index: dict[K, dict[int, V]], key: K, n: int) -> None:
    numbers = index[key]
    del numbers[n]
    if not numbers:
        del index[key]


def _note_gone(pool: PoolTable, name: str, at: int) -> None:
    """A keepalive was deleted at a cluster time. Those of a minute ago do not matter any more."""
    pool.gone = {one: then for one, then in pool.gone.items() if (at >> 32) - (then >> 32) < GONE_SECONDS}
    pool.gone[name] = at


def _of_chunks(pool: PoolTable, owner: Owner) -> Owner:
    """A Go pod as its chunks name it, if it has some."""
    held = pool.held.get(owner.key)
    return pool.chunks[next(iter(held.numbers))].owner if held else owner


def _came_from(chunk: Chunk) -> tuple[str, ...]:
    """The Go pods that an SDK pod's chunk came from."""
    return () if chunk.owner.is_go else chunk.go_owners


def _note_known(pool: PoolTable, old: Chunk | None, new: Chunk | None, at: int) -> None:
    """A number that becomes free is one that every Go pod of this moment knows."""
    if old is not None and new is None and pool.go_since:
        pool.known_free[old.n] = at
    elif new is not None:
        pool.known_free.pop(new.n, None)


def _note_lives(pool: PoolTable, old: Keepalive | None, new: Keepalive | None, at: int) -> None:
    """A Go pod that begins knows what is owned then, and learns each number that is granted from then on.
    One at another address is another one. What only those before it knew is new again."""
    before, after = old and old.go_state, new and new.go_state
    if (before and before.owner) == (after and after.owner):  # whether it is silent or not: it may go on
        return
    if before:
        pool.go_since.pop(before.owner.name, None)
    if after:
        pool.go_since[after.owner.name] = at
    oldest = min(pool.go_since.values(), default=None)
    pool.known_free = {} if oldest is None else {n: f for n, f in pool.known_free.items() if f >= oldest}
