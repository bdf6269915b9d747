"""Every guarded write names what the rules R5 and R8 require: tried on documents, not only read."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from drsm_agent.core import writes as w
from drsm_agent.core.documents import (
    GO_OWNERS_MAX,
    Chunk,
    Drsm,
    GoState,
    Keepalive,
    Owner,
    Session,
    merge,
    read_chunk,
    read_keepalive,
)

ME = Owner("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5)
OTHER = Owner("amf-2", "10.0.0.8", "nf-2", 7 << 32 | 6)
GO_POD = Owner("amf-go", "10.0.0.9", "", 0)
MINE = Chunk(3, "amf-1", "10.0.0.7", "nf-1", Drsm("amf-1", "10.0.0.7", "nf-1", ME.incarnation, "g1" * 8))
MARKED = Chunk(
    3, "amf-1", "10.0.0.7", "nf-1", Drsm("amf-1", "10.0.0.7", "nf-1", ME.incarnation, "g1" * 8, True, 310_000)
)
GO_CHUNK = Chunk(3, "amf-go", "10.0.0.9", "")
STALE = Chunk(3, "amf-go", "10.0.0.9", "", MINE.drsm)
SESSION = Session("amf-1", "10.0.0.7", "nf-1", ME.incarnation, 7, "live", ("amfid",), "r-1", 300_000)
TERM = 7


def matches(where: dict[str, Any], document: dict[str, Any]) -> bool:
    """MongoDB's filter, as far as guards use it: equality, `$lt`, `$lte`, `$in`, dotted paths."""

    def one(path: str, wanted: Any) -> bool:
        found: Any = document
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(wanted, dict) and any(key.startswith("$") for key in wanted):
            assert set(wanted) <= {"$lt", "$lte", "$in"}
            return (
                ("$lt" not in wanted or (found is not None and found < wanted["$lt"]))
                and ("$lte" not in wanted or (found is not None and found <= wanted["$lte"]))
                and ("$in" not in wanted or found in wanted["$in"])
            )
        return bool(found == wanted)

    return all(one(path, wanted) for path, wanted in where.items())


def _updated(chunk: Chunk, **drsm: Any) -> Chunk:
    assert chunk.drsm is not None
    return replace(chunk, drsm=replace(chunk.drsm, **drsm))


# --- Chunks ---------------------------------------------------------------------------------------


def test_an_allocation_is_an_insert_of_the_whole_document() -> None:
    """`_id` decides between two who picked the same number; Go pods see a chunk as they write it."""
    write = w.allocate("amfid", 3, ME, "g1" * 8, "r-1")
    assert (write.space, write.key) == ("amfid", "chunkid-3")
    assert write.document == {
        "_id": "chunkid-3",
        "type": "chunk",
        "chunkId": "chunkid-3",
        "podId": "amf-1",
        "podInstance": "nf-1",
        "podIp": "10.0.0.7",
        "drsm": {
            "pod": "amf-1",
            "ip": "10.0.0.7",
            "instance": "nf-1",
            "incarnation": ME.incarnation,
            "grant": "g1" * 8,
            "marked": False,
            "hold_ms": 0,
            "request_id": "r-1",
        },
    }


CHUNK_WRITES = [w.claim("amfid", MINE, OTHER, "g2" * 8, 310_000), w.release("amfid", MINE)]


@pytest.mark.parametrize("write", [*CHUNK_WRITES, w.clear_mark("amfid", MARKED)])
def test_a_chunk_is_written_only_as_it_was_seen(write: w.Update | w.Delete) -> None:
    """Another number, pod, address, instance, incarnation or grant: somebody decided otherwise first."""
    seen = MARKED if isinstance(write, w.Update) and "drsm.marked" in write.where else MINE
    assert (write.space, write.key) == ("amfid", "chunkid-3")
    assert matches(write.where, seen.document) is True
    others = [
        replace(seen, n=4),
        replace(seen, pod="amf-go"),
        replace(seen, ip="10.0.0.9"),
        replace(seen, instance="nf-9"),
        replace(seen, drsm=None),
        _updated(seen, incarnation=ME.incarnation + 1),
        _updated(seen, grant="g3" * 8),
    ]
    assert [matches(write.where, other.document) for other in others] == [False] * len(others)


def test_a_claim_sets_the_new_owner_a_new_grant_the_mark_and_the_hold() -> None:
    """What results is the new owner's, for Go pods too; nothing of the request that got it remains."""
    seen = _updated(MINE, request_id="r-1")
    write = w.claim("amfid", seen, OTHER, "g2" * 8, 310_000)
    after = read_chunk(merge(seen.document, write.set))
    assert after == Chunk(
        3,
        "amf-2",
        "10.0.0.8",
        "nf-2",
        Drsm("amf-2", "10.0.0.8", "nf-2", OTHER.incarnation, "g2" * 8, True, 310_000),
    )
    assert after.owner == OTHER


@pytest.mark.parametrize(("seen", "other"), [(GO_CHUNK, STALE), (STALE, GO_CHUNK)])
def test_a_go_pods_chunk_is_claimed_only_as_it_was_seen(seen: Chunk, other: Chunk) -> None:
    """With the `drsm` that it left, or without one; another Go pod's claim in between makes it miss."""
    write = w.claim("amfid", seen, OTHER, "g2" * 8, 310_000)
    assert matches(write.where, seen.document) is True
    others = [
        other,
        replace(seen, pod="amf-go-2"),
        replace(seen, ip="10.0.0.10"),
        replace(seen, instance="x"),
        MINE,
    ]
    assert [matches(write.where, chunk.document) for chunk in others] == [False] * 5


def claimed(seen: Chunk, owner: Owner = OTHER) -> Chunk:
    """The chunk after a claim."""
    chunk = read_chunk(merge(seen.document, w.claim("amfid", seen, owner, "g2" * 8, 310_000).set))
    assert chunk is not None
    return chunk


def test_a_chunk_remembers_the_go_pods_that_it_came_from_through_all_claims() -> None:
    """Each of them may have stood still, and go on; and an SDK pod's claim has none to remember."""
    assert claimed(MINE).go_owners == ()
    assert claimed(GO_CHUNK).go_owners == ("amf-go",)
    again = claimed(claimed(GO_CHUNK), ME)
    assert (again.owner, again.go_owners) == (ME, ("amf-go",))
    by_another_go_pod = replace(again, pod="amf-go-2", ip="10.0.0.10", instance="")
    assert claimed(by_another_go_pod).go_owners == ("amf-go", "amf-go-2")
    chunk = GO_CHUNK
    for i in range(GO_OWNERS_MAX + 2):
        chunk = claimed(replace(chunk, pod=f"go-{i}", ip="10.0.0.9", instance="x"))
    assert chunk.go_owners == tuple(f"go-{i}" for i in range(2, GO_OWNERS_MAX + 2))


def test_a_go_pods_chunk_that_another_one_claimed_came_from_both() -> None:
    """The claim itself leaves `drsm` as it was; what is written beside it makes nobody its owner."""
    for seen in (STALE, GO_CHUNK):
        write = w.remember_go("amfid", seen, "amf-go-1")
        assert matches(write.where, seen.document)
        assert not matches(write.where, replace(seen, pod="amf-go-3").document)
        after = read_chunk(merge(seen.document, write.set))
        assert after is not None
        assert (after.owner, after.valid, after.go_owners) == (seen.owner, None, ("amf-go-1",))
        assert claimed(after).go_owners == ("amf-go-1", "amf-go")


def test_a_chunk_goes_back_to_a_go_pod_only_marked_and_as_it_was_seen() -> None:
    """As if the Go pod had claimed it: `drsm` is nobody's then, and still says whom it came from. Also where
    it has name, address and instance of the pod that had it meanwhile."""
    seen = claimed(GO_CHUNK)
    for go in (GO_POD, replace(OTHER, incarnation=0)):
        write = w.give_back_to_go("amfid", seen, go)
        assert matches(write.where, seen.document)
        assert not matches(write.where, _updated(seen, marked=False).document)
        assert not matches(write.where, _updated(seen, grant="g3" * 8).document)
        after = read_chunk(merge(seen.document, write.set))
        assert after is not None
        assert (after.owner, after.valid, after.go_owners) == (go, None, ("amf-go",))


def test_a_dead_pods_chunk_is_left_to_the_go_pod_of_its_name() -> None:
    """As it was seen; whatever its mark."""
    for seen in (MINE, MARKED):
        write = w.leave_to_go("amfid", seen, replace(ME, incarnation=0))
        assert matches(write.where, seen.document)
        assert not matches(write.where, _updated(seen, grant="g3" * 8).document)
        after = read_chunk(merge(seen.document, write.set))
        assert after is not None
        assert (after.owner, after.valid) == (replace(ME, incarnation=0), None)


def test_a_chunk_without_all_fields_is_claimed_only_without_them() -> None:
    """The guard takes what is missing as missing."""
    seen = replace(GO_CHUNK, ip=None, instance=None)
    write = w.claim("amfid", seen, OTHER, "g2" * 8, 1)
    assert matches(write.where, seen.document)
    assert not matches(write.where, GO_CHUNK.document)


def test_a_claim_that_came_second_misses() -> None:
    """Two agents that claim the same orphan: the first one's grant is in the way of the second."""
    first = w.claim("amfid", MINE, OTHER, "g2" * 8, 310_000)
    second = w.claim("amfid", MINE, ME, "g3" * 8, 310_000)
    assert matches(second.where, merge(MINE.document, first.set)) is False


def test_a_marked_chunk_cannot_be_released() -> None:
    """Whatever the table believed when the release was decided; and a Go pod's never."""
    assert matches(w.release("amfid", MINE).where, MARKED.document) is False
    assert matches(w.release("amfid", MARKED).where, MARKED.document) is False
    assert matches(w.release("amfid", GO_CHUNK).where, GO_CHUNK.document) is False


def test_a_mark_is_cleared_with_its_hold() -> None:
    """Holds of former owners do not count any more; all else stays."""
    write = w.clear_mark("amfid", MARKED)
    assert read_chunk(merge(MARKED.document, write.set)) == _updated(MARKED, marked=False, hold_ms=0)
    assert matches(write.where, MINE.document) is False


# --- Sessions -------------------------------------------------------------------------------------


def test_a_session_is_opened_by_an_insert() -> None:
    """Never over another's document."""
    write = w.open_session(SESSION)
    assert (write.space, write.key, write.document) == (
        "drsm_sessions",
        f"amf-1:{ME.incarnation}",
        SESSION.document,
    )


@pytest.mark.parametrize(
    ("write", "state"),
    [
        (w.activate("amf-1", ME.incarnation, TERM), "opened"),
        (w.join("amf-1", ME.incarnation, ("tmsi",), TERM), "live"),
        (w.promise("amf-1", ME.incarnation, 400_000, TERM), "live"),
        (w.end_session("amf-1", ME.incarnation, "expired", TERM), "live"),
        (w.purge_session("amf-1", ME.incarnation, TERM), "dead"),
    ],
)
def test_a_session_is_written_by_incarnation_and_term(write: w.Update | w.Delete, state: str) -> None:
    """A term above the writer's is a newer leader's stamp: nothing of an older one matches any more."""
    document = replace(SESSION, state=state).document
    assert (write.space, write.key) == ("drsm_sessions", f"amf-1:{ME.incarnation}")
    assert [matches(write.where, document | {"term": term}) for term in (6, 7, 8)] == [True, True, False]
    assert matches(write.where, document | {"_id": f"amf-1:{ME.incarnation + 1}"}) is False


@pytest.mark.parametrize(
    ("write", "opened", "live", "dead"),
    [
        (w.activate("amf-1", ME.incarnation, TERM), True, False, False),
        (w.join("amf-1", ME.incarnation, ("tmsi",), TERM), True, True, False),
        (w.end_session("amf-1", ME.incarnation, "closed", TERM), True, True, False),
        (w.purge_session("amf-1", ME.incarnation, TERM), False, False, True),
        (w.stamp_sessions(8), True, True, False),
    ],
)
def test_a_life_goes_one_way(write: w.Update | w.Delete, opened: bool, live: bool, dead: bool) -> None:
    """opened, live, dead: no write leads back, death is written once, and only the dead are purged."""
    documents = [replace(SESSION, state=state).document for state in ("opened", "live", "dead")]
    assert [matches(write.where, document) for document in documents] == [opened, live, dead]


def test_what_session_writes_set() -> None:
    """State, reason, term, pools and promise, and nothing else."""
    assert w.activate("a", 5, TERM).set == {"state": "live", "term": 7}
    assert w.end_session("a", 5, "superseded", TERM).set == {
        "state": "dead",
        "reason": "superseded",
        "term": 7,
    }
    join = w.join("a", 5, ("x", "y"), TERM)
    assert (join.set, join.add_to_set) == ({"term": 7}, {"pools": {"$each": ["x", "y"]}})
    assert w.promise("a", 5, 400_000, TERM).set == {"promised_ms": 400_000}


@pytest.mark.parametrize(("promised", "written"), [(299_999, False), (300_000, False), (300_001, True)])
def test_a_promise_only_grows(promised: int, written: bool) -> None:
    """The document keeps the largest lease ever promised to the session."""
    assert matches(w.promise("amf-1", ME.incarnation, promised, TERM).where, SESSION.document) is written


def test_a_new_leader_stamps_every_life_once() -> None:
    """All sessions with a lower term, and none with its own or a higher one."""
    write = w.stamp_sessions(8)
    assert (write.space, write.set, write.many) == ("drsm_sessions", {"term": 8}, True)
    assert [matches(write.where, SESSION.document | {"term": term}) for term in (1, 7, 8, 9)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "write",
    [
        w.activate("amf-1", ME.incarnation, 6),
        w.end_session("amf-1", ME.incarnation, "expired", 6),
        w.join("amf-1", ME.incarnation, (), 6),
        w.promise("amf-1", ME.incarnation, 2**40, 6),
    ],
)
def test_an_older_leader_finds_nothing_after_the_stamp(write: w.Update) -> None:
    """Whatever it still has under way."""
    opened = replace(SESSION, state="opened", term=6)
    for before in (opened, replace(opened, state="live")):
        assert matches(write.where, merge(before.document, w.stamp_sessions(7).set)) is False


# --- Keepalives -----------------------------------------------------------------------------------


def read(document: Mapping[str, Any]) -> Keepalive:
    """A keepalive that can be read."""
    keepalive = read_keepalive(document)
    assert keepalive is not None
    return keepalive


MIRROR = w.mirror_keepalive("amfid", ME, 12345).document
GO = {"_id": "amf-1", "type": "keepalive", "podId": "amf-1", "podIp": "10.0.0.7", "podInstance": "nf-1"}
GO_KEEPALIVE: dict[str, Any] = GO | {"expireAt": 20}


def test_a_mirror_shows_a_session_to_go_pods() -> None:
    """Go DRSM's fields, with an instance that no Go pod has and no `DeletePod` names; the real one beside
    it."""
    assert {
        "_id": "amf-1",
        "type": "keepalive",
        "podId": "amf-1",
        "podIp": "10.0.0.7",
        "podInstance": f"drsm:amf-1:{ME.incarnation}",
        "expireAt": 12345,
        "drsm": {
            "pod": "amf-1",
            "ip": "10.0.0.7",
            "instance": "nf-1",
            "incarnation": ME.incarnation,
            "end": 12345,
        },
    } == MIRROR
    assert read(MIRROR).mirrored == ME


NEWER = replace(ME, incarnation=ME.incarnation + 1)
OF_A_MIRROR: list[w.Update | w.Delete] = [
    w.prolong_keepalive("amfid", read(MIRROR), 99),
    w.take_over_keepalive("amfid", read(MIRROR), NEWER, 99),
    w.note_silence("amfid", read(MIRROR), GO_POD),
    w.delete_keepalive("amfid", read(MIRROR)),
]


@pytest.mark.parametrize("write", OF_A_MIRROR)
def test_a_mirror_is_touched_only_as_it_was_seen(write: w.Update | w.Delete) -> None:
    """Not a later incarnation's, nor what a Go pod of the same name, address and instance made of it: its
    keepalive is its life. Nor one that was prolonged since: a deposed leader has seen less."""
    assert (write.space, write.key) == ("amfid", "amf-1")
    assert matches(write.where, MIRROR) is True
    others = [
        MIRROR | {"_id": "amf-2"},
        MIRROR | {"type": "chunk"},
        MIRROR | {"podInstance": f"drsm:amf-1:{NEWER.incarnation}"},
        MIRROR | {"podInstance": "nf-1"},
        MIRROR | {"expireAt": 12346},
    ]
    assert [matches(write.where, other) for other in others] == [False] * 5


@pytest.mark.parametrize(
    "write",
    [
        w.note_silence("amfid", read(GO_KEEPALIVE), GO_POD),
        w.take_over_keepalive("amfid", read(GO_KEEPALIVE), ME, 99),
        w.delete_keepalive("amfid", read(GO_KEEPALIVE)),
    ],
)
def test_a_go_pods_keepalive_is_touched_only_as_it_was_seen(write: w.Update | w.Delete) -> None:
    """A renewal meanwhile wins."""
    assert matches(write.where, GO_KEEPALIVE) is True
    assert matches(write.where, GO_KEEPALIVE | {"expireAt": 21}) is False
    assert matches(write.where, GO_KEEPALIVE | {"podInstance": "nf-2"}) is False


def test_a_guard_takes_what_is_missing_as_missing() -> None:
    """The original wrote fewer fields once."""
    bare = {name: value for name, value in GO_KEEPALIVE.items() if name not in {"podInstance", "expireAt"}}
    write = w.delete_keepalive("amfid", read(bare))
    assert matches(write.where, bare) is True
    assert matches(write.where, GO_KEEPALIVE) is False


def test_a_mirror_beside_a_go_pod_is_the_go_pods_keepalive_again_once_it_renews() -> None:
    """Until then it says that the Go pod lives; no `DeletePod` of its instance finds it."""
    write = w.take_over_keepalive("amfid", read(GO_KEEPALIVE), ME, 99)
    assert write.set["podInstance"] == f"drsm:amf-1:{ME.incarnation}"
    taken = read(merge(GO_KEEPALIVE, write.set))
    assert (taken.mirrored, taken.expire_at, taken.go_down) == (ME, 99, False)
    assert taken.go_owner == replace(ME, incarnation=0)
    renewed = read(merge(taken.document | {"_id": "amf-1"}, GO | {"expireAt": 120}))
    assert (renewed.mirrored, renewed.go_owner) == (None, replace(ME, incarnation=0))


def test_a_silent_go_pods_keepalive_is_its_own_until_it_renews() -> None:
    """What says that it is down names the end that stood unchanged."""
    silent = merge(GO_KEEPALIVE, w.note_silence("amfid", read(GO_KEEPALIVE), GO_POD).set)
    assert read(silent).go_down
    assert not read(merge(silent, {"expireAt": 40})).go_down


def test_a_mirror_that_was_a_go_pods_keepalive_says_that_it_is_down() -> None:
    """Its chunks are about to be claimed; and nothing else says so any more. So does the mirror that a later
    incarnation makes of it."""
    silent = merge(GO_KEEPALIVE, w.note_silence("amfid", read(GO_KEEPALIVE), GO_POD).set)
    taken = read(merge(silent, w.take_over_keepalive("amfid", read(silent), ME, 99).set))
    told = GoState(replace(ME, incarnation=0), down=True)
    assert (taken.mirrored, taken.expire_at, taken.go_state) == (ME, 99, told)
    said = read(merge(taken.document, w.prolong_keepalive("amfid", taken, 199).set) | {"_id": "amf-1"})
    assert (said.expire_at, said.go_state) == (199, told)
    write = w.take_over_keepalive("amfid", said, NEWER, 299)
    newer = read(merge(said.document, write.set) | {"_id": "amf-1"})
    assert (newer.mirrored, newer.go_state) == (NEWER, told)
    write = w.forget_go("amfid", newer, NEWER)
    assert not read(merge(newer.document, write.set) | {"_id": "amf-1"}).go_down


# --- The lead, the position, the stamp ------------------------------------------------------------

RECORD = w.LeaderRecord("agent-1", 7, 3, 3000)


def test_the_leader_record_is_read_as_it_was_written() -> None:
    """There and back; no document is no record."""
    assert w.read_leader([RECORD.document]) == RECORD
    assert w.read_leader([]) is None
    assert w.first_lead(RECORD) == w.Insert("drsm_leader", {"_id": "leader"} | asdict(RECORD))


@pytest.mark.parametrize(
    "change", [{"holder": "agent-3"}, {"holder": ""}, {"term": 8}, {"counter": 4}, {"ttl_ms": 2999}]
)
def test_the_lead_is_taken_only_from_the_record_that_was_seen(change: dict[str, Any]) -> None:
    """One renewal, or one other who was faster, and the take-over misses."""
    write = w.take_lead(RECORD, w.LeaderRecord("agent-2", 8, 0, 5000))
    assert matches(write.where, RECORD.document) is True
    assert matches(write.where, RECORD.document | change) is False
    assert write.set == {"holder": "agent-2", "term": 8, "counter": 0, "ttl_ms": 5000}


@pytest.mark.parametrize("write", [w.renew_lead(RECORD), w.give_up_lead(RECORD)])
def test_the_lead_is_renewed_and_given_up_only_by_its_holder_in_its_term(write: w.Update) -> None:
    """Whatever the counter is: a renewal whose outcome stayed unknown may have raised it."""
    assert (write.space, write.key) == ("drsm_leader", "leader")
    assert matches(write.where, RECORD.document | {"counter": 99}) is True
    others: list[dict[str, Any]] = [{"holder": "agent-2"}, {"holder": ""}, {"term": 8}, {"term": 6}]
    assert [matches(write.where, RECORD.document | other) for other in others] == [False] * 4


def test_every_renewal_that_arrives_changes_the_record() -> None:
    """Also the second of two that were made from the same view, as after an answer that got lost: a
    standby must see that the holder lives, as the holder counts on it."""
    write = w.renew_lead(RECORD)
    assert (write.set, write.inc) == ({"ttl_ms": 3000}, {"counter": 1})


def test_a_lead_given_up_has_no_holder() -> None:
    """The term stays, so that the next is above it."""
    assert w.give_up_lead(RECORD).set == {"holder": "", "term": 7, "counter": 3, "ttl_ms": 3000}


@pytest.mark.parametrize(
    ("write", "space"),
    [(w.save_position(7, {"at": 5}), "drsm_position"), (w.touch_stamp(7, "agent-1"), "drsm_stamps")],
)
def test_position_and_stamp_are_not_written_by_an_older_term(write: w.Update, space: str) -> None:
    """A paused old leader must not move the position of the new one."""
    assert write.space == space
    assert [matches(write.where, {"_id": write.key, "term": term}) for term in (6, 7, 8)] == [
        True,
        True,
        False,
    ]
    assert write.set["term"] == 7


def test_a_stamp_always_changes_something() -> None:
    """Only what changes something comes back in the change stream."""
    assert w.touch_stamp(7, "agent-1").inc == {"n": 1}


def test_the_position_is_saved_whole() -> None:
    """With the term that saved it."""
    assert w.save_position(7, {"at": 5, "token": "t"}).set == {"term": 7, "at": 5, "token": "t"}
