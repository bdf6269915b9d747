"""Every request, answer, snapshot page and event, with its fields. One dataclass per row of the protocol.

Durations on the wire are milliseconds as integers and always lengths of time, never points in it;
the one exception, `EventHead.at`, is for people. A version is `(clusterTime as seconds << 32 |
increment, part)`, compared in that order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drsm_sdk.wire import codec
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import valid_pool_name

WIRE_VERSION = 1
CONTENT_TYPE_HEADER = "Content-Type"
CONTENT_TYPE, JSON_CONTENT_TYPE = "application/msgpack", "application/json"
STATUS_HEADER = "Status"
"""Of what the NATS server itself says; nobody else's messages have it."""
SUMMARY_HEADER = "Drsm-Summary"
"""On every event: it as one readable line."""
STAMPED_BYTES_MAX = 4096
"""Bytes of an answer in which the stamp is looked for twice. Larger ones are snapshot pages as a rule."""
ACQUIRE_COUNT_MAX = 256
"""Chunks one request may ask for: a quarter of a million ids, one bulk write, an answer of 8 KiB."""
CHUNKS_PER_EVENT = 1000
"""Neighbouring changes that one event carries at most: 40 KiB with grants, far below any max_payload."""
POOLS_PER_SESSION_MAX = 64
"""Pools that a session may join, at once or one after the other: `open` and `report` name them all."""

POD_NAME_MAX, IP_MAX, INSTANCE_MAX = 253, 64, 256
"""Characters of an owner's texts: a DNS-1123 name; an address with its zone; a name or UUID with room. Every
event carries up to two owners, whole."""
REQUEST_ID_MAX = 64
"""Twice a UUID in hexadecimal digits; it is kept in every chunk that the request got."""

Version = tuple[int, int]
Prefixes = dict[str, tuple[str, ...]]

_DNS_LABELS = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_CHUNK_DOCUMENT = re.compile(r"chunkid-[0-9]+")
_GRANT = re.compile(r"[0-9a-f]{16}")
_UNPRINTABLE = re.compile(r"[^ -~]")


def check_pod_name(name: str) -> None:
    """Raise ValueError unless `name` is a DNS-1123 subdomain that no chunk document has for its `_id`."""
    if len(name) > POD_NAME_MAX or not _DNS_LABELS.fullmatch(name):
        raise ValueError("pod name: expected a DNS-1123 name (a-z, 0-9, '-', '.'; at most 253 characters)")
    if _CHUNK_DOCUMENT.fullmatch(name):
        raise ValueError("pod name: 'chunkid-<number>' names chunk documents; give the pod another name")


def _check_text(name: str, value: str, longest: int) -> None:
    if len(value) > longest or not value.isprintable():
        raise ValueError(f"{name}: expected at most {longest} printable characters")


def _check_request_id(value: str) -> None:
    if not value:
        raise ValueError("request_id: expected 1 to 64 printable characters")
    _check_text("request_id", value, REQUEST_ID_MAX)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who said it: on every answer, page and event. Answers of a lower term than seen are dropped."""

    agent: str
    term: int
    history: str


@dataclass(frozen=True, slots=True)
class OwnerRef:
    """A pod incarnation, always whole. Incarnation 0 is a Go DRSM pod."""

    name: str
    ip: str
    instance: str
    incarnation: int


# --- Sessions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PodRef:
    """A pod as it presents itself: Kubernetes pod name, IP address, instance (for example the NF id)."""

    name: str
    ip: str
    instance: str

    def __post_init__(self) -> None:
        check_pod_name(self.name)
        _check_text("ip", self.ip, IP_MAX)
        _check_text("instance", self.instance, INSTANCE_MAX)


def _check_pools(pools: tuple[str, ...]) -> None:
    if len(pools) > POOLS_PER_SESSION_MAX:
        raise ValueError(f"pools: expected at most {POOLS_PER_SESSION_MAX}, found {len(pools)}")
    for pool in pools:
        if not valid_pool_name(pool):
            raise ValueError("pools: expected names that match [a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a session. The same `request_id` gets the same incarnation."""

    pod: PodRef
    pools: tuple[str, ...]
    request_id: str

    def __post_init__(self) -> None:
        _check_pools(self.pools)
        _check_request_id(self.request_id)


@dataclass(frozen=True, slots=True)
class Opened:
    """`liveness_ms` and `allocation_ms` are what the pod may count from before it sent (rule R1)."""

    incarnation: int
    definitions: tuple[Definition, ...]
    liveness_ms: int
    allocation_ms: int
    renew_ms: int


@dataclass(frozen=True, slots=True)
class Join:
    """Take part in more pools; idempotent."""

    pod: str
    incarnation: int
    pools: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_pools(self.pools)


@dataclass(frozen=True, slots=True)
class Joined:
    definitions: tuple[Definition, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """What a pod says of its stock in one pool: for operators, and to ask empty chunks back; never for
    decisions about ownership. `released` counts the ids that it has released, ever."""

    issued: int = 0
    free: int = 0
    oldest_ms: int = 0
    scanning: int = 0
    released: int = 0


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew both leases. `held` is, per pool, (count, checksum) of the chunks that the pod holds."""

    pod: str
    incarnation: int
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    use: dict[str, Use] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Renewed:
    liveness_ms: int
    allocation_ms: int
    renew_ms: int
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    give_back: dict[str, int] = field(default_factory=dict)


TOTAL_UNKNOWN = 2**32 - 1
"""More than any pod holds: a report that does not say how much there is, is never complete."""


@dataclass(frozen=True, slots=True)
class Report:
    """After an announced restore: the chunks (pool, n, grant, marked) that a living pod holds. It holds
    `total` in all its reports of one time. A session that the database has lost is put back only with
    `ip`, `instance` and `pools`, as it was opened."""

    pod: str
    incarnation: int
    chunks: tuple[tuple[str, int, str, bool], ...]
    total: int = TOTAL_UNKNOWN
    ip: str = ""
    instance: str = ""
    pools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(valid_pool_name(pool) and _GRANT.fullmatch(grant) for pool, _, grant, _ in self.chunks):
            raise ValueError("chunks: expected [pool, number, grant, marked] with a grant of 16 hex digits")
        _check_pools(self.pools)
        if self.pools:  # it may become a document
            PodRef(self.pod, self.ip, self.instance)


@dataclass(frozen=True, slots=True)
class Reported:
    accepted: int


@dataclass(frozen=True, slots=True)
class SessionRef:
    """The request of `session.chunks` and of `session.close`."""

    pod: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class SessionChunks:
    """What the agent says that the session owns: (pool, n, grant, hold_ms or None when unmarked)."""

    chunks: tuple[tuple[str, int, str, int | None], ...]
    version: dict[str, Version]


# --- Pools --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acquire:
    """Ask for 1..256 chunks. The same `request_id` gets the same chunks."""

    pod: str
    incarnation: int
    count: int
    request_id: str

    def __post_init__(self) -> None:
        if not 1 <= self.count <= ACQUIRE_COUNT_MAX:
            raise ValueError(f"count: expected 1..{ACQUIRE_COUNT_MAX}, found {self.count}")
        _check_request_id(self.request_id)


@dataclass(frozen=True, slots=True)
class Acquired:
    """`revision` is that of the definition by which the chunks were granted: the same number may be other
    ids by another one. 0 of an agent that does not say so."""

    chunks: tuple[tuple[int, str], ...]
    version: Version
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The request of `release` and of `scanned`: (n, grant) pairs."""

    pod: str
    incarnation: int
    chunks: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        if len(self.chunks) > CHUNKS_PER_EVENT:
            raise ValueError(f"chunks: expected at most {CHUNKS_PER_EVENT}, found {len(self.chunks)}")
        if not all(_GRANT.fullmatch(grant) for _, grant in self.chunks):
            raise ValueError("chunks: expected [number, grant] with a grant of 16 hex digits")


@dataclass(frozen=True, slots=True)
class Released:
    released: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    cleared: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SnapshotOwner:
    """An owner in a snapshot; `state` is `live`, `down` while its chunks are about to move, or `unknown`: a
    Go pod that has chunks and no keepalive."""

    name: str
    ip: str
    instance: str
    incarnation: int
    state: str

    @property
    def ref(self) -> OwnerRef:
        return OwnerRef(self.name, self.ip, self.instance, self.incarnation)


@dataclass(frozen=True, slots=True)
class SnapshotPage:
    """One page of a pool's table. `chunks` pairs an index into this page's `owners` with numbers."""

    version: Version
    page: int
    owners: tuple[SnapshotOwner, ...]
    chunks: tuple[tuple[int, tuple[int, ...]], ...]
    marked: tuple[int, ...] = ()
    definition: Definition | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class PodState:
    pod: OwnerRef
    state: str
    chunks: int
    marked: int
    use: Use | None


@dataclass(frozen=True, slots=True)
class Pods:
    pods: tuple[PodState, ...]


@dataclass(frozen=True, slots=True)
class OwnerQuery:
    """Whose id is it? A number, or an address as text; `space` where a pool has several."""

    id: int | str
    space: str | None = None


@dataclass(frozen=True, slots=True)
class OwnerAnswer:
    chunk: int | None
    owner: SnapshotOwner | None
    marked: bool


@dataclass(frozen=True, slots=True)
class PoolState:
    definition: Definition
    chunks: int
    capacity: int
    pods: int
    orphans: int
    marked: int


@dataclass(frozen=True, slots=True)
class LeaderState:
    agent: str
    term: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class Pools:
    pools: tuple[PoolState, ...]
    leader: LeaderState


@dataclass(frozen=True, slots=True)
class Empty:
    """The empty map: the request of `pools`, `snapshot`, `pods`; the answer of `session.close`."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The leader's request to itself, and its answer."""

    nonce: str

    def __post_init__(self) -> None:
        _check_text("nonce", self.nonce, 64)


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """After the last page: `pages` of this version were sent."""

    version: Version
    pages: int


# --- Errors -------------------------------------------------------------------------------------

ERROR_CODES = {
    "bad_request": 400,
    "not_joined": 403,
    "unknown_pool": 404,
    "session_lost": 410,
    "too_large": 413,
    "internal": 500,
    "store_unavailable": 503,
    "pool_exhausted": 507,
}
ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"


def of_an_agent(headers: Mapping[str, str], data: bytes) -> bool:
    """Whether an answer is an agent's, or the NATS server's word that nobody listens. Others may answer, too:
    a JetStream stream that records requests acknowledges each of them to who asked, and is mostly the first.
    A body that is not read here because of its size counts by its content type alone."""
    if STATUS_HEADER in headers:
        return True
    if headers.get(CONTENT_TYPE_HEADER) not in {CONTENT_TYPE, JSON_CONTENT_TYPE}:
        return False
    if ERROR_CODE_HEADER in headers or len(data) > STAMPED_BYTES_MAX:
        return True
    try:
        return {"agent", "term", "history"} <= codec.decode(data).keys()
    except codec.DecodeError:
        return False


@dataclass(frozen=True, slots=True)
class Failure:
    """An error answer. `retry` says whether the same request may succeed later, and `wait_ms`, unless 0, when
    it will at the latest."""

    error: str
    message: str
    reason: str = ""
    retry: bool = False
    wait_ms: int = 0

    @property
    def code(self) -> int:
        return ERROR_CODES.get(self.error, 500)


# --- Events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventHead:
    """What every event carries. `prev` is the version of the pool's event before it."""

    pool: str
    version: Version
    prev: Version
    agent: str
    term: int
    history: str
    at: int
    v: int = WIRE_VERSION


@dataclass(frozen=True, slots=True)
class PodUp:
    pod: OwnerRef


@dataclass(frozen=True, slots=True)
class PodDown:
    """`reason`: `expired`, `closed`, `superseded`, or `deleted` (a Go pod)."""

    pod: OwnerRef
    reason: str


@dataclass(frozen=True, slots=True)
class ChunkAllocated:
    """`prefixes` of this and the other events of chunks: of each space of addresses, by its name, what the
    chunks are as prefixes, in the order of `chunks`; for who programs routes. Empty text for a chunk that
    the pool does not have."""

    owner: OwnerRef
    chunks: tuple[int, ...]
    prefixes: Prefixes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkClaimed:
    """`grants` in the order of `chunks`; nothing is issued from them for `hold_ms`."""

    owner: OwnerRef
    previous: OwnerRef
    chunks: tuple[int, ...]
    grants: tuple[str, ...]
    hold_ms: int
    prefixes: Prefixes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkScanned:
    owner: OwnerRef
    chunks: tuple[int, ...]
    prefixes: Prefixes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkReleased:
    previous: OwnerRef
    chunks: tuple[int, ...]
    prefixes: Prefixes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sync:
    """The table at this version: living pods, owned chunks, and the checksum over all owners; and the
    `revision` of the pool's definition, which a snapshot carries."""

    pods: int
    chunks: int
    checksum: int
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """History was lost or the database went back: take a snapshot."""

    reason: str


EventBody = PodUp | PodDown | ChunkAllocated | ChunkClaimed | ChunkScanned | ChunkReleased | Sync | Reset

EVENT_KINDS: dict[str, type[EventBody]] = {
    "pod.up": PodUp,
    "pod.down": PodDown,
    "chunk.allocated": ChunkAllocated,
    "chunk.claimed": ChunkClaimed,
    "chunk.scanned": ChunkScanned,
    "chunk.released": ChunkReleased,
    "sync": Sync,
    "reset": Reset,
}
EVENT_VERBS: dict[type[Any], str] = {kind: verb for verb, kind in EVENT_KINDS.items()}


def summary(head: EventHead, body: EventBody) -> str:
    """An event as one readable line of ASCII: the header `Drsm-Summary`."""
    match body:
        case PodUp(pod):
            said = f"pod up {_named(pod)}"
        case PodDown(pod, reason):
            said = f"pod down {_named(pod)} ({reason})"
        case ChunkAllocated(owner, chunks):
            said = f"allocated {_numbers(chunks)} to {_named(owner)}"
        case ChunkClaimed(owner, previous, chunks, _, hold_ms):
            said = f"claimed {_numbers(chunks)} by {_named(owner)} from {_named(previous)}, hold {hold_ms} ms"
        case ChunkScanned(owner, chunks):
            said = f"scanned {_numbers(chunks)} by {_named(owner)}"
        case ChunkReleased(previous, chunks):
            said = f"released {_numbers(chunks)} by {_named(previous)}"
        case Sync(pods, chunks, checksum):
            said = f"sync {pods} pods, {chunks} chunks, checksum {checksum:016x}"
        case Reset(reason):
            said = f"reset: {reason}"
    return printable(f"{head.pool} {said}")[:200]


def printable(text: object) -> str:
    """Names of Go pods may be anything, and so may strangers' messages: ASCII of it that commands neither a
    header nor a terminal."""
    return _UNPRINTABLE.sub("?", str(text))


def _named(pod: OwnerRef) -> str:
    return f"{pod.name}:{pod.incarnation}"  # as the `_id` of its session in MongoDB


def _numbers(chunks: tuple[int, ...]) -> str:
    shown = ",".join(map(str, chunks[:8]))
    return (
        f"chunk {shown}" if len(chunks) == 1 else f"{len(chunks)} chunks {shown}{',..' * (len(chunks) > 8)}"
    )
