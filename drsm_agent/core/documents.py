"""What the MongoDB documents mean: plain dicts to records and back, and updates merged into them.

The chunk and keepalive documents are Go DRSM's own, with one sub-document `drsm` added that it
ignores. A Go pod that claims sets the three pod fields and leaves `drsm` stale, so a chunk's `drsm`
counts only while its copies equal them. Whose a keepalive is shows in its `podInstance`, which for the
agent's begins with `drsm:`, as no Go pod writes it; and in its end, which the agent writes twice and a Go pod
once. docs/protocol.md names every field.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any

Document = dict[str, Any]

POD_NAME_MAX, IP_MAX, INSTANCE_MAX = 253, 64, 256
"""As the wire has them. Anybody may write into a pool's collection up to 16 MiB; a message that has no room
for an owner would end every agent, one after the other."""
GRANT_MAX, REQUEST_ID_MAX = 16, 64
"""As the wire has them; grants go out with claims."""
REASON_MAX = 64
"""Of an end; the agent's own are single words, and go out with `pod.down`."""
PROMISED_MS_MAX = 86_400_000
"""A day, as `A` has at most. With `W` it is a hold, which must fit into a document, too."""
GO_OWNERS_MAX = 8
"""Go pods that a chunk remembers it came from. More can only be when none of them was seen to live for eight
claims; the newest are kept."""

_KEEPALIVE_FIELDS = ("_id", "type", "podId", "podIp", "podInstance", "expireAt", "drsm")
_CHUNK_ID = re.compile(r"chunkid-(0|[1-9][0-9]{0,18})")
_SESSION_ID = re.compile(r"(.+):([0-9]{1,20})")
NO_END = True
"""What `silent` is for a Go keepalive without an end."""
_OURS_BEGIN = "drsm:"
_OURS = _OURS_BEGIN + "{}:{}"
_OURS_MAX = len(_OURS) + POD_NAME_MAX + 20
ODD_FIELD_MAX = 2048
"""Characters of a field that are kept of a document which is no keepalive, or not readable as one; a Go
pod's renewal may heal it."""
GO_INCARNATION = 0


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """One life of a pod; incarnation 0 is a Go DRSM pod, which has none. What a Go document does not say of
    it is empty."""

    name: str
    ip: str
    instance: str
    incarnation: int

    @property
    def is_go(self) -> bool:
        return self.incarnation == GO_INCARNATION

    @property
    def key(self) -> tuple[str, int]:
        """What tells owners apart."""
        return (self.name, self.incarnation)


@dataclass(frozen=True, slots=True)
class Drsm:
    """A chunk's sub-document that only the agent writes. `go_owners` are the Go pods that it came from,
    through all claims: one that stood still may go on issuing from it. `returned`: it was claimed from a
    former life of the pod that has it."""

    pod: str
    ip: str
    instance: str
    incarnation: int
    grant: str = ""
    marked: bool = False
    hold_ms: int = 0
    request_id: str = ""
    go_owners: tuple[str, ...] = ()
    returned: bool = False

    @property
    def owner(self) -> Owner:
        return Owner(self.pod, self.ip, self.instance, self.incarnation)

    @property
    def document(self) -> Document:
        fields = _fields(self)
        for name in ("go_owners", "returned"):  # neither, as a rule, and there may be a million chunks
            if not fields[name]:
                del fields[name]
        return fields


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk document as it stands, the stale parts included. None: a Go document without the field. `odd`
    is a `drsm` that cannot be read, and counts for nothing but to be told again from another."""

    n: int
    pod: str
    ip: str | None
    instance: str | None
    drsm: Drsm | None = None
    odd: Any = field(default=None, compare=False)

    @property
    def valid(self) -> Drsm | None:
        """`drsm` while it counts: its copies equal the three fields that Go pods write."""
        drsm = self.drsm
        if drsm and (drsm.pod, drsm.ip, drsm.instance) == (self.pod, self.ip, self.instance):
            return drsm
        return None

    @property
    def owner(self) -> Owner:
        drsm = self.valid
        incarnation = drsm.incarnation if drsm else GO_INCARNATION
        return Owner(self.pod, self.ip or "", self.instance or "", incarnation)

    @property
    def grant(self) -> str:
        return drsm.grant if (drsm := self.valid) else ""

    @property
    def marked(self) -> bool:
        return bool((drsm := self.valid) and drsm.marked)

    @property
    def hold_ms(self) -> int:
        return drsm.hold_ms if (drsm := self.valid) else 0

    @property
    def request_id(self) -> str:
        return drsm.request_id if (drsm := self.valid) else ""

    @property
    def go_owners(self) -> tuple[str, ...]:
        """The Go pods that it came from, but for the one that owns it now."""
        return self.drsm.go_owners if self.drsm else ()

    @property
    def document(self) -> Document:
        key = chunk_key(self.n)
        document = {"_id": key, "type": "chunk", "chunkId": key, "podId": self.pod}
        if self.instance is not None:
            document["podInstance"] = self.instance
        if self.ip is not None:
            document["podIp"] = self.ip
        if self.odd is not None:
            document["drsm"] = self.odd
        return document | ({"drsm": self.drsm.document} if self.drsm else {})


@dataclass(frozen=True, slots=True)
class GoState:
    """What a keepalive says of the Go pod of its name."""

    owner: Owner
    down: bool


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A keepalive document in one pool; `pod` is its `_id`. It is a Go pod's own, or the agent's, for an SDK
    pod (its mirror) or for a Go pod that has none and is silent (incarnation 0). The agent's has its
    `instance`, and `end` equal to `expire_at`: every Go pod's renewal changes the latter, and where it writes
    no instance nothing else.

    On a Go pod's own the agent writes `silent`, equal to `expire_at` once that stood unchanged for too long;
    a renewal ends it. `go` is what a mirror says of the Go pod of its name.
    """

    pod: str
    ip: str | None
    instance: str | None
    owner: Owner | None = None
    expire_at: Any = None
    end: Any = None
    silent: Any = None
    go: GoState | None = None

    @property
    def mirrored(self) -> Owner | None:
        """The incarnation that the agent shows by it; None for a Go pod's own."""
        owner = self.owner
        ours = owner and self.instance == our_instance(owner) and self.end == self.expire_at
        return owner if ours else None

    @property
    def go_owner(self) -> Owner | None:
        """The Go pod that keeps it up, or did before it fell silent; None for a mirror from which no Go pod
        was heard for too long."""
        told = self.go_state
        return told.owner if told and not (told.down and self.mirrored) else None

    @property
    def go_state(self) -> GoState | None:
        """What it says of the Go pod of its name; None for a mirror that says nothing of one."""
        if (mirrored := self.mirrored) is None:
            owner = Owner(self.pod, self._go_ip, self._go_instance, GO_INCARNATION)
            seen = NO_END if self.expire_at is None else self.expire_at
            return GoState(owner, down=self.silent is not None and self.silent == seen)
        if mirrored.is_go:
            return GoState(mirrored, down=True)
        return self.go

    @property
    def go_down(self) -> bool:
        """Whether it says that the Go pod of its name is down."""
        told = self.go_state
        return told is not None and told.down

    @property
    def _go_ip(self) -> str:
        """A Go pod that writes no address leaves the one that the agent wrote for its own pod."""
        wrote_none = self.owner and self.owner.ip == self.ip and self.go and not self.go.owner.ip
        return "" if wrote_none else self.ip or ""

    @property
    def _go_instance(self) -> str:
        """The same for the instance."""
        instance = self.instance or ""
        return "" if instance.startswith(_OURS_BEGIN) else instance

    @property
    def document(self) -> Document:
        """As much of it as matters, but for the `_id`."""
        document: Document = {"type": "keepalive", "podId": self.pod, "expireAt": self.expire_at}
        if self.ip is not None:
            document["podIp"] = self.ip
        if self.instance is not None:
            document["podInstance"] = self.instance
        drsm = owner_fields(self.owner) if self.owner else {}
        if self.end is not None:
            drsm["end"] = self.end
        if self.silent is not None:
            drsm["silent"] = self.silent
        if self.go is not None:
            drsm["go"] = go_state_fields(self.go)
        return document | ({"drsm": drsm} if drsm else {})


def our_instance(owner: Owner) -> str:
    """The `podInstance` of the keepalive that shows an incarnation: never one that a Go pod has, so that its
    `DeletePod` finds no living pod of ours."""
    return _OURS.format(owner.name, owner.incarnation)


def owner_fields(owner: Owner) -> Document:
    """An incarnation as `drsm` has it."""
    return {"pod": owner.name, "ip": owner.ip, "instance": owner.instance, "incarnation": owner.incarnation}


def go_state_fields(told: GoState) -> Document:
    """What a mirror says of a Go pod, as `drsm.go` has it."""
    return {"ip": told.owner.ip, "instance": told.owner.instance, "down": told.down}


OPENED, LIVE, DEAD = "opened", "live", "dead"


@dataclass(frozen=True, slots=True)
class Session:
    """A session document. `state` goes opened -> live -> dead and never back; `reason` says why it died."""

    pod: str
    ip: str
    instance: str
    incarnation: int
    term: int
    state: str
    pools: tuple[str, ...]
    request_id: str
    promised_ms: int
    reason: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return (self.pod, self.incarnation)

    @property
    def owner(self) -> Owner:
        return Owner(self.pod, self.ip, self.instance, self.incarnation)

    @property
    def document(self) -> Document:
        return {"_id": session_key(self.pod, self.incarnation), "type": "session"} | _fields(self)


def _fields(record: Drsm | Session) -> Document:
    """The fields as they are, none of which can be changed; `asdict` would copy each, for every event."""
    return {name: getattr(record, name) for name in record.__slots__}


def chunk_key(n: int) -> str:
    return f"chunkid-{n}"


def session_key(pod: str, incarnation: int) -> str:
    return f"{pod}:{incarnation}"


def session_number(key: str) -> tuple[str, int] | None:
    """The pod and the incarnation in a session document's `_id`; None for any other `_id`."""
    match = _SESSION_ID.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def chunk_number(key: str) -> int | None:
    """The number in a chunk document's `_id`; None for any other `_id` (never a made-up chunk 0)."""
    match = _CHUNK_ID.fullmatch(key)
    return int(match[1]) if match else None


def read_chunk(document: Mapping[str, Any]) -> Chunk | None:
    """The chunk in a pool's document, or None when it is not one, or not readable as one."""
    n, pod = chunk_number(str(document.get("_id"))), document.get("podId")
    if n is None or not isinstance(pod, str):
        return None
    drsm = _read_drsm(document.get("drsm"))
    try:
        return Chunk(
            n=n,
            pod=_text(pod, POD_NAME_MAX),
            ip=_text_or_none(document.get("podIp"), IP_MAX),
            instance=_text_or_none(document.get("podInstance"), INSTANCE_MAX),
            drsm=drsm,
            odd=document.get("drsm") if drsm is None else None,
        )
    except ValueError:
        return None


def read_keepalive(document: Mapping[str, Any]) -> Keepalive | None:
    """The keepalive in a pool's document, or None when it is none, or not readable as one."""
    if document.get("type") != "keepalive":
        return None
    drsm = document.get("drsm")
    beside = drsm if isinstance(drsm, Mapping) else {}
    try:
        key = _text(document.get("_id"), POD_NAME_MAX)  # it is part of the token that an event carries
        keepalive = Keepalive(
            pod=key,
            ip=_text_or_none(document.get("podIp"), IP_MAX),
            instance=_text_or_none(document.get("podInstance"), max(INSTANCE_MAX, _OURS_MAX)),
            owner=_read_owner(beside),
            expire_at=_read_end(document.get("expireAt")),
            end=beside.get("end"),
            silent=beside.get("silent"),
            go=_read_go_state(key, beside.get("go")),
        )
    except ValueError:
        return None
    mirrored, instance = keepalive.mirrored, keepalive.instance or ""
    if len(instance) > INSTANCE_MAX and not instance.startswith(_OURS_BEGIN):
        return None
    if mirrored is not None and mirrored.name != key:  # a copy of one of ours, under another name
        return None
    return keepalive


def odd_fields(document: Mapping[str, Any]) -> Document:
    """What is kept of a document that no keepalive can be read from: updates are merged into it. What is too
    large becomes something that cannot be read either."""
    fields = {name: document[name] for name in _KEEPALIVE_FIELDS if name in document}
    return {name: value if len(repr(value)) <= ODD_FIELD_MAX else b"" for name, value in fields.items()}


def read_session(document: Mapping[str, Any]) -> Session | None:
    """The session in a document of `drsm_sessions`, or None when it is not readable as one. Its `_id` is made
    of its fields: it is part of the token that an event carries, too."""
    try:
        pod, ip, instance = _who(document["pod"], document["ip"], document["instance"])
        incarnation = _whole(document["incarnation"])
        if document.get("_id") != session_key(pod, incarnation):
            return None
        return Session(
            pod=pod,
            ip=ip,
            instance=instance,
            incarnation=incarnation,
            term=_whole(document["term"]),
            state=str(document["state"]),
            pools=tuple(map(str, document["pools"])),
            request_id=str(document["request_id"]),
            promised_ms=_whole(document["promised_ms"], PROMISED_MS_MAX),
            reason=_text(document.get("reason", ""), REASON_MAX),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _whole(value: Any, most: int = 2**63 - 1) -> int:
    """An integer. Shells that write each number as a double leave the one that it was, and MongoDB's guards
    see none of that; anything else was written by somebody else, and does not count."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"expected an integer from 0 to {most}")
    return value


def _text(value: Any, longest: int) -> str:
    """A text that a message has room for."""
    text = str(value)
    if len(text) > longest:
        raise ValueError(f"expected at most {longest} characters")
    return text


def _text_or_none(value: Any, longest: int) -> str | None:
    """The same; None for what is not there. Raises ValueError for what is no text."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")  # noqa: TRY004  # as for all others
    return _text(value, longest)


def _who(pod: Any, ip: Any, instance: Any) -> tuple[str, str, str]:
    return _text(pod, POD_NAME_MAX), _text(ip, IP_MAX), _text(instance, INSTANCE_MAX)


def _read_drsm(value: Any) -> Drsm | None:
    if not isinstance(value, Mapping):
        return None
    try:
        pod, ip, instance = _who(value["pod"], value["ip"], value["instance"])
        return Drsm(
            pod=pod,
            ip=ip,
            instance=instance,
            incarnation=_whole(value["incarnation"]),
            grant=_text(value.get("grant", ""), GRANT_MAX),
            marked=bool(value.get("marked", False)),
            hold_ms=_whole(value.get("hold_ms", 0)),
            request_id=_text(value.get("request_id", ""), REQUEST_ID_MAX),
            go_owners=_read_names(value.get("go_owners")),
            returned=bool(value.get("returned", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _read_end(value: Any) -> Any:
    """When a keepalive ends, as it is compared with. Raises ValueError for what a guard cannot name:
    operators of MongoDB's language, what equals nothing, and what is too large to be written beside it."""
    nan = isinstance(value, float) and isnan(value)
    if isinstance(value, Mapping | list | tuple | str | bytes) or nan:
        raise ValueError("expected a date")
    return value


def _read_owner(value: Mapping[str, Any]) -> Owner | None:
    """The incarnation in a keepalive's `drsm`; None where there is none."""
    try:
        return Owner(*_who(value["pod"], value["ip"], value["instance"]), _whole(value["incarnation"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _read_go_state(pod: str, value: Any) -> GoState | None:
    """What a mirror says of the Go pod of its name; None where it says nothing that can be read."""
    if not isinstance(value, Mapping):
        return None
    try:
        ip = _text(value.get("ip") or "", IP_MAX)
        instance = _text(value.get("instance") or "", INSTANCE_MAX)
    except ValueError:
        return None
    return GoState(Owner(pod, ip, instance, GO_INCARNATION), down=bool(value.get("down", True)))


def _read_names(value: Any) -> tuple[str, ...]:
    """The last so many names of a list."""
    names = value if isinstance(value, list | tuple) else ()
    return tuple(_text(name, POD_NAME_MAX) for name in names[-GO_OWNERS_MAX:])


def merge(document: Document, updated: Mapping[str, Any], removed: tuple[str, ...] = ()) -> Document:
    """`document` with a change event's updated and removed fields, whose paths may be dotted."""
    merged: Document = _copy(document)
    for path, value in updated.items():
        _set(merged, path.split("."), value)
    for path in removed:
        _unset(merged, path.split("."))
    return merged


def _copy(value: Any) -> Any:
    if isinstance(value, dict):  # asking for a Mapping costs more than the copy
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _set(target: Any, path: list[str], value: Any) -> None:
    head, *rest = path
    if isinstance(target, list):  # arrays are only ever appended to: `pools.1`
        target.extend([None] * (int(head) + 1 - len(target)))
        target[int(head)] = value
    elif rest:
        _set(target.setdefault(head, {}), rest, value)
    else:
        target[head] = value


def _unset(target: Any, path: list[str]) -> None:
    head, *rest = path
    if not isinstance(target, dict) or head not in target:
        return
    if rest:
        _unset(target[head], rest)
    else:
        del target[head]
