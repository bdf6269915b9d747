"""The messages of protocol version 1: their bytes, their rules, and what is refused.

`golden.json` holds one example of every request, answer, page and event as msgpack (hex) and as JSON.
It is compared with, never written by, the tests: other programs depend on these bytes.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from drsm_sdk.wire import messages as m
from drsm_sdk.wire.codec import DecodeError, decode, encode, from_map, to_map, unpack
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Space

GOLDEN: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("golden.json").read_text())

STAMP = m.Stamp(agent="agent-1", term=7, history="00ff00ff00ff00ff")
AMF_1 = m.OwnerRef("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5)
AMF_2 = m.OwnerRef("amf-2", "10.0.0.8", "nf-2", 7 << 32 | 6)
GO_POD = m.OwnerRef("amf-go", "10.0.0.9", "", 0)
VERSION = (1_700_000_000 << 32 | 3, 1)
POOL = Definition(name="amfid", reserved=((1, 9),))
UE_POOL = Definition(
    name="sessions",
    spaces=(
        Space(name="seid", bits=64),
        Space(name="ue", kind="ipv4", ranges=("10.45.0.0/16",), excluded=("10.45.7.0/24",)),
    ),
    revision=2,
)
GRANT, GRANT_2 = "0123456789abcdef", "fedcba9876543210"
SHOWN_1 = m.SnapshotOwner("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5, "live")
SHOWN_GO = m.SnapshotOwner("amf-go", "10.0.0.9", "", 0, "down")
HEAD = m.EventHead(
    pool="amfid",
    version=VERSION,
    prev=(1_700_000_000 << 32 | 1, 0),
    agent="agent-1",
    term=7,
    history="00ff00ff00ff00ff",
    at=1_700_000_000_123,
)

REQUESTS: dict[str, Any] = {
    "session.open": m.Open(m.PodRef("amf-1", "10.0.0.7", "nf-1"), ("amfid", "tmsi"), "r-1"),
    "session.join": m.Join("amf-1", AMF_1.incarnation, ("amfid",)),
    "session.renew": m.Renew(
        "amf-1", AMF_1.incarnation, {"amfid": (2, 2**64 - 1)}, {"amfid": m.Use(900, 1100, 5000, 1, 7)}
    ),
    "session.report": m.Report(
        "amf-1", AMF_1.incarnation, (("amfid", 3, GRANT, True),), 1, "10.0.0.7", "nf-1", ("amfid",)
    ),
    "session.chunks": m.SessionRef("amf-1", AMF_1.incarnation),
    "session.close": m.SessionRef("amf-1", AMF_1.incarnation),
    "probe": m.Probe("00ff00ff00ff00ff"),
    "acquire": m.Acquire("amf-1", AMF_1.incarnation, 2, "r-2"),
    "release": m.ChunkList("amf-1", AMF_1.incarnation, ((3, GRANT), (4, GRANT_2))),
    "scanned": m.ChunkList("amf-1", AMF_1.incarnation, ((3, GRANT),)),
    "snapshot": m.Empty(),
    "pods": m.Empty(),
    "owner": m.OwnerQuery(3_072, "ngapid"),
    "pools": m.Empty(),
}
ANSWERS: dict[str, Any] = {
    "session.open": m.Opened(AMF_1.incarnation, (POOL,), 2721, 296_000, 500),
    "session.join": m.Joined((POOL, UE_POOL)),
    "session.renew": m.Renewed(2721, 296_000, 500, {"amfid": (2, 1)}, {"amfid": 1}),
    "session.report": m.Reported(1),
    "session.chunks": m.SessionChunks(
        (("amfid", 3, GRANT, None), ("amfid", 4, GRANT_2, 310_000)), {"amfid": VERSION}
    ),
    "session.close": m.Empty(),
    "probe": m.Probe("00ff00ff00ff00ff"),
    "acquire": m.Acquired(((3, GRANT), (4, GRANT_2)), VERSION, 1),
    "release": m.Released((3, 4)),
    "scanned": m.Cleared((3,)),
    "snapshot": m.SnapshotPage(VERSION, 0, (SHOWN_1, SHOWN_GO), ((0, (3, 4)), (1, (5,))), (4,), POOL, True),
    "snapshot, its end": m.SnapshotEnd(VERSION, 1),
    "pods": m.Pods((m.PodState(AMF_1, "live", 2, 1, m.Use(900, 1100, 5000, 1, 7)),)),
    "owner": m.OwnerAnswer(3, SHOWN_1, False),
    "pools": m.Pools((m.PoolState(POOL, 3, 16384, 2, 1, 1),), m.LeaderState("agent-1", 7, 60_000)),
    "error": m.Failure("session_lost", "amf-1 is not alive", "superseded", False),
}
EVENTS: dict[str, Any] = {
    "pod.up": m.PodUp(AMF_1),
    "pod.down": m.PodDown(AMF_1, "expired"),
    "chunk.allocated": m.ChunkAllocated(AMF_1, (3, 4), {"ue": ("10.45.3.0/24", "10.45.4.0/24")}),
    "chunk.claimed": m.ChunkClaimed(AMF_2, GO_POD, (3, 4), (GRANT, GRANT_2), 310_000),
    "chunk.scanned": m.ChunkScanned(AMF_2, (3, 4)),
    "chunk.released": m.ChunkReleased(AMF_2, (3, 4)),
    "sync": m.Sync(2, 3, 2**64 - 1, 1),
    "reset": m.Reset("position lost"),
}
SAID: dict[str, tuple[Any, ...]] = (
    {f"request {verb}": (body,) for verb, body in REQUESTS.items()}
    | {f"answer {verb}": (STAMP, body) for verb, body in ANSWERS.items()}
    | {f"event {verb}": (HEAD, body) for verb, body in EVENTS.items()}
)


def _map(parts: tuple[Any, ...]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in to_map(part).items()}


def test_every_message_has_golden_bytes() -> None:
    """No example without recorded bytes, and no recorded bytes without an example."""
    assert sorted(GOLDEN) == sorted(SAID)


def test_every_class_of_the_protocol_is_in_an_example() -> None:
    """A message added to the protocol must be added here."""
    seen: set[type[Any]] = set()

    def visit(value: Any) -> None:
        if dataclasses.is_dataclass(value):
            seen.add(type(value))
            value = [getattr(value, field.name) for field in dataclasses.fields(value)]
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, tuple | list | dict) or dataclasses.is_dataclass(item):
                visit(item)

    visit(list(SAID.values()))
    classes = {value for value in vars(m).values() if isinstance(value, type)}
    assert seen - {Space} == {kind for kind in classes if dataclasses.is_dataclass(kind)}


@pytest.mark.parametrize("name", sorted(SAID))
def test_a_message_is_written_as_its_golden_bytes(name: str) -> None:
    """The msgpack of an example is what other programs were written against."""
    assert encode(_map(SAID[name])).hex() == GOLDEN[name]["msgpack"]


@pytest.mark.parametrize("name", sorted(SAID))
def test_a_message_is_written_as_its_golden_json(name: str) -> None:
    """The JSON of an example is what people and scripts see; integers above 2**53 are text."""
    assert encode(_map(SAID[name]), as_json=True).decode() == GOLDEN[name]["json"]


@pytest.mark.parametrize("form", ["msgpack", "json"])
@pytest.mark.parametrize("name", sorted(SAID))
def test_golden_bytes_are_read_as_their_message(name: str, form: str) -> None:
    """Every part of an example comes back from its recorded bytes, whichever else is in the map."""
    text = GOLDEN[name][form]
    data = bytes.fromhex(text) if form == "msgpack" else text.encode()
    assert tuple(unpack(type(part), data) for part in SAID[name]) == SAID[name]


_HEAD = "v pool version prev agent term history at"
_STAMP = "agent term history"
FIELDS = {
    "request session.open": "pod pools request_id",
    "request session.join": "pod incarnation pools",
    "request session.renew": "pod incarnation held use",
    "request session.report": "pod incarnation chunks total ip instance pools",
    "request session.chunks": "pod incarnation",
    "request session.close": "pod incarnation",
    "request probe": "nonce",
    "request acquire": "pod incarnation count request_id",
    "request release": "pod incarnation chunks",
    "request scanned": "pod incarnation chunks",
    "request snapshot": "",
    "request pods": "",
    "request owner": "id space",
    "request pools": "",
    "answer session.open": f"{_STAMP} incarnation definitions liveness_ms allocation_ms renew_ms",
    "answer session.join": f"{_STAMP} definitions",
    "answer session.renew": f"{_STAMP} liveness_ms allocation_ms renew_ms held give_back",
    "answer session.report": f"{_STAMP} accepted",
    "answer session.chunks": f"{_STAMP} chunks version",
    "answer session.close": _STAMP,
    "answer probe": f"{_STAMP} nonce",
    "answer acquire": f"{_STAMP} chunks version revision",
    "answer release": f"{_STAMP} released",
    "answer scanned": f"{_STAMP} cleared",
    "answer snapshot": f"{_STAMP} version page owners chunks marked definition last",
    "answer snapshot, its end": "version pages agent term history",
    "answer pods": f"{_STAMP} pods",
    "answer owner": f"{_STAMP} chunk owner marked",
    "answer pools": f"{_STAMP} pools leader",
    "answer error": f"{_STAMP} error message reason retry wait_ms",
    "event pod.up": f"{_HEAD} pod",
    "event pod.down": f"{_HEAD} pod reason",
    "event chunk.allocated": f"{_HEAD} owner chunks prefixes",
    "event chunk.claimed": f"{_HEAD} owner previous chunks grants hold_ms prefixes",
    "event chunk.scanned": f"{_HEAD} owner chunks prefixes",
    "event chunk.released": f"{_HEAD} previous chunks prefixes",
    "event sync": f"{_HEAD} pods chunks checksum revision",
    "event reset": f"{_HEAD} reason",
}


def test_the_recorded_maps_have_the_fields_that_the_protocol_names() -> None:
    """The recorded bytes themselves are checked against the protocol's table of fields."""
    assert {name: sorted(decode(bytes.fromhex(texts["msgpack"]))) for name, texts in GOLDEN.items()} == {
        name: sorted(fields.split()) for name, fields in FIELDS.items()
    }


def test_the_parts_of_an_answer_have_no_field_in_common() -> None:
    """The common fields lie in the same map as the message's own: none may hide another."""
    for parts in SAID.values():
        names = [field.name for part in parts for field in dataclasses.fields(part)]
        assert sorted(set(names)) == sorted(names)


def test_events_and_verbs_name_each_other() -> None:
    """Every event of the protocol has one verb, and every verb one event."""
    assert {verb: type(body) for verb, body in EVENTS.items()} == m.EVENT_KINDS
    assert {kind: verb for verb, kind in m.EVENT_KINDS.items()} == m.EVENT_VERBS
    assert set(typing.get_args(m.EventBody)) == set(m.EVENT_VERBS)


def test_an_owner_in_a_snapshot_is_the_owner_of_events() -> None:
    """Without the state, which is the snapshot's own."""
    assert (SHOWN_1.ref, SHOWN_GO.ref) == (AMF_1, GO_POD)


def test_an_event_names_the_wire_version() -> None:
    """`v` is 1 without being asked for."""
    assert to_map(HEAD)["v"] == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("bad_request", 400),
        ("not_joined", 403),
        ("unknown_pool", 404),
        ("session_lost", 410),
        ("too_large", 413),
        ("internal", 500),
        ("store_unavailable", 503),
        ("pool_exhausted", 507),
        ("of a later version", 500),
    ],
)
def test_errors_have_their_codes(error: str, code: int) -> None:
    """The header's code follows from the error's name; an unknown one is internal."""
    assert m.Failure(error, "").code == code


_LABELS = ("a" * 63 + ".") * 3

# --- Rules of single fields ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "0",
        "amf-1",
        "amf-1.core.svc",
        "chunkid-x",
        "chunkid",
        "chunkid-1.a",
        "a" * 63,
        _LABELS + "a" * 61,
    ],
)
def test_pod_names_follow_dns_1123(name: str) -> None:
    """Labels of up to 63 characters, dots between them, 253 characters in all."""
    assert m.PodRef(name, "10.0.0.7", "").name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "amf_1",
        "-a",
        "a-",
        ".a",
        "a.",
        "a..b",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "a" * 64,
        "a/b",
        "a:1",
        _LABELS + "a" * 62,
    ],
)
def test_other_pod_names_are_refused(name: str) -> None:
    """A refused name is not repeated in the message."""
    with pytest.raises(ValueError, match=r"^pod name: expected a DNS-1123 name") as refused:
        m.PodRef(name, "10.0.0.7", "")
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize("name", ["chunkid-0", "chunkid-5", "chunkid-007", "chunkid-99999999999999999999"])
def test_a_pod_may_not_be_named_as_a_chunk_document(name: str) -> None:
    """The name becomes a keepalive's `_id`; it must not be another document's."""
    with pytest.raises(ValueError, match="names chunk documents"):
        m.check_pod_name(name)


@pytest.mark.parametrize(("field", "longest"), [("ip", 64), ("instance", 256)])
def test_a_pods_texts_are_printable_and_bounded(field: str, longest: int) -> None:
    """Anything printable up to the bound is taken, anything else refused by the field's name."""
    pod = {"name": "amf-1", "ip": "", "instance": ""}
    assert getattr(m.PodRef(**pod | {field: "ü" * longest}), field) == "ü" * longest
    for bad in ("x" * (longest + 1), "a\nb", "\0", "\ud800", "\x7f"):
        with pytest.raises(ValueError, match=f"^{field}: expected at most {longest} printable characters$"):
            m.PodRef(**pod | {field: bad})


@pytest.mark.parametrize("bad", ["", "x" * 65, "a\r\nb", "\0"])
def test_request_ids_are_1_to_64_printable_characters(bad: str) -> None:
    """The same rule for both requests that have one."""
    pod = m.PodRef("amf-1", "", "")
    assert m.Open(pod, (), "x" * 64).request_id == m.Acquire("amf-1", 1, 1, "x" * 64).request_id
    with pytest.raises(ValueError, match=r"^request_id: expected"):
        m.Open(pod, (), bad)
    with pytest.raises(ValueError, match=r"^request_id: expected"):
        m.Acquire("amf-1", 1, 1, bad)


@pytest.mark.parametrize("count", [0, 257, 2**64 - 1])
def test_1_to_256_chunks_may_be_asked_for(count: int) -> None:
    """The limits themselves are fine, one beyond is refused."""
    assert [m.Acquire("amf-1", 1, n, "r").count for n in (1, 256)] == [1, 256]
    with pytest.raises(ValueError, match=rf"^count: expected 1..256, found {count}$"):
        m.Acquire("amf-1", 1, count, "r")


@pytest.mark.parametrize("bad", ["", "AMF", "drsm_x", "a.b", "a" * 33, "*", ">", "a\n"])
def test_only_pool_names_are_joined(bad: str) -> None:
    """In `open` and in `join`."""
    with pytest.raises(ValueError, match=r"^pools: expected names"):
        m.Open(m.PodRef("amf-1", "", ""), ("amfid", bad), "r")
    with pytest.raises(ValueError, match=r"^pools: expected names"):
        m.Join("amf-1", 1, (bad,))


def test_a_session_has_at_most_64_pools() -> None:
    """64 are taken, 65 refused."""
    names = tuple(f"p{i}" for i in range(65))
    assert len(m.Join("amf-1", 1, names[:64]).pools) == 64
    with pytest.raises(ValueError, match="expected at most 64, found 65"):
        m.Join("amf-1", 1, names)


def test_a_chunk_list_has_at_most_a_thousand() -> None:
    """1000 are taken, 1001 refused."""
    pairs = tuple((n, GRANT) for n in range(1001))
    assert len(m.ChunkList("amf-1", 1, pairs[:1000]).chunks) == 1000
    with pytest.raises(ValueError, match="expected at most 1000, found 1001"):
        m.ChunkList("amf-1", 1, pairs)


@pytest.mark.parametrize(
    "grant", ["", "0123456789abcde", "0123456789abcdef0", "0123456789ABCDEF", GRANT + "\n"]
)
def test_grants_are_16_hex_digits(grant: str) -> None:
    """In what a pod gives back, clears or reports: grants end up in documents."""
    with pytest.raises(ValueError, match="a grant of 16 hex digits"):
        m.ChunkList("amf-1", 1, ((1, GRANT), (2, grant)))
    with pytest.raises(ValueError, match="a grant of 16 hex digits"):
        m.Report("amf-1", 1, (("amfid", 1, grant, False),))


def test_only_chunks_of_pools_are_reported() -> None:
    """A report names spaces of the database; it must not reach the agent's own."""
    with pytest.raises(ValueError, match=r"^chunks: expected \[pool"):
        m.Report("amf-1", 1, (("drsm_sessions", 1, GRANT, False),))


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (m.Open, {"pod": {"name": "A", "ip": "", "instance": ""}}, "pod: pod name: expected a DNS-1123"),
        (m.Open, {"pod": None}, "pod: expected a map, found NoneType None"),
        (m.Open, {"request_id": ""}, "request_id: expected 1 to 64"),
        (m.Open, {"pools": "amfid"}, "pools: expected a list, found str"),
        (m.Open, {"pools": [1]}, "pools[]: expected str, found int 1"),
        (m.Acquire, {"count": 257}, "count: expected 1..256"),
        (m.Acquire, {"count": True}, "count: expected an integer from 0 to 2**64-1, found bool True"),
        (m.Acquire, {"count": -1}, "count: expected an integer from 0 to 2**64-1, found int -1"),
        (m.Acquire, {"count": 1.0}, "count: expected an integer from 0 to 2**64-1, found float 1.0"),
        (m.Acquire, {"incarnation": 2**64}, "incarnation: expected an integer from 0 to 2**64-1"),
        (m.ChunkList, {"chunks": [[1]]}, "chunks[]: expected a list of 2, found list"),
        (m.ChunkList, {"chunks": [[1, GRANT, 3]]}, "chunks[]: expected a list of 2, found list"),
        (m.ChunkList, {"chunks": [[1, 2]]}, "chunks[][1]: expected str, found int 2"),
        (m.Report, {"chunks": [["amfid", 1, GRANT, 1]]}, "chunks[][3]: expected bool, found int 1"),
        (m.Renew, {"held": {"amfid": [1]}}, "held.amfid: expected a list of 2, found list"),
        (m.Renew, {"use": {"amfid": {"free": "1"}}}, "use.amfid.free: expected an integer"),
    ],
)
def test_an_error_names_the_field_and_the_rule(kind: Any, change: dict[str, Any], text: str) -> None:
    """Whoever sent it learns which field is wrong, and what was found there."""
    verb = {m.Open: "session.open", m.Report: "session.report", m.Renew: "session.renew"}.get(kind)
    body = decode(encode(to_map(REQUESTS[verb or {m.Acquire: "acquire"}.get(kind, "release")])))
    with pytest.raises(DecodeError) as refused:
        from_map(kind, body | change)
    assert str(refused.value)[: len(text)] == text


PLACE = "kind bits ranges prefix block_bits slots reserved excluded order"
OPTIONAL = {
    m.Use: "issued free oldest_ms scanning released",
    m.Renew: "held use",
    m.Report: "total ip instance pools",
    m.Renewed: "held give_back",
    m.Acquired: "revision",
    m.SnapshotPage: "marked definition last",
    m.OwnerQuery: "space",
    m.Failure: "reason retry wait_ms",
    m.EventHead: "v",
    Space: PLACE,
    Definition: f"{PLACE} spaces usage_lag_ms quarantine_ms unscanned revision",
    m.Sync: "revision",
    m.ChunkAllocated: "prefixes",
    m.ChunkClaimed: "prefixes",
    m.ChunkScanned: "prefixes",
    m.ChunkReleased: "prefixes",
}


@pytest.mark.parametrize(
    "part",
    [part for name in sorted(SAID) for part in SAID[name]] + [POOL, UE_POOL.spaces[0], m.Use(1, 2, 3, 4)],
)
def test_a_missing_field_is_named(part: Any) -> None:
    """Every field is needed but those that the protocol calls optional; the error names it."""
    kind, body = type(part), to_map(part)
    for name in body:
        rest = {other: value for other, value in body.items() if other != name}
        if name in OPTIONAL.get(kind, "").split():
            assert type(unpack(kind, encode(rest))) is kind
        else:
            with pytest.raises(DecodeError, match=f"^{name}: missing$"):
                unpack(kind, encode(rest))


# --- The readable line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (EVENTS["pod.up"], "amfid pod up amf-1:30064771077"),
        (EVENTS["pod.down"], "amfid pod down amf-1:30064771077 (expired)"),
        (EVENTS["chunk.allocated"], "amfid allocated 2 chunks 3,4 to amf-1:30064771077"),
        (
            EVENTS["chunk.claimed"],
            "amfid claimed 2 chunks 3,4 by amf-2:30064771078 from amf-go:0, hold 310000 ms",
        ),
        (m.ChunkScanned(AMF_2, (3,)), "amfid scanned chunk 3 by amf-2:30064771078"),
        (
            m.ChunkReleased(AMF_2, tuple(range(9))),
            "amfid released 9 chunks 0,1,2,3,4,5,6,7,.. by amf-2:30064771078",
        ),
        (
            m.ChunkReleased(AMF_2, tuple(range(8))),
            "amfid released 8 chunks 0,1,2,3,4,5,6,7 by amf-2:30064771078",
        ),
        (m.Sync(2, 3, 255), "amfid sync 2 pods, 3 chunks, checksum 00000000000000ff"),
        (EVENTS["reset"], "amfid reset: position lost"),
    ],
)
def test_an_event_has_one_readable_line(body: m.EventBody, line: str) -> None:
    """What an operator reads in the header `Drsm-Summary`."""
    assert m.summary(HEAD, body) == line


def test_the_readable_line_is_fit_for_a_header() -> None:
    """Names of Go pods may be anything: no line break, no control character, no length gets through."""
    hostile = m.OwnerRef("x\r\nEvil: 1\x00\x7fü" + "y" * 500, "", "", 0)
    line = m.summary(HEAD, m.PodUp(hostile))
    assert line[:30] == "amfid pod up x??Evil: 1???yyyy"
    assert (len(line), line.isascii(), line.isprintable()) == (200, True, True)
