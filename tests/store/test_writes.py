"""Every guarded write of the core, its guard matching and not, on both stores."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from drsm_agent.core import writes
from drsm_agent.core.documents import (
    DEAD,
    LIVE,
    OPENED,
    Chunk,
    Document,
    GoState,
    Keepalive,
    read_chunk,
    read_keepalive,
    read_session,
)
from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.core.writes import (
    LEADER,
    POSITION,
    Delete,
    Insert,
    LeaderRecord,
    Outcome,
    Update,
    Write,
    read_leader,
)
from tests.store.tools import (
    GRANT,
    INCARNATION,
    OTHER,
    POD,
    POOLS,
    TERM,
    AnyStore,
    chunk,
    foreign,
    found,
    go_chunk,
    only,
    put,
    session,
    setting,
    stamped,
)

POOL = POOLS[0]
KEY = f"{POD.name}:{INCARNATION}"
SOON = datetime(2030, 1, 1, tzinfo=UTC)


# --- Sessions -----------------------------------------------------------------------------------


async def test_a_session_is_read_back_as_it_was_opened(store: AnyStore) -> None:
    """Numbers above 2^31 included."""
    assert await only(store, writes.open_session(session())) == 1
    document = await found(store, SESSIONS, KEY)
    assert document
    assert read_session(document) == session()
    assert type(document["incarnation"]) is int


async def test_an_incarnation_is_opened_only_once(store: AnyStore) -> None:
    """`_id` decides, and the first document stays."""
    await store.write([writes.open_session(session())])
    outcome = await store.write([writes.open_session(session(state=LIVE))])
    assert outcome == Outcome(changed=0, refused=frozenset({0}))
    document = await found(store, SESSIONS, KEY)
    assert document
    assert document["state"] == OPENED


@pytest.mark.parametrize(
    ("state", "term", "changed"),
    [(OPENED, TERM, 1), (OPENED, TERM - 1, 1), (OPENED, TERM + 1, 0), (LIVE, TERM, 0), (DEAD, TERM, 0)],
)
async def test_only_an_opened_session_of_no_newer_term_is_activated(
    store: AnyStore, state: str, term: int, changed: int
) -> None:
    """From then on it lives and carries the leader's term."""
    await store.write([writes.open_session(session(state, term))])
    assert await only(store, writes.activate(POD.name, INCARNATION, TERM)) == changed
    document = await found(store, SESSIONS, KEY)
    assert document
    assert (document["state"], document["term"]) == ((LIVE, TERM) if changed else (state, term))


async def test_another_incarnation_is_not_activated(store: AnyStore) -> None:
    """The key carries the incarnation."""
    await store.write([writes.open_session(session())])
    assert await only(store, writes.activate(POD.name, INCARNATION + 1, TERM)) == 0


async def test_joining_twice_is_joining_once(store: AnyStore) -> None:
    """A repeat changes nothing, and a pool is never listed twice."""
    await store.write([writes.open_session(session(LIVE))])
    assert await only(store, writes.join(POD.name, INCARNATION, ("amfid",), TERM)) == 1
    assert await only(store, writes.join(POD.name, INCARNATION, ("amfid",), TERM)) == 0
    assert await only(store, writes.join(POD.name, INCARNATION, ("smfid", "amfid", "smfid"), TERM)) == 1
    document = await found(store, SESSIONS, KEY)
    assert document
    assert document["pools"] == ["amfid", "smfid"]


async def test_a_dead_session_joins_nothing(store: AnyStore) -> None:
    """Death is terminal."""
    await store.write([writes.open_session(session(DEAD))])
    assert await only(store, writes.join(POD.name, INCARNATION, ("amfid",), TERM)) == 0


async def test_a_promise_only_grows(store: AnyStore) -> None:
    """What was promised once must be waited for."""
    await store.write([writes.open_session(session())])
    assert await only(store, writes.promise(POD.name, INCARNATION, 600_000, TERM)) == 1
    assert await only(store, writes.promise(POD.name, INCARNATION, 600_000, TERM)) == 0
    assert await only(store, writes.promise(POD.name, INCARNATION, 300_000, TERM)) == 0
    document = await found(store, SESSIONS, KEY)
    assert document
    assert document["promised_ms"] == 600_000


@pytest.mark.parametrize("state", [OPENED, LIVE])
async def test_a_session_ends_once_and_keeps_its_reason(store: AnyStore, state: str) -> None:
    """Whoever decides second finds no match."""
    await store.write([writes.open_session(session(state))])
    assert await only(store, writes.end_session(POD.name, INCARNATION, "expired", TERM)) == 1
    assert await only(store, writes.end_session(POD.name, INCARNATION, "closed", TERM)) == 0
    assert await only(store, writes.activate(POD.name, INCARNATION, TERM)) == 0
    document = await found(store, SESSIONS, KEY)
    assert document
    assert (document["state"], document["reason"]) == (DEAD, "expired")


async def test_a_leader_of_an_older_term_ends_no_stamped_session(store: AnyStore) -> None:
    """The new leader's stamp stops whatever the old one still has under way."""
    living, dead = session(LIVE, TERM - 1), session(DEAD, TERM - 1, OTHER)
    await store.write([writes.open_session(living), writes.open_session(dead)])
    assert await only(store, writes.stamp_sessions(TERM)) == 1
    assert await only(store, writes.stamp_sessions(TERM)) == 0
    assert await only(store, writes.stamp_sessions(TERM - 1)) == 0
    assert await only(store, writes.end_session(POD.name, INCARNATION, "expired", TERM - 1)) == 0
    assert await only(store, writes.end_session(POD.name, INCARNATION, "expired", TERM)) == 1


async def test_a_stamp_reaches_all_sessions_that_are_not_dead(store: AnyStore) -> None:
    """One write for all of them, and each counts."""
    owners = [replace(POD, incarnation=INCARNATION + i) for i in range(5)]
    states = [OPENED, LIVE, LIVE, DEAD, OPENED]
    opened = [session(state, 1, owner) for state, owner in zip(states, owners, strict=True)]
    await store.write([writes.open_session(one) for one in opened])
    assert await only(store, writes.stamp_sessions(TERM)) == 4
    terms = {document["term"] for document in await store.read(SESSIONS) if document["state"] != DEAD}
    assert terms == {TERM}


async def test_only_a_dead_session_is_purged(store: AnyStore) -> None:
    """A living one must not vanish."""
    await store.write([writes.open_session(session(LIVE))])
    assert await only(store, writes.purge_session(POD.name, INCARNATION, TERM)) == 0
    await store.write([writes.end_session(POD.name, INCARNATION, "closed", TERM)])
    assert await only(store, writes.purge_session(POD.name, INCARNATION, TERM)) == 1
    assert await store.read(SESSIONS) == []


# --- Chunks -------------------------------------------------------------------------------------


async def test_two_that_pick_the_same_numbers_share_them_without_a_double(store: AnyStore) -> None:
    """Each number goes to one of them, and the other is told by index."""
    mine = [writes.allocate(POOL, n, POD, f"a{n}", "r1") for n in range(50)]
    theirs = [writes.allocate(POOL, n, OTHER, f"b{n}", "r2") for n in reversed(range(50))]
    first, second = await asyncio.gather(store.write(mine), store.write(theirs))
    assert first.changed + second.changed == 50
    assert (len(first.refused), len(second.refused)) == (50 - first.changed, 50 - second.changed)
    owners = {document["_id"]: document["podId"] for document in await store.read(POOL)}
    for number in range(50):
        winner = OTHER if number in first.refused else POD
        assert owners[f"chunkid-{number}"] == winner.name
        assert (number in first.refused) != (49 - number in second.refused)


async def test_an_allocated_chunk_is_read_back(store: AnyStore) -> None:
    """Also the highest number of the widest pool."""
    highest = 2**54 - 1
    await store.write([writes.allocate(POOL, highest, POD, GRANT, "request-1")])
    document = await found(store, POOL, f"chunkid-{highest}")
    assert document
    read = read_chunk(document)
    assert read
    assert (read.n, read.owner, read.grant, read.marked) == (highest, POD, GRANT, False)


async def test_an_orphan_is_claimed_once(store: AnyStore) -> None:
    """The second claimer saw an owner that is not there any more."""
    await put(store, POOL, chunk().document)
    assert await only(store, writes.claim(POOL, chunk(), OTHER, "new-grant", 5000)) == 1
    assert await only(store, writes.claim(POOL, chunk(), OTHER, "newer-grant", 5000)) == 0
    claimed = await _chunk(store)
    assert (claimed.owner, claimed.grant, claimed.marked, claimed.hold_ms) == (OTHER, "new-grant", True, 5000)


@pytest.mark.parametrize(
    "seen",
    [
        foreign(chunk(), grant="another"),
        foreign(chunk(), incarnation=INCARNATION - 1),
        replace(chunk(), pod="amf-9"),
        replace(chunk(), ip="10.9.9.9"),
        replace(chunk(), drsm=None),
        replace(chunk(), n=4),
    ],
    ids=["grant", "incarnation", "pod", "ip", "no drsm", "number"],
)
async def test_a_chunk_is_claimed_only_from_the_owner_that_was_seen(store: AnyStore, seen: Chunk) -> None:
    """One differing field of the guard is enough."""
    await put(store, POOL, chunk().document)
    assert await only(store, writes.claim(POOL, seen, OTHER, "new-grant", 5000)) == 0
    assert await _chunk(store) == chunk()


async def test_a_go_pods_chunk_is_claimed_while_it_has_no_drsm(store: AnyStore) -> None:
    """An agent that claimed it first is found by the `drsm` it left."""
    await put(store, POOL, go_chunk().document)
    assert await only(store, writes.claim(POOL, go_chunk(), OTHER, "new-grant", 5000)) == 1
    assert await only(store, writes.claim(POOL, go_chunk(), POD, "newer-grant", 5000)) == 0
    assert (await _chunk(store)).owner == OTHER


async def test_a_chunk_that_a_go_pod_claimed_is_claimed_by_the_drsm_it_left(store: AnyStore) -> None:
    """The stale `drsm` is part of what was seen."""
    stale = replace(chunk(), pod="go-1", ip="10.0.9.9", instance="")
    await put(store, POOL, chunk().document)
    await store.write([setting(POOL, "chunkid-3", podId="go-1", podIp="10.0.9.9", podInstance="")])
    assert await only(store, writes.claim(POOL, chunk(), OTHER, "new-grant", 5000)) == 0
    assert await only(store, writes.claim(POOL, stale, OTHER, "new-grant", 5000)) == 1


async def test_a_marked_chunk_is_not_given_back(store: AnyStore) -> None:
    """Nobody knows yet what was issued from it."""
    await put(store, POOL, chunk(marked=True).document)
    assert await only(store, writes.release(POOL, chunk(marked=True))) == 0
    assert await only(store, writes.clear_mark(POOL, chunk(marked=True))) == 1
    assert await only(store, writes.release(POOL, chunk())) == 1
    assert await store.read(POOL) == []


async def test_a_chunk_is_given_back_only_under_its_grant(store: AnyStore) -> None:
    """A late repeat must not free what was granted anew."""
    await put(store, POOL, chunk().document)
    assert await only(store, writes.release(POOL, foreign(chunk(), grant="another"))) == 0
    assert await only(store, writes.release(POOL, chunk())) == 1


async def test_a_mark_is_cleared_once_and_takes_the_hold_with_it(store: AnyStore) -> None:
    """A finished scan makes earlier holds void."""
    held = foreign(chunk(marked=True), hold_ms=310_000)
    await put(store, POOL, held.document)
    assert await only(store, writes.clear_mark(POOL, foreign(held, grant="another"))) == 0
    assert await only(store, writes.clear_mark(POOL, held)) == 1
    assert await only(store, writes.clear_mark(POOL, held)) == 0
    assert await _chunk(store) == chunk()


# --- Keepalive mirrors ----------------------------------------------------------------------------


LATER = SOON + timedelta(seconds=1)


async def _keepalive(store: AnyStore) -> Keepalive:
    document = await found(store, POOL, POD.name)
    assert document
    keepalive = read_keepalive(document)
    assert keepalive
    return keepalive


async def test_a_mirror_is_inserted_prolonged_and_deleted(store: AnyStore) -> None:
    """As Go pods see a session's life; each write matches only what was seen before it."""
    assert await only(store, writes.mirror_keepalive(POOL, POD, SOON)) == 1
    first = await _keepalive(store)
    assert (first.mirrored, first.expire_at) == (POD, SOON)
    assert await only(store, writes.prolong_keepalive(POOL, first, LATER)) == 1
    assert await only(store, writes.prolong_keepalive(POOL, first, LATER)) == 0
    assert (await _keepalive(store)).expire_at == LATER
    assert await only(store, writes.delete_keepalive(POOL, first)) == 0
    assert await only(store, writes.delete_keepalive(POOL, await _keepalive(store))) == 1


async def test_a_renewal_does_not_bring_a_mirror_back(store: AnyStore) -> None:
    """Updated, never upserted."""
    await store.write([writes.mirror_keepalive(POOL, POD, SOON)])
    seen = await _keepalive(store)
    await store.write([writes.delete_keepalive(POOL, seen)])
    assert await only(store, writes.prolong_keepalive(POOL, seen, LATER)) == 0
    assert await store.read(POOL) == []


async def test_the_mirror_of_another_incarnation_is_left_alone(store: AnyStore) -> None:
    """A pod that restarted under its name has taken its mirror over."""
    former = replace(POD, incarnation=INCARNATION - 1)
    await store.write([writes.mirror_keepalive(POOL, former, SOON)])
    seen = await _keepalive(store)
    assert await only(store, writes.take_over_keepalive(POOL, seen, POD, SOON)) == 1
    assert await only(store, writes.delete_keepalive(POOL, seen)) == 0
    assert await only(store, writes.prolong_keepalive(POOL, seen, LATER)) == 0
    assert (await _keepalive(store)).mirrored == POD


async def test_a_go_pods_keepalive_is_taken_over_and_its_own_again_once_it_renews(store: AnyStore) -> None:
    """As it was seen, on a real database too: a renewal of the original's wins, with or without `drsm`."""
    go = {"type": "keepalive", "podId": POD.name, "podIp": POD.ip, "podInstance": POD.instance}
    await put(store, POOL, {"_id": POD.name} | go | {"expireAt": SOON})
    seen, owner = await _keepalive(store), replace(POD, incarnation=0)
    assert await only(store, writes.take_over_keepalive(POOL, seen, POD, LATER)) == 1
    taken = await _keepalive(store)
    assert (taken.mirrored, taken.expire_at, taken.go) == (POD, LATER, GoState(owner, down=False))
    renewed = LATER + timedelta(seconds=1)
    await store.write([setting(POOL, POD.name, expireAt=renewed, podInstance=POD.instance)])
    assert await only(store, writes.prolong_keepalive(POOL, taken, LATER)) == 0
    assert await only(store, writes.note_silence(POOL, taken, owner)) == 0
    assert await only(store, writes.delete_keepalive(POOL, taken)) == 0
    seen = await _keepalive(store)
    assert seen.mirrored is None
    assert await only(store, writes.note_silence(POOL, seen, owner)) == 1
    assert (await _keepalive(store)).go_down
    assert await only(store, writes.take_over_keepalive(POOL, await _keepalive(store), POD, LATER)) == 1
    taken = await _keepalive(store)
    assert (taken.mirrored, taken.go) == (POD, GoState(owner, down=True))


async def test_a_chunk_without_all_of_gos_fields_is_claimed_as_it_was_seen(store: AnyStore) -> None:
    """The guard takes a missing field as missing, and a chunk that has got it is another."""
    bare = replace(go_chunk(), ip=None, instance=None)
    await put(store, POOL, bare.document)
    assert await only(store, writes.claim(POOL, go_chunk(), OTHER, "new-grant", 5000)) == 0
    assert await only(store, writes.claim(POOL, bare, OTHER, "new-grant", 5000)) == 1
    chunk = await _chunk(store)
    assert chunk
    assert (chunk.owner, chunk.go_owners) == (OTHER, (bare.pod,))


# --- The lead, the position, the stamp ------------------------------------------------------------


async def test_the_lead_is_taken_by_one_of_two(store: AnyStore) -> None:
    """Both saw the same record; only one finds it unchanged."""
    old = LeaderRecord(holder="a", term=1, counter=5, ttl_ms=3000)
    assert await only(store, writes.first_lead(old)) == 1
    assert (await store.write([writes.first_lead(old)])).refused == {0}
    rivals = [replace(old, holder=name, term=2, counter=0) for name in ("b", "c")]
    taken = [await only(store, writes.take_lead(old, rival)) for rival in rivals]
    assert taken == [1, 0]
    assert read_leader(await store.read(LEADER)) == rivals[0]


async def test_a_renewed_lead_is_not_taken(store: AnyStore) -> None:
    """The counter tells that the holder was there."""
    record = LeaderRecord(holder="a", term=1, counter=5, ttl_ms=3000)
    await store.write([writes.first_lead(record)])
    assert await only(store, writes.renew_lead(record)) == 1
    assert await only(store, writes.take_lead(record, replace(record, holder="b", term=2))) == 0
    document = await found(store, LEADER, "leader")
    assert document
    assert (document["holder"], document["counter"]) == ("a", 6)


async def test_a_leader_that_was_replaced_neither_renews_nor_gives_up(store: AnyStore) -> None:
    """The record is the new leader's."""
    old = LeaderRecord(holder="a", term=1, counter=5, ttl_ms=3000)
    new = replace(old, holder="b", term=2)
    await store.write([writes.first_lead(new)])
    assert await only(store, writes.renew_lead(old)) == 0
    assert await only(store, writes.give_up_lead(old)) == 0
    assert await only(store, writes.give_up_lead(new)) == 1


async def test_a_position_is_saved_by_no_older_term(store: AnyStore) -> None:
    """A paused old leader must not move the new one's position back."""
    await put(store, POSITION, {"_id": "position", "term": 0})
    assert await only(store, writes.save_position(TERM, {"token": "b"})) == 1
    assert await only(store, writes.save_position(TERM - 1, {"token": "a"})) == 0
    assert await only(store, writes.save_position(TERM, {"token": "b"})) == 1, "a repeat still matches"
    saved = await found(store, POSITION, "position")
    assert saved == {"_id": "position", "term": TERM, "token": "b", "saves": 2}


async def test_the_stamp_counts_every_touch_of_no_older_term(store: AnyStore) -> None:
    """So that each comes back in the change stream."""
    await put(store, STAMPS, {"_id": "stamp", "term": 0, "n": 0})
    touched = [await only(store, writes.touch_stamp(term, "agent")) for term in (TERM, TERM, TERM - 1)]
    assert touched == [1, 1, 0]
    assert await found(store, STAMPS, "stamp") == stamped(2)


# --- Bulks ----------------------------------------------------------------------------------------


async def test_a_bulk_goes_on_after_a_refused_insert(store: AnyStore) -> None:
    """Unordered; the index is the one in the given list."""
    await put(store, POOL, chunk(1).document, chunk(2).document)
    bulk: list[Write] = [
        writes.clear_mark(POOL, chunk(1)),  # no match
        Insert(POOL, chunk(2).document),  # taken
        setting(POOL, "chunkid-1", podIp="10.1.1.1"),
        Insert(POOL, chunk(5).document),
        Delete(POOL, {"_id": "chunkid-2"}),
        Insert(POOL, chunk(1).document),  # taken
    ]
    assert await store.write(bulk) == Outcome(changed=3, refused=frozenset({1, 5}))
    assert {document["_id"] for document in await store.read(POOL)} == {"chunkid-1", "chunkid-5"}


async def test_an_update_that_changes_nothing_does_not_count(store: AnyStore) -> None:
    """Matched is not changed."""
    await put(store, POOL, chunk().document)
    assert await only(store, setting(POOL, "chunkid-3", podId=POD.name, podIp=POD.ip)) == 0


async def test_an_absent_field_equals_null_and_is_below_nothing(store: AnyStore) -> None:
    """The corners of the guards' language."""
    await put(store, POOL, {"_id": "a", "n": None}, {"_id": "b"}, {"_id": "c", "n": 1, "d": {"e": 2}})
    counts = {}
    for name, condition in _CORNERS.items():
        where: Document = dict(condition)
        counts[name] = await only(store, Update(POOL, where, inc={f"seen_{name}": 1}, many=True))
    assert counts == {"null": 2, "below": 1, "at_most": 0, "among": 1, "deep": 1, "too_deep": 3}


_CORNERS: dict[str, Document] = {
    "null": {"n": None},
    "below": {"n": {"$lt": 2}},
    "at_most": {"n": {"$lte": 0}},
    "among": {"n": {"$in": [1, 5]}},
    "deep": {"d.e": 2},
    "too_deep": {"d.e.f": None},
}


async def test_nothing_to_write_is_no_write(store: AnyStore) -> None:
    """An empty list is fine."""
    assert await store.write([]) == Outcome(changed=0)


@pytest.mark.parametrize("spaces", [POOLS, ("nothing",)])
async def test_writes_of_several_or_unknown_spaces_are_a_mistake(
    store: AnyStore, spaces: tuple[str, ...]
) -> None:
    """Unlike an outage, nothing will mend it."""
    with pytest.raises(ValueError, match="space"):
        await store.write([Insert(space, {"_id": "x"}) for space in spaces])


async def test_what_was_handed_over_is_not_what_is_kept(store: AnyStore) -> None:
    """Changing a document afterwards changes nothing in the store."""
    document = chunk().document
    await put(store, POOL, document)
    document["podId"] = "changed"
    (await store.read(POOL))[0]["podId"] = "changed"
    assert await _chunk(store) == chunk()


async def _chunk(store: AnyStore) -> Chunk:
    document = await found(store, POOL, "chunkid-3")
    assert document
    read = read_chunk(document)
    assert read
    return read
