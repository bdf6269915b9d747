"""Documents as Go DRSM and the agent write them are read alike; what is neither is never taken for one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_agent.core import documents
from drsm_agent.core.documents import (
    Chunk,
    Drsm,
    GoState,
    Keepalive,
    Owner,
    Session,
    chunk_key,
    chunk_number,
    merge,
    our_instance,
    read_chunk,
    read_keepalive,
    read_session,
    session_key,
    session_number,
)
from drsm_sdk.wire import messages

GO_CHUNK: dict[str, Any] = {
    "_id": "chunkid-5",
    "type": "chunk",
    "chunkId": "chunkid-5",
    "podId": "amf-go",
    "podInstance": "nf-9",
    "podIp": "10.0.0.9",
}
DRSM: dict[str, Any] = {
    "pod": "amf-1",
    "ip": "10.0.0.7",
    "instance": "nf-1",
    "incarnation": 7 << 32 | 5,
    "grant": "0123456789abcdef",
    "marked": True,
    "hold_ms": 310_000,
    "request_id": "r-1",
}
OURS: dict[str, Any] = GO_CHUNK | {"podId": "amf-1", "podInstance": "nf-1", "podIp": "10.0.0.7", "drsm": DRSM}
GO_KEEPALIVE: dict[str, Any] = {
    "_id": "amf-go",
    "type": "keepalive",
    "podId": "amf-go",
    "podIp": "10.0.0.9",
    "podInstance": "nf-9",
    "expireAt": object(),
}
MIRROR: dict[str, Any] = {
    "_id": "amf-1",
    "type": "keepalive",
    "podId": "amf-1",
    "podIp": "10.0.0.7",
    "podInstance": f"drsm:amf-1:{DRSM['incarnation']}",
    "drsm": {name: DRSM[name] for name in ("pod", "ip", "instance", "incarnation")},
}
SESSION = Session(
    pod="amf-1",
    ip="10.0.0.7",
    instance="nf-1",
    incarnation=7 << 32 | 5,
    term=7,
    state="live",
    pools=("amfid", "tmsi"),
    request_id="r-1",
    promised_ms=300_000,
)
LONGEST = {"podId": documents.POD_NAME_MAX, "podIp": documents.IP_MAX, "podInstance": documents.INSTANCE_MAX}


def _chunk(document: dict[str, Any]) -> Chunk:
    chunk = read_chunk(document)
    assert chunk is not None
    return chunk


# --- Chunks ---------------------------------------------------------------------------------------


def test_a_chunk_of_go_drsm_is_read() -> None:
    """Its owner has incarnation 0; there is no grant, no mark, no hold."""
    chunk = _chunk(GO_CHUNK)
    assert (chunk.n, chunk.owner) == (5, Owner("amf-go", "10.0.0.9", "nf-9", 0))
    assert (chunk.grant, chunk.marked, chunk.hold_ms, chunk.request_id) == ("", False, 0, "")


def test_a_chunk_of_the_agent_is_read() -> None:
    """All fields of the sub-document count."""
    chunk = _chunk(OURS)
    assert (chunk.n, chunk.owner) == (5, Owner("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5))
    assert (chunk.grant, chunk.marked, chunk.hold_ms, chunk.request_id) == (
        DRSM["grant"],
        True,
        310_000,
        "r-1",
    )


@pytest.mark.parametrize("field", ["podId", "podIp", "podInstance"])
def test_the_sub_document_counts_only_while_its_three_copies_agree(field: str) -> None:
    """A Go pod that claims sets these fields and leaves the rest stale: the chunk is the Go pod's."""
    chunk = _chunk(OURS | {field: "other"})
    assert chunk.owner.incarnation == 0
    assert (chunk.grant, chunk.marked, chunk.hold_ms, chunk.request_id) == ("", False, 0, "")
    assert chunk.drsm == Drsm(**DRSM)


@pytest.mark.parametrize("document", [GO_CHUNK, OURS, OURS | {"podId": "amf-go"}])
def test_a_chunk_is_written_as_it_was_read(document: dict[str, Any]) -> None:
    """Also its stale parts."""
    assert _chunk(document).document == document


_WHO = [st.text(max_size=longest) for longest in LONGEST.values()]
_GRANTS = st.text(max_size=documents.GRANT_MAX)


@given(
    st.integers(0, 10**19 - 1),
    st.tuples(*_WHO),
    st.none() | st.builds(Drsm, *_WHO, st.integers(0, 2**63 - 1), _GRANTS, st.booleans()),
)
def test_any_chunk_is_read_as_it_was_written(n: int, pod: tuple[str, str, str], drsm: Drsm | None) -> None:
    """There and back."""
    chunk = Chunk(n, *pod, drsm)
    assert read_chunk(chunk.document) == chunk


@pytest.mark.parametrize(
    "drsm",
    [
        None,
        5,
        "text",
        [],
        {},
        DRSM | {"incarnation": "x"},
        DRSM | {"incarnation": None},
        DRSM | {"incarnation": float("nan")},
        DRSM | {"incarnation": float("inf")},
        DRSM | {"incarnation": 1e300},
        DRSM | {"hold_ms": -1.0},
        DRSM | {"hold_ms": 0.5},
        DRSM | {"hold_ms": float("inf")},
        DRSM | {"instance": "x" * (documents.INSTANCE_MAX + 1)},
        DRSM | {"grant": "0" * (documents.GRANT_MAX + 1)},
        DRSM | {"request_id": "r" * (documents.REQUEST_ID_MAX + 1)},
        {name: value for name, value in DRSM.items() if name != "incarnation"},
    ],
)
def test_an_unreadable_sub_document_does_not_count(drsm: Any) -> None:
    """The chunk is then as a Go pod wrote it; nothing raises."""
    assert _chunk(OURS | {"drsm": drsm}) == Chunk(5, "amf-1", "10.0.0.7", "nf-1")


def test_numbers_that_a_shell_has_turned_into_doubles_are_what_they_were() -> None:
    """Somebody mended a document by hand. Or the chunk would be taken from a pod that lives."""
    doubles = {name: float(DRSM[name]) for name in ("incarnation", "hold_ms")}
    assert _chunk(OURS | {"drsm": DRSM | doubles}) == _chunk(OURS)
    written = SESSION.document | {name: float(SESSION.document[name]) for name in ("term", "incarnation")}
    assert read_session(written) == SESSION


def test_a_sub_document_of_an_older_version_has_defaults() -> None:
    """Only who it is about is needed."""
    assert _chunk(OURS | {"drsm": MIRROR["drsm"]}).drsm == Drsm("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5)


@pytest.mark.parametrize(
    ("key", "number"),
    [("chunkid-0", 0), ("chunkid-5", 5), ("chunkid-16383", 16383), (f"chunkid-{2**63 - 1}", 2**63 - 1)],
)
def test_a_chunk_documents_id_has_its_number(key: str, number: int) -> None:
    """There and back, up to the largest number that any pool has."""
    assert chunk_number(key) == number
    assert chunk_key(number) == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "chunkid-",
        "chunkid",
        "chunkid--1",
        "chunkid-x",
        "chunkid-5x",
        "chunkid-05",
        "chunkid-00",
        "chunkid-+5",
        "chunkid- 5",
        "chunkid-5 ",
        "chunkid-5\n",
        "chunkid-5.0",
        "chunkid-²",
        "chunkid-٣",
        "Chunkid-5",
        "xchunkid-5",
        "5",
        "chunkid-" + "9" * 20,
    ],
)
def test_any_other_id_has_no_number(key: str) -> None:
    """None, and never chunk 0, which would be a real chunk of somebody else."""
    assert chunk_number(key) is None
    assert read_chunk(GO_CHUNK | {"_id": key}) is None


@pytest.mark.parametrize("field", ["podId"])
@pytest.mark.parametrize("value", [None, 5, [], "missing"])
def test_a_chunk_without_its_pod_is_none(field: str, value: Any) -> None:
    """No owner is made up."""
    document = GO_CHUNK | {field: value}
    if value == "missing":
        del document[field]
    assert read_chunk(document) is None


@pytest.mark.parametrize("field", ["podIp", "podInstance"])
def test_a_go_chunk_that_does_not_say_all_of_its_pod_is_read_as_far_as_it_goes(field: str) -> None:
    """The original wrote fewer fields once. What is not there stays so, for the guards; nobody has text for
    it."""
    absent = {name: value for name, value in GO_CHUNK.items() if name != field}
    for document in (absent, absent | {field: None}):
        chunk = read_chunk(document)
        assert chunk is not None
        assert chunk.owner.is_go
        assert (chunk.owner.ip, chunk.owner.instance).count("") == 1
        assert field not in chunk.document
    assert read_chunk(GO_CHUNK | {field: 5}) is None


def test_the_go_pods_that_a_chunk_came_from_are_read_and_bounded() -> None:
    """A list that anybody may have made longer; what is none is no reason to lose the chunk."""
    names = [f"amf-{i}" for i in range(documents.GO_OWNERS_MAX + 2)]
    chunk = read_chunk(OURS | {"drsm": DRSM | {"go_owners": names}})
    assert chunk is not None
    assert chunk.go_owners == tuple(names[2:])
    assert chunk.document["drsm"]["go_owners"] == tuple(names[2:])
    odds: list[Any] = [None, "amf-1", 7, {}]
    for odd in odds:
        chunk = read_chunk(OURS | {"drsm": DRSM | {"go_owners": odd}})
        assert chunk is not None
        assert (chunk.go_owners, chunk.document) == ((), OURS)


@pytest.mark.parametrize("field", LONGEST)
def test_an_owner_that_a_message_may_have_no_room_for_is_none(field: str) -> None:
    """Neither its chunk counts nor its keepalive: the event would end every agent."""
    longest, longer = ({field: "ü" * (LONGEST[field] + more)} for more in (0, 1))
    assert read_chunk(GO_CHUNK | longest) is not None
    assert read_chunk(GO_CHUNK | longer) is None
    if field == "podId":  # a keepalive's pod is the one that its `_id` names
        longest, longer = ({"_id": name} for name in (longest[field], longer[field]))
    assert read_keepalive(GO_KEEPALIVE | longest) is not None
    assert read_keepalive(GO_KEEPALIVE | longer) is None


def test_a_keepalive_is_named_no_longer_than_a_pod() -> None:
    """Its name is part of the token that goes out with its event."""
    assert read_keepalive(GO_KEEPALIVE | {"_id": "x" * documents.POD_NAME_MAX}) is not None
    assert read_keepalive(GO_KEEPALIVE | {"_id": "x" * (documents.POD_NAME_MAX + 1)}) is None


def test_an_owner_is_bounded_in_documents_as_on_the_wire() -> None:
    """No pod that the agent takes in is unreadable to it."""
    names = ("POD_NAME_MAX", "IP_MAX", "INSTANCE_MAX", "REQUEST_ID_MAX")
    assert [getattr(documents, name) for name in names] == [getattr(messages, name) for name in names]
    assert messages.Report("amf-1", 1, (("amfid", 0, "0" * documents.GRANT_MAX, False),))


def test_documents_without_an_id_are_none() -> None:
    """An empty document is neither chunk nor keepalive nor session."""
    assert (read_chunk({}), read_keepalive({}), read_session({})) == (None, None, None)


# --- Keepalives -----------------------------------------------------------------------------------


def test_a_keepalive_of_go_drsm_is_a_go_pod() -> None:
    """With incarnation 0."""
    keepalive = read_keepalive(GO_KEEPALIVE)
    assert keepalive == Keepalive("amf-go", "10.0.0.9", "nf-9", expire_at=GO_KEEPALIVE["expireAt"])
    assert keepalive.mirrored is None
    assert not keepalive.go_down
    assert keepalive.go_owner == Owner("amf-go", "10.0.0.9", "nf-9", 0)


def test_a_mirror_is_no_go_pod() -> None:
    """It only shows a session to Go pods."""
    keepalive = read_keepalive(MIRROR)
    assert keepalive is not None
    assert keepalive.go_owner is None
    assert keepalive.mirrored == Owner("amf-1", "10.0.0.7", "nf-1", DRSM["incarnation"])


def test_a_mirror_that_a_go_pod_of_the_same_name_address_and_instance_took_over_is_a_go_pod() -> None:
    """It is told by what no Go pod writes: a Go pod sets its own instance, and leaves `drsm` as it was."""
    keepalive = read_keepalive(MIRROR | {"podInstance": "nf-1"})
    assert keepalive is not None
    assert keepalive.go_owner == Owner("amf-1", "10.0.0.7", "nf-1", 0)


def test_an_instance_that_only_looks_like_the_agents_is_a_go_pods() -> None:
    """Another pod's, or without the copies that belong to it."""
    odds: list[dict[str, Any]] = [{"podInstance": "drsm:amf-2:30064771077"}, {"podInstance": "drsm:amf-1:1"}]
    odds += [{"drsm": None}, {"drsm": "text"}]
    for odd in odds:
        keepalive = read_keepalive(MIRROR | odd)
        assert keepalive is not None
        assert keepalive.go_owner is not None


def test_the_longest_pod_has_a_mirror_that_is_read() -> None:
    """Its instance is longer than any pod's."""
    owner = Owner("x" * documents.POD_NAME_MAX, "ip", "i", 2**63 - 1)
    written = {
        "type": "keepalive",
        "podId": owner.name,
        "podIp": owner.ip,
        "podInstance": our_instance(owner),
    }
    keepalive = read_keepalive({"_id": owner.name, "drsm": documents.owner_fields(owner)} | written)
    assert keepalive is not None
    assert keepalive.mirrored == owner


@pytest.mark.parametrize(
    ("beside", "down"),
    [
        ({}, False),
        ({"silent": 9}, True),
        ({"silent": 8}, False),
        ({"go": {"ip": "", "instance": "", "down": True}}, False),
    ],
)
def test_what_the_agent_wrote_beside_a_go_keepalive_counts_until_it_is_renewed(
    beside: dict[str, Any], down: bool
) -> None:
    """It names the end that it is about, and a renewal changes that. What a mirror says is not said by a Go
    pod's own."""
    keepalive = read_keepalive(GO_KEEPALIVE | {"expireAt": 9, "drsm": beside})
    assert keepalive is not None
    assert (keepalive.go_down, keepalive.mirrored) == (down, None)
    assert read_keepalive({"_id": "amf-go"} | keepalive.document) == keepalive


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"ip": "10.0.0.9", "instance": "nf-9", "down": False}, ("10.0.0.9", "nf-9", False)),
        ({"ip": "10.0.0.9", "instance": "nf-9", "down": True}, ("10.0.0.9", "nf-9", True)),
        ({}, ("", "", True)),
        ({"ip": None, "instance": 5}, ("", "5", True)),
        ({"ip": "x" * 65, "instance": "nf-9"}, None),
        ("text", None),
    ],
)
def test_a_mirror_says_what_is_known_of_the_go_pod_of_its_name(
    said: Any, told: tuple[str, str, bool] | None
) -> None:
    """What cannot be read says nothing."""
    keepalive = read_keepalive(MIRROR | {"drsm": MIRROR["drsm"] | {"go": said}})
    assert keepalive is not None
    assert keepalive.go == (told and GoState(Owner("amf-1", told[0], told[1], 0), down=told[2]))
    assert (keepalive.go_owner is not None, keepalive.go_down) == (
        bool(told and not told[2]),
        bool(told and told[2]),
    )
    assert read_keepalive({"_id": "amf-1"} | keepalive.document) == keepalive


@pytest.mark.parametrize("name", [{}, {"podId": "another"}, {"podId": None}])
def test_a_keepalive_is_of_the_pod_that_its_id_names(name: dict[str, Any]) -> None:
    """A delete shows nothing else, and Go pods claim by it."""
    bare = {field: value for field, value in GO_KEEPALIVE.items() if field != "podId"}
    keepalive = read_keepalive(bare | name)
    assert keepalive is not None
    assert keepalive.pod == "amf-go"


@pytest.mark.parametrize("kind", ["chunk", "", None, 5])
def test_other_types_are_no_keepalives(kind: Any) -> None:
    """Whatever else they have."""
    assert read_keepalive(GO_KEEPALIVE | {"type": kind}) is None


# --- Sessions -------------------------------------------------------------------------------------


def test_a_session_is_read_as_it_was_written() -> None:
    """There and back; its key is the pod and the incarnation."""
    assert read_session(SESSION.document) == SESSION
    assert SESSION.document["_id"] == f"amf-1:{7 << 32 | 5}"
    assert session_number(session_key(*SESSION.key)) == SESSION.key
    assert SESSION.owner == Owner("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5)


@pytest.mark.parametrize(
    "field", [name for name in SESSION.document if name not in {"_id", "type", "reason"}]
)
def test_a_session_without_one_of_its_fields_is_none(field: str) -> None:
    """Nothing about a life is made up."""
    assert read_session({name: value for name, value in SESSION.document.items() if name != field}) is None


@pytest.mark.parametrize("value", ["x", None, [], float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["incarnation", "term", "promised_ms"])
def test_a_session_with_an_unreadable_number_is_none(field: str, value: Any) -> None:
    """And nothing raises: one odd document must not end the agent."""
    assert read_session(SESSION.document | {field: value}) is None


@pytest.mark.parametrize(
    ("field", "longest"),
    [
        ("pod", documents.POD_NAME_MAX),
        ("ip", documents.IP_MAX),
        ("instance", documents.INSTANCE_MAX),
        ("reason", documents.REASON_MAX),
    ],
)
def test_a_session_that_a_message_may_have_no_room_for_is_none(field: str, longest: int) -> None:
    """The agent writes none."""

    def session(length: int) -> Session | None:
        document = SESSION.document | {field: "x" * length}
        return read_session(document | {"_id": session_key(document["pod"], document["incarnation"])})

    assert session(longest) is not None
    assert session(longest + 1) is None


def test_a_session_by_another_id_than_its_own_is_none() -> None:
    """Its `_id` is part of the token that goes out with its events, and may be as long as a document."""
    assert read_session(SESSION.document | {"_id": "amf-2:5"}) is None


def test_a_session_that_was_promised_more_than_a_hold_may_be_is_none() -> None:
    """A claim of its chunk would be no document any more."""
    most = documents.PROMISED_MS_MAX
    assert read_session(SESSION.document | {"promised_ms": most}) is not None
    assert read_session(SESSION.document | {"promised_ms": most + 1}) is None


@pytest.mark.parametrize(
    "key", ["", "amf-1", "amf-1:", ":5", "amf-1:x", "amf-1:²", "amf-1:-5", "a:" + "9" * 21]
)
def test_any_other_id_is_no_sessions(key: str) -> None:
    """A document that somebody left in the agent's collection is passed over."""
    assert session_number(key) is None


# --- Updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updated", "removed", "expected"),
    [
        ({}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2]}),
        ({"a": 9}, (), {"a": 9, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2]}),
        ({"b.c": 9, "b.x": 8}, (), {"a": 1, "b": {"c": 9, "d": {"e": 3}, "x": 8}, "l": [1, 2]}),
        ({"b.d.e": 9}, (), {"a": 1, "b": {"c": 2, "d": {"e": 9}}, "l": [1, 2]}),
        ({"n.m.o": 9}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2], "n": {"m": {"o": 9}}}),
        ({"b": {}}, (), {"a": 1, "b": {}, "l": [1, 2]}),
        ({"l": [7]}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [7]}),
        ({"l.0": 9}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [9, 2]}),
        ({"l.2": 3}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2, 3]}),
        ({"l.3": 4, "l.2": 3}, (), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2, 3, 4]}),
        ({}, ("a", "b.d"), {"b": {"c": 2}, "l": [1, 2]}),
        ({}, ("b.d.e", "b.c"), {"a": 1, "b": {"d": {}}, "l": [1, 2]}),
        ({}, ("x", "b.x", "a.x", "b.x.y", "l.x"), {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2]}),
    ],
)
def test_an_update_is_merged(
    updated: dict[str, Any], removed: tuple[str, ...], expected: dict[str, Any]
) -> None:
    """Plain and dotted paths, positions in arrays, removals, and removals of what is not there."""
    document = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "l": [1, 2]}
    assert merge(document, updated, removed) == expected


def test_a_merge_changes_neither_side() -> None:
    """What is known stays as it is until the table takes the result."""
    document = {"b": {"c": [1]}, "t": (1, 2)}
    updated = {"b.c.1": 2, "t.2": 3}
    assert merge(document, updated) == {"b": {"c": [1, 2]}, "t": [1, 2, 3]}
    assert (document, updated) == ({"b": {"c": [1]}, "t": (1, 2)}, {"b.c.1": 2, "t.2": 3})


_FLAT = st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3)
_NESTED = st.dictionaries(st.sampled_from("xyz"), _FLAT, max_size=3)


@given(_NESTED, _NESTED)
def test_a_difference_leads_from_one_document_to_the_other(before: Any, after: Any) -> None:
    """However MongoDB puts it: whole sub-documents where they are new, single fields where they differ."""
    updated: dict[str, Any] = {}
    removed: list[str] = [key for key in before if key not in after]
    for key, value in after.items():
        if key not in before:
            updated[key] = value
            continue
        updated |= {f"{key}.{name}": v for name, v in value.items() if before[key].get(name) != v}
        removed += [f"{key}.{name}" for name in before[key] if name not in value]
    assert merge(before, updated, tuple(removed)) == after
