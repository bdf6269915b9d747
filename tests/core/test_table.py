"""The table is what the documents say, and its events are all that a consumer needs to follow it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from drsm_agent.core.documents import Chunk, Drsm, Owner, Session
from drsm_agent.core.events import ALLOCATED, CLAIMED, DOWN, RELEASED, SCANNED, UP, Event, Version, coalesce
from drsm_agent.core.table import GONE_SECONDS, SESSIONS, STAMPS, Change, Hashes, Table
from drsm_agent.core.writes import claim, mirror_keepalive, note_silence, take_over_keepalive
from drsm_agent.relay import event_body
from drsm_agent.snapshots import PoolPages
from drsm_sdk.mirror import Mirror, Verdict
from drsm_sdk.pods import Owner as MirrorOwner
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.wire.checksum import holding, ownership
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import EventHead, Stamp, Sync

HASHES = Hashes(ownership=ownership, holding=holding)
AMF_1 = Owner("amf-1", "10.0.0.7", "nf-1", 5)
AMF_2 = Owner("amf-2", "10.0.0.8", "nf-2", 6)
GO_POD = Owner("amf-go", "10.0.0.9", "", 0)
V = 100


def made(*pools: str) -> Table:
    """An empty table of these pools, read at cluster time 100."""
    return Table(pools or ("amfid",), V, HASHES)


def chunk(
    n: int, owner: Owner, grant: str = "g", *, marked: bool = False, hold: int = 0, rq: str = ""
) -> Chunk:
    """A chunk as the agent writes it, or for incarnation 0 as a Go pod does."""
    who = (owner.name, owner.ip, owner.instance)
    return Chunk(
        n, *who, Drsm(*who, owner.incarnation, grant, marked, hold, rq) if owner.incarnation else None
    )


def session(
    owner: Owner, state: str = "live", pools: Iterable[str] = ("amfid",), reason: str = ""
) -> Session:
    """A session of that pod."""
    who = (owner.name, owner.ip, owner.instance, owner.incarnation)
    return Session(*who, 1, state, tuple(pools), f"rq-{owner.incarnation}", 300_000, reason)


def keepalive(owner: Owner, *, mirror: bool = False) -> dict[str, Any]:
    """A keepalive document."""
    if mirror:
        return mirror_keepalive("amfid", owner, 0).document
    document = {"_id": owner.name, "type": "keepalive", "podId": owner.name, "podIp": owner.ip}
    return document | {"podInstance": owner.instance, "expireAt": 0}


def put(space: str, document: dict[str, Any], at: int, token: str = "") -> Change:
    """An insert or a replacement."""
    return Change(space, str(document["_id"]), at, token, document=document)


def delta(space: str, key: str, at: int, updated: dict[str, Any], removed: tuple[str, ...] = ()) -> Change:
    """An update as the change stream reports it."""
    return Change(space, key, at, updated=updated, removed=removed)


def gone(space: str, key: str, at: int, token: str = "") -> Change:
    """A deletion."""
    return Change(space, key, at, token, gone=True)


def fold(table: Table, *changes: Change) -> list[Event]:
    """All events of these changes."""
    return [event for change in changes for event in table.apply(change)]


# --- Chunks ---------------------------------------------------------------------------------------


def test_an_inserted_chunk_is_allocated() -> None:
    """With its owner whole, the change's token, and the table's own version before it."""
    assert fold(made(), put("amfid", chunk(5, AMF_1).document, 101, "t1")) == [
        Event("amfid", ALLOCATED, (101, 0), (100, 0), owner=AMF_1, chunks=(5,), token="t1")
    ]


def test_a_chunk_of_a_go_pod_is_allocated_too() -> None:
    """With incarnation 0."""
    (event,) = fold(made(), put("amfid", chunk(5, GO_POD).document, 101))
    assert (event.kind, event.owner) == (ALLOCATED, GO_POD)


def test_a_new_owner_is_a_claim() -> None:
    """With both owners, the new grant and the hold; the update has only what changed."""
    table, after = made(), chunk(5, AMF_2, "g2", marked=True, hold=310_000).document
    events = fold(
        table,
        put("amfid", chunk(5, AMF_1).document, 101),
        delta(
            "amfid",
            "chunkid-5",
            102,
            {name: after[name] for name in ("podId", "podIp", "podInstance", "drsm")},
        ),
    )
    assert events[1] == Event(
        "amfid", CLAIMED, (102, 0), (101, 0), AMF_2, AMF_1, chunks=(5,), grants=("g2",), hold_ms=310_000
    )
    assert table.pools["amfid"].chunks == {5: chunk(5, AMF_2, "g2", marked=True, hold=310_000)}


def test_a_go_pods_claim_is_seen_though_it_leaves_the_rest_stale() -> None:
    """Three fields change; the grant is none."""
    fields = {"podId": "amf-go", "podIp": "10.0.0.9", "podInstance": ""}
    first, second = fold(
        made(), put("amfid", chunk(5, AMF_1).document, 101), delta("amfid", "chunkid-5", 102, fields)
    )
    assert second == Event("amfid", CLAIMED, (102, 0), first.version, GO_POD, AMF_1, (5,), ("",))


def test_a_new_grant_of_the_same_owner_is_a_claim() -> None:
    """An owner that gets its chunk anew issued ids under the old grant which are not known."""
    _, second = fold(
        made(),
        *(put("amfid", chunk(5, AMF_1, grant).document, 101 + i) for i, grant in enumerate(("g1", "g2"))),
    )
    assert (second.kind, second.owner, second.previous, second.grants) == (CLAIMED, AMF_1, AMF_1, ("g2",))


def test_a_cleared_mark_is_a_scan() -> None:
    """As two fields of the sub-document."""
    table = made()
    _, second = fold(
        table,
        put("amfid", chunk(5, AMF_1, marked=True, hold=9).document, 101),
        delta("amfid", "chunkid-5", 102, {"drsm.marked": False, "drsm.hold_ms": 0}),
    )
    assert second == Event("amfid", SCANNED, (102, 0), (101, 0), owner=AMF_1, chunks=(5,))
    assert (table.pools["amfid"].marked, table.pools["amfid"].chunks[5].hold_ms) == (set(), 0)


def test_a_deleted_chunk_is_released() -> None:
    """By the owner it had."""
    _, second = fold(
        made(), put("amfid", chunk(5, AMF_1).document, 101), gone("amfid", "chunkid-5", 102, "t2")
    )
    assert second == Event("amfid", RELEASED, (102, 0), (101, 0), previous=AMF_1, chunks=(5,), token="t2")


@pytest.mark.parametrize(
    "change",
    [
        put("amfid", chunk(5, AMF_1).document, 102),
        delta("amfid", "chunkid-5", 102, {"drsm.request_id": "r-9"}),
        delta("amfid", "chunkid-5", 102, {"other": 1}, ("another",)),
        gone("amfid", "chunkid-6", 102),
        put(
            "amfid", {"_id": "chunkid-x", "type": "chunk", "podId": "a", "podIp": "", "podInstance": ""}, 102
        ),
        put("amfid", {"_id": "chunkid-6", "type": "chunk"}, 102),
        delta("amfid", "chunkid-6", 102, {"drsm.marked": False}),
        put("amfid", {"_id": "something"}, 102),
        delta("amfid", "something", 102, {"expireAt": 9}),
    ],
)
def test_what_changes_no_owner_is_no_event(change: Change) -> None:
    """Nor are documents that cannot be read: none of them is chunk 0."""
    table = made()
    fold(table, put("amfid", chunk(5, AMF_1).document, 101))
    assert fold(table, change) == []
    assert (set(table.pools["amfid"].chunks), table.pools["amfid"].version) == ({5}, (101, 0))


def test_a_chunk_that_becomes_unreadable_is_nobodys() -> None:
    """Consumers hear it, and hear it again when it can be read."""
    document = chunk(5, AMF_1).document
    events = fold(
        made(),
        put("amfid", document, 101),
        delta("amfid", "chunkid-5", 102, {"podId": None}),
        put("amfid", document, 103),
    )
    assert [(event.kind, event.owner or event.previous) for event in events] == [
        (ALLOCATED, AMF_1),
        (RELEASED, AMF_1),
        (ALLOCATED, AMF_1),
    ]


def test_a_requests_chunks_are_found_by_its_id() -> None:
    """A repeat gets the same ones, until they are claimed or released."""
    table = made()
    fold(table, *(put("amfid", chunk(n, AMF_1, rq="r-1").document, 101 + n) for n in (1, 2, 3)))
    assert table.pools["amfid"].requests == {"r-1": {1: None, 2: None, 3: None}}
    fold(table, gone("amfid", "chunkid-1", 110), put("amfid", chunk(2, AMF_2, "g2").document, 111))
    assert table.pools["amfid"].requests == {"r-1": {3: None}}
    fold(table, gone("amfid", "chunkid-3", 112))
    assert table.pools["amfid"].requests == {}


# --- Sessions -------------------------------------------------------------------------------------


def test_a_session_is_up_once_it_lives() -> None:
    """Not while it is only opened; then in each of its pools, and in no other."""
    table = made("amfid", "tmsi", "seid")
    key = "amf-1:5"
    assert fold(table, put(SESSIONS, session(AMF_1, "opened", ("amfid", "seid")).document, 101)) == []
    assert fold(table, delta(SESSIONS, key, 102, {"state": "live", "term": 2})) == [
        Event("amfid", UP, (102, 0), (100, 0), owner=AMF_1),
        Event("seid", UP, (102, 0), (100, 0), owner=AMF_1),
    ]
    assert {name: list(pool.live.values()) for name, pool in table.pools.items()} == {
        "amfid": [AMF_1],
        "tmsi": [],
        "seid": [AMF_1],
    }


def test_a_joined_pool_has_one_more_pod() -> None:
    """Only the new pool; the update names a position of the list, or the whole list."""
    table = made("amfid", "tmsi", "seid")
    fold(table, put(SESSIONS, session(AMF_1).document, 101))
    assert fold(table, delta(SESSIONS, "amf-1:5", 102, {"pools.1": "tmsi"})) == [
        Event("tmsi", UP, (102, 0), (100, 0), owner=AMF_1)
    ]
    assert fold(table, delta(SESSIONS, "amf-1:5", 103, {"pools": ["amfid", "tmsi", "seid"]})) == [
        Event("seid", UP, (103, 0), (100, 0), owner=AMF_1)
    ]


@pytest.mark.parametrize("reason", ["expired", "closed", "superseded"])
def test_a_dead_session_is_down_in_all_its_pools(reason: str) -> None:
    """With the reason that was written; its purge is no event."""
    table = made("amfid", "tmsi")
    fold(table, put(SESSIONS, session(AMF_1, pools=("amfid", "tmsi")).document, 101))
    assert fold(table, delta(SESSIONS, "amf-1:5", 102, {"state": "dead", "reason": reason})) == [
        Event("amfid", DOWN, (102, 0), (101, 0), owner=AMF_1, reason=reason),
        Event("tmsi", DOWN, (102, 0), (101, 0), owner=AMF_1, reason=reason),
    ]
    assert fold(table, gone(SESSIONS, "amf-1:5", 103)) == []
    assert table.sessions == {}


def test_a_session_that_died_unheard_is_no_event() -> None:
    """It was never up."""
    table = made()
    opened = put(SESSIONS, session(AMF_1, "opened").document, 101)
    assert fold(table, opened, delta(SESSIONS, "amf-1:5", 102, {"state": "dead", "reason": "expired"})) == []


def test_a_living_session_that_somebody_deleted_is_down() -> None:
    """An absent document means that the session is lost."""
    table = made()
    fold(table, put(SESSIONS, session(AMF_1).document, 101))
    (event,) = fold(table, gone(SESSIONS, "amf-1:5", 102))
    assert (event.kind, event.owner, event.reason) == (DOWN, AMF_1, "expired")


@pytest.mark.parametrize(
    "updated", [{"promised_ms": 400_000}, {"term": 9}, {"state": "live"}, {"pools.0": "amfid"}]
)
def test_other_changes_of_a_session_are_no_events(updated: dict[str, Any]) -> None:
    """Stamps and promises are the agent's own business; the pool's version stays."""
    table = made()
    fold(table, put(SESSIONS, session(AMF_1).document, 101))
    assert fold(table, delta(SESSIONS, "amf-1:5", 102, updated)) == []
    assert table.pools["amfid"].version == (101, 0)


def test_a_pool_that_this_agent_does_not_know_is_passed_over() -> None:
    """A session may name one that another configuration has."""
    assert fold(made(), put(SESSIONS, session(AMF_1, pools=("other",)).document, 101)) == []


def test_two_lives_of_one_name_are_two() -> None:
    """The old one's end takes nothing from the new one."""
    table, again = made(), replace(AMF_1, incarnation=9)
    fold(table, put(SESSIONS, session(AMF_1).document, 101), put(SESSIONS, session(again).document, 102))
    fold(table, delta(SESSIONS, "amf-1:5", 103, {"state": "dead", "reason": "superseded"}))
    assert list(table.pools["amfid"].live.values()) == [again]
    assert [s.incarnation for s in table.alive()] == [9]


def test_sessions_are_found_by_their_request() -> None:
    """The same request gets the same incarnation, as long as its document is there."""
    table = made()
    fold(table, put(SESSIONS, session(AMF_1, "opened").document, 101))
    assert table.opened_by("amf-1", "rq-5") == session(AMF_1, "opened")
    fold(table, gone(SESSIONS, "amf-1:5", 102))
    assert table.opened_by("amf-1", "rq-5") is None


def test_a_request_has_opened_the_newest_session_of_it_whichever_was_written_last() -> None:
    """A former leader's insert may come late, when the new leader has answered with a session of its own."""
    table, newer = made(), replace(session(AMF_1, "opened"), incarnation=1 << 32 | 9)
    fold(table, put(SESSIONS, newer.document, 101))
    fold(table, put(SESSIONS, session(AMF_1, "opened").document, 102))
    assert table.opened_by("amf-1", "rq-5") == newer
    fold(table, gone(SESSIONS, "amf-1:5", 103))
    assert table.opened_by("amf-1", "rq-5") == newer


@pytest.mark.parametrize("key", ["", "amf-1", "amf-1:x", "amf-1:²", "amf-1:" + "9" * 5000])
def test_strange_documents_among_the_sessions_are_passed_over(key: str) -> None:
    """Inserted, updated or deleted."""
    table = made()
    assert fold(table, put(SESSIONS, {"_id": key}, 101), delta(SESSIONS, key, 102, {"a": 1})) == []
    assert fold(table, gone(SESSIONS, key, 103)) == []
    assert table.sessions == {}


def test_a_history_is_taken_up_with_the_versions_that_consumers_hold() -> None:
    """Of a pool in which nothing happened since the read, earlier or later; not of one that has gone on."""
    table = made("quiet", "older", "touched", "ahead", "new")
    fold(table, put("touched", chunk(1, AMF_1).document, 105), put("ahead", chunk(1, AMF_1).document, 109))
    table.resume({"quiet": (120, 0), "older": (90, 3), "touched": (120, 0), "ahead": (107, 0), "new": (0, 0)})
    assert {name: pool.version for name, pool in table.pools.items()} == {
        "quiet": (120, 0),
        "older": (90, 3),
        "touched": (120, 0),
        "ahead": (109, 0),
        "new": (table.started, 0),
    }


def test_a_stamp_is_kept_and_is_no_event() -> None:
    """What comes back of a leader's own write tells it how far it has read."""
    table = made()
    assert fold(table, put(STAMPS, {"_id": "stamp", "term": 1, "n": 1}, 101)) == []
    assert fold(table, delta(STAMPS, "stamp", 102, {"term": 2, "n": 2})) == []
    assert table.stamp == {"_id": "stamp", "term": 2, "n": 2}
    assert (fold(table, gone(STAMPS, "stamp", 103)), table.stamp) == ([], {})


# --- Keepalives -----------------------------------------------------------------------------------


def test_go_pods_are_up_and_down_by_their_keepalives() -> None:
    """`deleted` is theirs alone; renewals are no events."""
    renewed = delta("amfid", "amf-go", 102, {"expireAt": 9})
    assert fold(made(), put("amfid", keepalive(GO_POD), 101), renewed, gone("amfid", "amf-go", 103)) == [
        Event("amfid", UP, (101, 0), (100, 0), owner=GO_POD),
        Event("amfid", DOWN, (103, 0), (101, 0), owner=GO_POD, reason="deleted"),
    ]


def test_mirrors_are_no_events() -> None:
    """Inserted, prolonged, replaced or deleted."""
    mirror = keepalive(AMF_1, mirror=True)
    assert (
        fold(
            made(),
            put("amfid", mirror, 101),
            delta("amfid", "amf-1", 102, {"expireAt": 9, "drsm.end": 9}),
            put("amfid", mirror, 103),
            gone("amfid", "amf-1", 104),
        )
        == []
    )


def test_a_go_pod_with_another_address_is_up_anew() -> None:
    """One change is one event."""
    moved = replace(GO_POD, ip="10.0.0.99")
    events = fold(
        made(), put("amfid", keepalive(GO_POD), 101), delta("amfid", "amf-go", 102, {"podIp": "10.0.0.99"})
    )
    assert [(event.kind, event.owner) for event in events] == [(UP, GO_POD), (UP, moved)]


def test_a_go_pod_that_takes_a_mirrors_name_is_up() -> None:
    """Also one with the session's own address and instance, which is all that its write changes; and back."""
    table, go = made(), replace(AMF_1, incarnation=0)
    fold(table, put("amfid", keepalive(AMF_1, mirror=True), 101))
    renewed = delta("amfid", "amf-1", 102, {"podInstance": AMF_1.instance, "expireAt": 5})
    assert [(e.kind, e.owner) for e in fold(table, renewed)] == [(UP, go)]
    assert [(e.kind, e.owner) for e in fold(table, put("amfid", keepalive(AMF_1, mirror=True), 103))] == [
        (DOWN, go)
    ]


def test_the_state_of_a_go_pod_with_chunks_is_a_function_of_the_documents() -> None:
    """Unknown without a keepalive, live with one, down while one says so. Whoever hears the events has it
    too."""
    table = made()
    pool, mirror = table.pools["amfid"], Mirror()
    mirror.load(Snapshot((V, 0), "h", 1, Definition(name="amfid"), (), ()))
    kept = keepalive(GO_POD)

    def states(*changes: Change) -> tuple[str, str]:
        for event in fold(table, *changes):
            head = EventHead(
                pool="amfid", version=event.version, prev=event.prev, agent="a", term=1, history="h", at=0
            )
            mirror.apply(head, event_body(event, {}))
        held = mirror.owner_of(1)
        assert held is not None
        return pool.state(pool.chunks[1].owner), held.state

    silent = kept | {"drsm": {"silent": 0}}
    stand_in = keepalive(GO_POD, mirror=True)
    seen = [
        states(put("amfid", chunk(1, GO_POD).document, 101)),
        states(put("amfid", kept, 102)),
        states(put("amfid", silent, 103)),
        states(delta("amfid", "amf-go", 104, {"expireAt": 9})),
        states(gone("amfid", "amf-go", 105)),
        states(put("amfid", stand_in, 106)),
        states(gone("amfid", "amf-go", 107)),
        states(put("amfid", silent, 108)),
        states(gone("amfid", "amf-go", 109)),
        states(put("amfid", keepalive(replace(GO_POD, incarnation=7), mirror=True), 110)),
        states(put("amfid", kept, 111)),
    ]
    expected = [
        "unknown",
        "live",
        "down",
        "live",
        "unknown",
        "down",
        "unknown",
        "down",
        "unknown",
        "unknown",
        "live",
    ]
    assert seen == [(state, state) for state in expected]


@pytest.mark.parametrize("wrote", [{"podIp": "10.0.0.9"}, {}])
def test_a_go_pod_that_writes_no_instance_lives_by_its_renewals_too(wrote: dict[str, str]) -> None:
    """The agent's own end beside the renewed one tells; what it does not write is not taken for its own."""
    go = replace(AMF_1, instance="", ip=wrote.get("podIp", ""), incarnation=0)
    table, its = made(), keepalive(go) | wrote
    del its["podInstance"]
    if not wrote:
        del its["podIp"]
    seen = fold(table, put("amfid", its, 101))
    (taken,) = table.pools["amfid"].keepalives.values()
    write = take_over_keepalive("amfid", taken, AMF_1, 50)
    seen += fold(table, delta("amfid", "amf-1", 102, write.set))
    assert table.pools["amfid"].keepalives["amf-1"].mirrored == AMF_1
    signs = table.pools["amfid"].signs["amf-1"]
    seen += fold(table, delta("amfid", "amf-1", 103, wrote | {"expireAt": 70}))
    assert table.pools["amfid"].keepalives["amf-1"].go_owner == go
    assert table.pools["amfid"].signs["amf-1"] == signs + 1
    assert [(event.kind, event.owner) for event in seen] == [(UP, go)]


@pytest.mark.parametrize(
    "harm",
    [{"podIp": 5}, {"podIp": "x" * 65}, {"expireAt": "soon"}, {"podInstance": ["nf-9"]}, {"type": "odd"}],
)
def test_a_keepalive_that_could_not_be_read_is_there_again_once_a_go_pod_sets_its_fields(
    harm: dict[str, Any],
) -> None:
    """The change tells only what differs, so the rest is remembered."""
    table, fine = made(), keepalive(GO_POD)
    fold(table, put("amfid", fine, 101))
    events = fold(table, delta("amfid", "amf-go", 102, harm))
    assert [event.kind for event in events] == [DOWN]
    assert list(table.pools["amfid"].odd) == ["amf-go"]
    healed = {name: fine[name] for name in harm} | {"expireAt": 9}
    events = fold(table, delta("amfid", "amf-go", 103, healed))
    assert [(event.kind, event.owner) for event in events] == [(UP, GO_POD)]
    assert table.pools["amfid"].odd == {}
    assert {"_id": "amf-go"} | table.pools["amfid"].keepalives["amf-go"].document == fine | {"expireAt": 9}


def test_what_is_kept_of_documents_that_are_no_keepalives_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In size and number; one that is deleted is forgotten."""
    monkeypatch.setattr("drsm_agent.core.table.ODD_MAX", 2)
    table = made()
    huge = {"type": "x" * 100_000, "podIp": "y" * 100_000, "beside": "z" * 100_000}
    fold(table, *(put("amfid", {"_id": f"odd-{n}"} | huge, 101 + n) for n in range(3)))
    odd = table.pools["amfid"].odd
    assert list(odd) == ["odd-0", "odd-1"]
    assert len(repr(odd)) < 200
    fold(table, gone("amfid", "odd-0", 110))
    assert list(odd) == ["odd-1"]


def test_the_keepalives_address_is_that_of_a_go_pods_chunks() -> None:
    """A Go pod that starts anew under its name never writes its old chunks; what they say leads nowhere."""
    table, moved = made(), replace(GO_POD, ip="10.0.0.99")
    fold(table, put("amfid", chunk(1, GO_POD).document, 101), put("amfid", keepalive(moved), 102))
    pool = table.pools["amfid"]
    assert pool.owners() == {GO_POD.key: moved}
    (released,) = fold(table, gone("amfid", "chunkid-1", 103))
    assert released.previous == moved


def test_signs_of_a_go_pods_life_are_its_own_writes() -> None:
    """Its renewals, its allocations and its claims; not what the agent writes beside, nor a delete."""
    table = made()
    pool, signs = table.pools["amfid"], []
    for change in (
        put("amfid", keepalive(GO_POD), 101),
        delta("amfid", "amf-go", 102, {"expireAt": 9}),
        delta("amfid", "amf-go", 103, {"drsm.other": 99}),
        delta("amfid", "amf-go", 104, {"drsm.silent": 99}),
        delta("amfid", "amf-go", 105, {"expireAt": 10}),
        put("amfid", chunk(1, GO_POD).document, 106),
        delta("amfid", "chunkid-1", 107, {"drsm": {"go_owners": ["amf-x"]}}),
        gone("amfid", "amf-go", 108),
    ):
        fold(table, change)
        signs.append(pool.signs.get("amf-go", 0))
    assert signs == [1, 2, 2, 2, 3, 4, 4, 4]


def test_go_pods_know_what_was_owned_since_one_of_them_is_there() -> None:
    """Also what is free again: they never take it. Without any, nobody knows anything."""
    table = made()
    pool = table.pools["amfid"]
    fold(table, put("amfid", chunk(1, AMF_1).document, 101), put("amfid", chunk(2, AMF_1).document, 102))
    fold(table, gone("amfid", "chunkid-1", 103))
    assert pool.known_free == {}
    fold(table, put("amfid", keepalive(GO_POD), 104), put("amfid", chunk(5, AMF_1).document, 105))
    fold(table, gone("amfid", "chunkid-2", 106))
    assert pool.known_free == {2: 106}
    fold(table, put("amfid", chunk(2, AMF_1).document, 107), gone("amfid", "chunkid-5", 108))
    assert pool.known_free == {5: 108}
    fold(table, gone("amfid", "amf-go", 109))
    assert pool.known_free == {}


def test_what_only_go_pods_knew_that_have_started_anew_is_new_again() -> None:
    """One by one, under their names or others: it is the way out when they know too many."""
    table, other = made(), replace(GO_POD, name="amf-go-2")
    pool = table.pools["amfid"]
    fold(table, put("amfid", keepalive(GO_POD), 101), put("amfid", keepalive(other), 102))
    fold(table, put("amfid", chunk(1, AMF_1).document, 103), gone("amfid", "chunkid-1", 104))
    fold(table, gone("amfid", "amf-go", 105), put("amfid", keepalive(GO_POD), 106))
    assert pool.known_free == {1: 104}  # the other one still knows it
    fold(table, delta("amfid", "amf-go-2", 107, {"podIp": "10.0.0.99", "expireAt": 1}))
    assert pool.known_free == {}
    assert pool.go_since == {"amf-go": 106, "amf-go-2": 107}


def test_a_go_pod_that_is_silent_under_an_sdk_pods_name_still_knows_its_numbers() -> None:
    """It may only stand still; and goes on as the process that it was."""
    table = made()
    pool, its = table.pools["amfid"], keepalive(replace(GO_POD, name=AMF_1.name))
    fold(table, put("amfid", its, 101), put("amfid", chunk(1, AMF_1).document, 102))
    fold(table, gone("amfid", "chunkid-1", 103))
    taken = take_over_keepalive("amfid", pool.keepalives["amf-1"], AMF_1, 9)
    fold(table, delta("amfid", "amf-1", 104, taken.set))
    silent = note_silence("amfid", pool.keepalives["amf-1"], replace(GO_POD, name=AMF_1.name))
    fold(table, delta("amfid", "amf-1", 105, silent.set))
    assert (pool.has_go, pool.known_free) == (False, {1: 103})
    fold(
        table,
        delta("amfid", "amf-1", 106, {"podInstance": GO_POD.instance, "podIp": GO_POD.ip, "expireAt": 20}),
    )
    assert (pool.go_since, pool.known_free) == ({"amf-1": 101}, {1: 103})


def test_keepalives_that_were_deleted_of_late_are_remembered_for_a_minute() -> None:
    """By the database's time: whoever leads next has perhaps seen it, and Go pods may claim just then."""
    table, minute = made(), GONE_SECONDS << 32
    pool = table.pools["amfid"]
    fold(table, put("amfid", keepalive(GO_POD), 101), gone("amfid", "amf-go", 102))
    assert pool.gone == {"amf-go": 102}
    fold(table, put("amfid", keepalive(AMF_1, mirror=True), 103), gone("amfid", "amf-1", 102 + minute))
    assert pool.gone == {"amf-1": 102 + minute}
    fold(table, put("amfid", keepalive(AMF_1, mirror=True), 103 + minute))
    assert pool.gone == {"amf-1": 102 + minute}  # Go pods have seen that it was


def test_chunks_that_came_from_go_pods_are_found_by_their_names() -> None:
    """As long as a pod of ours has them."""
    table = made()
    pool = table.pools["amfid"]
    fold(
        table, put("amfid", claim("amfid", chunk(1, GO_POD), AMF_1, "g2", 5).set | {"_id": "chunkid-1"}, 101)
    )
    assert {name: list(numbers) for name, numbers in pool.from_go.items()} == {"amf-go": [1]}
    fold(table, delta("amfid", "chunkid-1", 102, {"podId": "amf-go-2", "podIp": "10.0.0.8"}))
    assert pool.from_go == {}
    assert pool.chunks[1].go_owners == ("amf-go",)


# --- Versions -------------------------------------------------------------------------------------


def test_changes_of_one_cluster_time_are_parts() -> None:
    """They number the stream's changes, not the pool's events; `prev` is the pool's own."""
    table = made("amfid", "tmsi")
    events = fold(
        table,
        put("amfid", chunk(1, AMF_1).document, 101),
        put("tmsi", chunk(1, AMF_1).document, 101),
        put(SESSIONS, session(AMF_1, "opened").document, 101),
        put("amfid", chunk(2, AMF_1).document, 101),
        put("amfid", chunk(3, AMF_1).document, 102),
        put("tmsi", chunk(2, AMF_1).document, 102),
    )
    assert [(event.pool, event.version, event.prev) for event in events] == [
        ("amfid", (101, 0), (100, 0)),
        ("tmsi", (101, 1), (100, 0)),
        ("amfid", (101, 3), (101, 0)),
        ("amfid", (102, 0), (101, 3)),
        ("tmsi", (102, 1), (101, 1)),
    ]
    assert {name: pool.version for name, pool in table.pools.items()} == {"amfid": (102, 0), "tmsi": (102, 1)}
    assert (table.applied, table.started) == (6, 100)


def test_a_table_that_was_loaded_has_the_version_of_its_read() -> None:
    """Empty pools too, and nothing was an event."""
    table = made("amfid", "tmsi")
    table.load(SESSIONS, [session(AMF_1).document])
    table.load("amfid", [chunk(5, AMF_1).document, keepalive(GO_POD), {"_id": 7}])
    assert {name: pool.version for name, pool in table.pools.items()} == {"amfid": (100, 0), "tmsi": (100, 0)}
    assert (set(table.pools["amfid"].chunks), table.applied) == ({5}, 0)
    assert set(table.pools["amfid"].live.values()) == {AMF_1, GO_POD}


# --- Questions ------------------------------------------------------------------------------------


def test_orphans_are_the_chunks_of_pods_that_are_not_up() -> None:
    """In this pool: an opened session, a dead one, one without this pool, a Go pod without keepalive."""
    table = made("amfid", "tmsi")
    away = Owner("amf-3", "", "", 7)
    table.load(SESSIONS, [session(AMF_1).document, session(AMF_2, "dead").document])
    table.load(SESSIONS, [session(away, pools=("tmsi",)).document])
    table.load("amfid", [chunk(n, owner).document for n, owner in enumerate((AMF_1, AMF_2, GO_POD, away))])
    assert sorted(orphan.n for orphan in table.pools["amfid"].orphans()) == [1, 2, 3]
    fold(table, put("amfid", keepalive(GO_POD), 101), put(SESSIONS, session(AMF_2).document, 102))
    assert [orphan.n for orphan in table.pools["amfid"].orphans()] == [3]


def test_owners_are_who_is_up_or_owns_a_chunk() -> None:
    """Each whole, once."""
    table = made()
    table.load(SESSIONS, [session(AMF_1).document])
    table.load("amfid", [chunk(1, GO_POD).document, chunk(2, GO_POD).document, chunk(3, AMF_1).document])
    assert table.pools["amfid"].owners() == {AMF_1.key: AMF_1, GO_POD.key: GO_POD}


def test_a_pods_chunks_are_found_over_all_pools() -> None:
    """Of one incarnation only."""
    table = made("amfid", "tmsi")
    table.load("amfid", [chunk(1, AMF_1).document, chunk(2, AMF_2).document])
    table.load("tmsi", [chunk(1, AMF_1).document, chunk(3, replace(AMF_1, incarnation=9)).document])
    assert table.chunks_of(AMF_1.key) == [("amfid", chunk(1, AMF_1)), ("tmsi", chunk(1, AMF_1))]
    assert table.chunks_of(("nobody", 1)) == []


def test_only_what_is_dead_does_not_live() -> None:
    """`alive` has the opened ones too, which are not up."""
    table = made()
    for i, state in enumerate(("opened", "live", "dead")):
        table.load(SESSIONS, [session(replace(AMF_1, incarnation=i + 1), state).document])
    assert [s.state for s in table.alive()] == ["opened", "live"]
    assert [table.is_live(s) for s in (*table.sessions.values(), None)] == [False, True, False, False]


# --- Against a plain model ------------------------------------------------------------------------

POOLS = ("amfid", "tmsi")
_POOL = st.sampled_from(POOLS)
_N = st.integers(0, 4)
_NUMBERS = st.lists(_N, min_size=1, max_size=3, unique=True)
_STEP = st.sampled_from([0, 0, 1, 5])
_SDK = [Owner(name, f"10.0.0.{i}", "nf", 10 + i) for i, name in enumerate(("a", "b", "a"))]
_GO = [Owner(name, f"10.1.0.{i}", "", 0) for i, name in enumerate(("a", "g"))]


def event_owner(owner: Owner) -> MirrorOwner:
    """An owner as the SDK shows it."""
    return MirrorOwner(owner.name, owner.ip, owner.instance, owner.incarnation)


class Consumer:
    """A demux: it knows nothing but events."""

    def __init__(self) -> None:
        self.version = (V, 0)
        self.owners: dict[int, Owner] = {}
        self.marked: set[int] = set()
        self.live: dict[tuple[str, int], Owner] = {}
        self.down: dict[tuple[str, int], Owner] = {}

    def hear(self, event: Event) -> None:
        """One event, in order and without a gap."""
        assert (event.prev, event.version > event.prev) == (self.version, True)
        self.version = event.version
        if event.kind == UP:
            assert event.owner is not None
            self.down.pop(event.owner.key, None)
            self.live[event.owner.key] = event.owner
        elif event.kind == DOWN:
            assert event.owner is not None
            self.live.pop(event.owner.key, None)
            self.down.pop(event.owner.key, None)
            if event.reason == "silent":
                self.down[event.owner.key] = event.owner
        for n in event.chunks:
            assert self.owners.get(n) == (event.owner if event.kind == SCANNED else event.previous)
            self.marked.discard(n)
            if event.kind == RELEASED:
                del self.owners[n]
            elif event.owner is not None:
                self.owners[n] = event.owner
            if event.kind == CLAIMED and event.grants != ("",):
                self.marked.add(n)


ADDRESSES = {owner.name: {"ip": owner.ip, "instance": owner.instance} for owner in (*_SDK, *_GO)}


def _ours(document: dict[str, Any]) -> bool:
    """Whether a keepalive is one of the agent's."""
    drsm = document.get("drsm", {})
    named = document["podInstance"] == f"drsm:{document['podId']}:{drsm.get('incarnation')}"
    return bool(named and drsm.get("end") == document["expireAt"])


def _of_go(document: dict[str, Any]) -> Owner:
    """The Go pod that a keepalive of its own shows: one may have written no instance."""
    instance = document["podInstance"]
    instance = "" if instance.startswith("drsm:") else instance
    return Owner(document["podId"], document["podIp"], instance, 0)


class TableAgainstDocuments(RuleBasedStateMachine):
    """Any history of documents, as agents and Go pods write them: at every moment the table is what the
    documents say, a consumer of its events agrees, and a table that was loaded in between and then
    followed the stream is the same and says the same."""

    @initialize()
    def start(self) -> None:
        """An empty database."""
        self.at, self.part, self.tokens = V, 0, 0
        self.documents: dict[tuple[str, str], dict[str, Any]] = {}
        self.table = made(*POOLS)
        self.consumers = {pool: Consumer() for pool in POOLS}
        self.late: Table | None = None
        self.late_heard: dict[str, Event] = {}
        self.mirrors = {pool: Mirror() for pool in POOLS}
        self.unpublished: dict[str, list[Event]] = {pool: [] for pool in POOLS}
        self.snapshots: dict[tuple[str, Version], object] = {}
        for pool in POOLS:
            self.take_snapshot(pool, 1 << 20)

    def _change(self, step: int, change: Change) -> None:
        self.part = 0 if step else self.part + 1
        self.at += step
        if self.at == V:
            self.at, self.part = V + 1, 0
        change = replace(change, at=self.at, token=f"t{self.table.applied}")
        events = self.table.apply(change)
        for event in events:
            assert (event.version, event.token) == ((self.at, self.part), change.token)
            self.consumers[event.pool].hear(event)
            self.unpublished[event.pool].append(event)
        assert len({event.pool for event in events}) == len(events)
        if self.late:
            heard = self.late.apply(change)
            for mine, theirs in zip(events, heard, strict=True):
                # the first event's `prev` is where that table began
                if mine.pool not in self.late_heard:
                    assert theirs.prev == (self.late.started, 0)
                    assert replace(theirs, prev=mine.prev) == mine
                else:
                    assert theirs == mine
                self.late_heard[mine.pool] = mine

    def _grant(self) -> str:
        self.tokens += 1
        return f"{self.tokens:016x}"

    def _put(self, step: int, space: str, document: dict[str, Any]) -> None:
        self.documents[space, document["_id"]] = document
        self._change(step, put(space, dict(document), 0))

    def _update(self, step: int, space: str, key: str, **fields: Any) -> None:
        """`__` stands for the dot of a path."""
        document = self.documents[space, key]
        for path, value in fields.items():
            head, _, rest = path.partition("__")
            document[head] = {**document[head], rest: value} if rest else value
        self._change(
            step, delta(space, key, 0, {path.replace("__", "."): value for path, value in fields.items()})
        )

    def _delete(self, step: int, space: str, key: str) -> None:
        del self.documents[space, key]
        self._change(step, gone(space, key, 0))

    @rule(step=_STEP, pool=_POOL, numbers=_NUMBERS, owner=st.sampled_from(_SDK + _GO), between=st.booleans())
    def allocate(self, step: int, pool: str, numbers: list[int], owner: Owner, between: bool) -> None:
        """Free chunks get their first owner; a demux may take a snapshot between any two of them."""
        for n in numbers:
            if between:
                self.take_snapshot(pool, 1 << 20)
            if (pool, f"chunkid-{n}") in self.documents:
                continue
            document: dict[str, Any] = {"_id": f"chunkid-{n}", "type": "chunk", "chunkId": f"chunkid-{n}"}
            document |= {"podId": owner.name, "podInstance": owner.instance, "podIp": owner.ip}
            self._put(step, pool, document | self._drsm(owner, marked=False))

    def _drsm(self, owner: Owner, *, marked: bool) -> dict[str, Any]:
        if not owner.incarnation:
            return {}
        who = {
            "pod": owner.name,
            "ip": owner.ip,
            "instance": owner.instance,
            "incarnation": owner.incarnation,
        }
        rest = {"grant": self._grant(), "marked": marked, "hold_ms": 9 if marked else 0}
        return {"drsm": who | rest | {"request_id": "" if marked else f"rq-{self.tokens % 3}"}}

    @rule(step=_STEP, pool=_POOL, numbers=_NUMBERS, owner=st.sampled_from(_SDK + _GO))
    def claim(self, step: int, pool: str, numbers: list[int], owner: Owner) -> None:
        """By the agent, with a new grant and the mark; or by a Go pod, which sets three fields."""
        for n in numbers:
            if (pool, f"chunkid-{n}") in self.documents:
                fields = {"podId": owner.name, "podInstance": owner.instance, "podIp": owner.ip}
                self._update(step, pool, f"chunkid-{n}", **fields, **self._drsm(owner, marked=True))

    @rule(step=_STEP, pool=_POOL, n=_N)
    def clear(self, step: int, pool: str, n: int) -> None:
        """A finished scan."""
        if "drsm" in self.documents.get((pool, f"chunkid-{n}"), {}):
            self._update(step, pool, f"chunkid-{n}", drsm__marked=False, drsm__hold_ms=0)

    @rule(step=_STEP, pool=_POOL, n=_N)
    def release(self, step: int, pool: str, n: int) -> None:
        """A chunk becomes free."""
        if (pool, f"chunkid-{n}") in self.documents:
            self._delete(step, pool, f"chunkid-{n}")

    @rule(step=_STEP, pool=_POOL, key=st.sampled_from(["chunkid-x", "chunkid-01", "note"]))
    def litter(self, step: int, pool: str, key: str) -> None:
        """Documents that are neither, written twice."""
        document = {"_id": key, "type": "chunk", "podId": "a", "podInstance": "", "podIp": ""}
        self._put(step, pool, document)

    @rule(step=_STEP, owner=st.sampled_from(_SDK), state=st.sampled_from(["opened", "live"]))
    def open(self, step: int, owner: Owner, state: str) -> None:
        """A session begins."""
        document = session(owner, state, POOLS[:1]).document
        if (SESSIONS, document["_id"]) not in self.documents:
            self._put(step, SESSIONS, document | {"pools": list(document["pools"])})

    @rule(step=_STEP, owner=st.sampled_from(_SDK), data=st.data())
    def live_on(self, step: int, owner: Owner, data: st.DataObject) -> None:
        """It speaks, joins, is promised more, dies, is purged."""
        key = f"{owner.name}:{owner.incarnation}"
        known = self.documents.get((SESSIONS, key))
        if known is None:
            return
        match data.draw(st.sampled_from(["speak", "join", "promise", "die", "purge"])):
            case "speak" if known["state"] == "opened":
                self._update(step, SESSIONS, key, state="live", term=2)
            case "join" if len(known["pools"]) == 1:
                known["pools"] = [*known["pools"], POOLS[1]]
                self._change(step, delta(SESSIONS, key, 0, {"pools.1": POOLS[1]}))
            case "promise":
                self._update(step, SESSIONS, key, promised_ms=known["promised_ms"] + 1)
            case "die":
                self._update(step, SESSIONS, key, state="dead", reason="closed")
            case "purge":
                self._delete(step, SESSIONS, key)

    @rule(step=_STEP, pool=_POOL, owner=st.sampled_from(_SDK + _GO))
    def show(self, step: int, pool: str, owner: Owner) -> None:
        """A keepalive: a Go pod's, or the mirror of a session; inserted or prolonged."""
        if (pool, owner.name) in self.documents:
            known, end = self.documents[pool, owner.name], self.table.applied
            ours = {"drsm": known["drsm"] | {"end": end}} if _ours(known) else {}
            self._update(step, pool, owner.name, expireAt=end, **ours)
        else:
            self._put(step, pool, keepalive(owner, mirror=bool(owner.incarnation)))

    @rule(step=_STEP, pool=_POOL, name=st.sampled_from(["a", "b", "g"]))
    def note_silence(self, step: int, pool: str, name: str) -> None:
        """The leader says of a keepalive that its Go pod is down; on a mirror, that one without any is."""
        if document := self.documents.get((pool, name)):
            down = ADDRESSES[name] | {"down": True}
            said = {"go": down} if _ours(document) else {"silent": document["expireAt"]}
            self._update(step, pool, name, drsm=document.get("drsm", {}) | said)

    @rule(step=_STEP, pool=_POOL, owner=st.sampled_from(_SDK))
    def take_over(self, step: int, pool: str, owner: Owner) -> None:
        """A Go pod's keepalive becomes the mirror of an SDK pod, and says that the Go pod lives."""
        document = self.documents.get((pool, owner.name))
        if document and not _ours(document):
            go = {"ip": document["podIp"], "instance": _of_go(document).instance}
            down = document.get("drsm", {}).get("silent") == document["expireAt"]
            fields = keepalive(owner, mirror=True)
            fields["drsm"] |= {"go": go | {"down": down}}
            self._update(step, pool, owner.name, **{k: v for k, v in fields.items() if k != "_id"})

    @rule(step=_STEP, pool=_POOL, owner=st.sampled_from(_GO))
    def stand_in(self, step: int, pool: str, owner: Owner) -> None:
        """A keepalive for a Go pod that has none and is silent."""
        if (pool, owner.name) not in self.documents:
            self._put(step, pool, keepalive(owner, mirror=True))

    @rule(step=_STEP, pool=_POOL, owner=st.sampled_from(_GO), bare=st.booleans())
    def take_name(self, step: int, pool: str, owner: Owner, *, bare: bool) -> None:
        """A Go pod writes its fields over the keepalive of its name, whatever that is; older ones wrote no
        instance."""
        if (pool, owner.name) in self.documents:
            instance = {} if bare else {"podInstance": owner.instance}
            fields = instance | {"podIp": owner.ip, "expireAt": self.table.applied + 1}
            self._update(step, pool, owner.name, **fields)

    @rule(step=_STEP, pool=_POOL, name=st.sampled_from(["a", "b", "g"]))
    def vanish(self, step: int, pool: str, name: str) -> None:
        """A keepalive is deleted."""
        if (pool, name) in self.documents:
            self._delete(step, pool, name)

    @rule(pool=_POOL, payload=st.sampled_from([300, 1 << 20]))
    def take_snapshot(self, pool: str, payload: int) -> None:
        """A demux takes one, in one page or many; what happened before may still be published later. It is
        the same one for all who ask at the same version."""
        pages = Pages()
        for page in PoolPages(self.table.pools[pool], Definition(name=pool), payload):
            whole = pages.add(Stamp("agent", 1, "h"), page)
        assert whole is not None
        assert whole.marked == self.table.pools[pool].marked
        owned = {n: key for key, numbers in whole.chunks for n in numbers}
        said = set(whole.owners), owned, whole.marked
        assert self.snapshots.setdefault((pool, whole.version), said) == said
        assert self.mirrors[pool].load(whole)

    @rule(pool=_POOL, most=st.sampled_from([1, 2, 1000]))
    def publish(self, pool: str, most: int) -> None:
        """What happened since goes out, neighbours as one event; then a sync, which the demux confirms."""
        mirror, table = self.mirrors[pool], self.table.pools[pool]
        held = mirror.version
        for event in coalesce(self.unpublished[pool], most=most):
            head = EventHead(pool, event.version, event.prev, "agent", 1, "h", 0)
            verdict = mirror.apply(head, event_body(event, {}))
            assert verdict is (Verdict.APPLIED if event.version > held else Verdict.DROPPED)
        self.unpublished[pool] = []
        sync = Sync(len(table.live), len(table.chunks), table.checksum)
        head = EventHead(pool, table.version, table.version, "agent", 1, "h", 0)
        assert mirror.apply(head, sync) is Verdict.CONFIRMED

    @precondition(lambda self: self.late is None and self.at > V)
    @rule()
    def load_another(self) -> None:
        """Another agent reads everything here, and follows from the next cluster time on."""
        self.late = Table(POOLS, self.at, HASHES)
        for space in (*POOLS, SESSIONS):
            self.late.load(
                space, [document for (where, _), document in self.documents.items() if where == space]
            )
        self.at, self.part = self.at + 1, -1

    @invariant()
    def the_table_is_what_the_documents_say(self) -> None:
        """Computed anew from all documents, in plain words."""
        for pool in POOLS:
            owners, marked, grants = {}, set(), {}
            for (space, key), document in self.documents.items():
                if space != pool or key not in {f"chunkid-{n}" for n in range(5)}:
                    continue
                n, drsm = int(key[8:]), document.get("drsm", {})
                fields = (document["podId"], document["podIp"], document["podInstance"])
                ours = fields == (drsm.get("pod"), drsm.get("ip"), drsm.get("instance"))
                owners[n] = Owner(*fields, drsm["incarnation"] if ours else 0)
                grants[n] = drsm["grant"] if ours else ""
                if ours and drsm["marked"]:
                    marked.add(n)
            table, consumer = self.table.pools[pool], self.consumers[pool]
            live, down = self._living(pool), self._told_down(pool)
            assert {n: chunk.owner for n, chunk in table.chunks.items()} == owners == consumer.owners
            assert table.marked == marked == consumer.marked
            assert table.live == live == consumer.live
            assert table.down == down == consumer.down
            assert table.version == consumer.version
            assert {orphan.n for orphan in table.orphans()} == {
                n for n in owners if owners[n].key not in live
            }
            assert table.checksum == sum(ownership(n, *owner.key) for n, owner in owners.items()) % 2**64
            for held in {owner.key for owner in owners.values()} | set(table.held):
                numbers = {n for n, owner in owners.items() if owner.key == held}
                assert set(table.held[held].numbers) == numbers
                sums = sum(holding(n, grants[n], n in marked) for n in numbers)
                assert table.held[held].checksum == sums % 2**64

    @invariant()
    def a_mirror_that_heard_everything_is_what_the_documents_say(self) -> None:
        """Whose each chunk is, and who is up; it knows nobody else."""
        for pool, mirror in self.mirrors.items():
            table = self.table.pools[pool]
            if mirror.version != table.version:
                assert mirror.version < table.version
                continue
            owners = {n: event_owner(owner) for n, owner in self.consumers[pool].owners.items()}
            assert {n: replace(owner, state="live") for n, owner in mirror.chunks().items()} == owners
            living = {event_owner(owner) for owner in self._living(pool).values()}
            told = {event_owner(owner) for owner in self._told_down(pool).values()}
            states = {owner: "down" if owner.incarnation else "unknown" for owner in owners.values()}
            states |= dict.fromkeys(told, "down") | dict.fromkeys(living, "live")
            assert {replace(owner, state="live"): owner.state for owner in mirror.pods()} == states

    def _living(self, pool: str) -> dict[tuple[str, int], Owner]:
        living: dict[tuple[str, int], Owner] = {}
        for (space, _), document in self.documents.items():
            if space == SESSIONS and document["state"] == "live" and pool in document["pools"]:
                owner = Owner(document["pod"], document["ip"], document["instance"], document["incarnation"])
                living[owner.key] = owner
            if space != pool or document["type"] != "keepalive":
                continue
            drsm, name = document.get("drsm", {}), document["podId"]
            told = drsm.get("go", {"down": True}) if _ours(document) else None
            if told and not told["down"] and drsm["incarnation"]:
                living[name, 0] = Owner(name, told["ip"], told["instance"], 0)
            elif told is None and drsm.get("silent") != document["expireAt"]:
                living[name, 0] = _of_go(document)
        return living

    def _told_down(self, pool: str) -> dict[tuple[str, int], Owner]:
        down: dict[tuple[str, int], Owner] = {}
        for (space, _), document in self.documents.items():
            if space != pool or document["type"] != "keepalive":
                continue
            drsm, name = document.get("drsm", {}), document["podId"]
            if not _ours(document):
                if drsm.get("silent") == document["expireAt"]:
                    down[name, 0] = _of_go(document)
            elif drsm["incarnation"] == 0:
                down[name, 0] = Owner(name, drsm["ip"], drsm["instance"], 0)
            elif drsm.get("go", {}).get("down"):
                down[name, 0] = Owner(name, drsm["go"]["ip"], drsm["go"]["instance"], 0)
        return down

    @invariant()
    def a_table_loaded_later_is_the_same(self) -> None:
        """In all that it knows; its versions begin at its own read."""
        if self.late is None:
            return
        for pool, late in self.late.pools.items():
            mine = self.table.pools[pool]
            assert replace(late, version=mine.version) == mine
            assert late.version == (mine.version if pool in self.late_heard else (self.late.started, 0))
        assert self.late.sessions == self.table.sessions
        assert self.late._by_request == self.table._by_request


TestTableAgainstDocuments = TableAgainstDocuments.TestCase
TestTableAgainstDocuments.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
