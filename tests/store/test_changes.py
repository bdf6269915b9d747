"""Snapshot and change stream together, on both stores: nothing is missed, nothing comes twice."""

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner, merge, read_session
from drsm_agent.core.table import SESSIONS, STAMPS, Change, Hashes, Table
from drsm_agent.core.writes import LEADER, Delete, Insert, Write, touch_stamp
from drsm_agent.errors import PositionLost, StoreUnavailable
from drsm_agent.ports import Snapshot
from tests.store.tools import (
    INCARNATION,
    OTHER,
    PATIENCE_SECONDS,
    POD,
    POOLS,
    TERM,
    AnyStore,
    changes_of,
    chunk,
    first,
    put,
    session,
    setting,
    stamp,
    until_stamp,
)

POOL = POOLS[0]
HASHES = Hashes(ownership=lambda *key: hash(key) & 0xFFFF, holding=lambda *key: hash(key) & 0xFFFF)


# --- What a change says -----------------------------------------------------------------------------


async def test_an_insert_carries_the_whole_document(store: AnyStore) -> None:
    """And who, where and when."""
    (change,) = await changes_of(store, [Insert(POOL, chunk().document)])
    assert (change.space, change.key, change.document) == (POOL, "chunkid-3", chunk().document)
    assert change.at > (1 << 32)
    assert change.token


async def test_an_update_comes_as_what_really_changed(store: AnyStore) -> None:
    """Fields that were set to what they were are left out; dotted paths stay dotted."""
    held = chunk(marked=True)
    same = setting(POOL, "chunkid-3", podId=POD.name, podIp="10.1.1.1")
    _, cleared, moved = await changes_of(
        store, [Insert(POOL, held.document), writes.clear_mark(POOL, held), same]
    )
    assert cleared.updated == {"drsm.marked": False}
    assert moved.updated == {"podIp": "10.1.1.1"}
    assert (moved.document, moved.removed, moved.gone) == (None, (), False)


async def test_updates_merge_into_the_document_that_the_store_has(store: AnyStore) -> None:
    """A session from open to end, folded from its changes."""
    history: list[Write] = [
        writes.open_session(session()),
        writes.join(POD.name, INCARNATION, ("amfid",), TERM),
        writes.activate(POD.name, INCARNATION, TERM),
        writes.join(POD.name, INCARNATION, ("amfid", "smfid"), TERM),
        writes.promise(POD.name, INCARNATION, 600_000, TERM),
        writes.end_session(POD.name, INCARNATION, "closed", TERM + 1),
    ]
    opened, *later = await changes_of(store, history)
    assert opened.document
    assert len(later) == 5
    document = opened.document
    for change in later:
        assert change.updated
        document = merge(document, change.updated, change.removed)
    assert [document] == await store.read(SESSIONS)
    read = read_session(document)
    assert read
    assert read.pools == ("amfid", "smfid")


async def test_a_delete_carries_the_key_alone(store: AnyStore) -> None:
    """Nothing else is left to tell."""
    deleted = writes.release(POOL, chunk())
    _, change = await changes_of(store, [Insert(POOL, chunk().document), deleted])
    assert change == Change(POOL, "chunkid-3", change.at, change.token, gone=True)


async def test_a_write_that_changes_nothing_is_no_change(store: AnyStore) -> None:
    """Neither one without a match nor one that sets what is there."""
    without_match = writes.release(POOL, chunk(9))
    nothing_new = setting(POOL, "chunkid-3", podId=POD.name)
    changes = await changes_of(store, [Insert(POOL, chunk().document), without_match, nothing_new])
    assert [change.key for change in changes] == ["chunkid-3"]


async def test_only_pools_sessions_and_stamps_are_followed(store: AnyStore) -> None:
    """The lead is renewed every second and is nobody's business."""
    elsewhere: list[Write] = [
        Insert(LEADER, {"_id": "leader", "counter": 1}),
        setting(LEADER, "leader", counter=2),
    ]
    followed = [Insert(SESSIONS, session().document), Insert(POOLS[1], chunk().document)]
    changes = await changes_of(store, [*elsewhere, *followed])
    assert [change.space for change in changes] == [SESSIONS, POOLS[1]]


async def test_changes_come_in_the_order_of_their_cluster_times(store: AnyStore) -> None:
    """Each with a token of its own."""
    changes = await changes_of(store, [Insert(POOL, chunk(n).document) for n in range(20)])
    assert [change.key for change in changes] == [f"chunkid-{n}" for n in range(20)]
    assert [change.at for change in changes] == sorted(change.at for change in changes)
    assert len({change.token for change in changes}) == 20


# --- Gap-free ---------------------------------------------------------------------------------------


async def test_an_empty_store_can_be_followed(store: AnyStore) -> None:
    """No collection exists yet, not even the stamp's."""
    snapshot = await store.snapshot()
    assert set(snapshot.spaces) == {SESSIONS, STAMPS, *POOLS}
    assert not any(snapshot.spaces.values())
    async with aclosing(store.changes(after=snapshot.at)) as batches:
        await put(store, POOL, chunk().document)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (changes := (await anext(batches)).changes):
                pass
    assert [change.key for change in changes] == ["chunkid-3"]


async def test_a_snapshot_reads_all_spaces_at_one_time(store: AnyStore) -> None:
    """Pairs are written, one after the other, to a pool that takes long to read and to one that is read
    after it: the second of a pair is never seen alone."""
    await put(store, POOL, *(chunk(n).document for n in range(1_000_000, 1_005_000)))
    stop = asyncio.Event()
    writing = asyncio.gather(*(_write_pairs(store, worker, stop) for worker in range(3)))
    try:
        snapshots = [(await store.snapshot()).spaces for _ in range(5)]
    finally:
        stop.set()
        written = await writing
    assert min(written) > 0
    for spaces in snapshots:
        keys, seconds = ({document["_id"] for document in spaces[pool]} for pool in POOLS)
        assert seconds <= keys


async def _write_pairs(store: AnyStore, worker: int, stop: asyncio.Event) -> int:
    n = 0
    while not stop.is_set():
        for pool in POOLS:
            await put(store, pool, chunk(10_000 * worker + n).document)
        n += 1
    return n


async def test_snapshot_and_changes_give_what_a_later_read_gives(store: AnyStore) -> None:
    """The snapshot is taken in the midst of writers; the stream begins right after it."""
    await stamp(store)
    started = asyncio.Event()
    writers = [asyncio.create_task(_write_anything(store, seed, started)) for seed in range(8)]
    await started.wait()
    snapshot = await store.snapshot()
    await asyncio.gather(*writers)
    await store.write([touch_stamp(TERM, "agent")])
    async with aclosing(store.changes(after=snapshot.at)) as batches:
        changes = await until_stamp(batches, 1)
    folded = _table(snapshot)
    for change in changes:
        assert change.at > snapshot.at
        folded.apply(change)
    assert _content(folded) == _content(_table(await store.snapshot()))
    assert len(changes) > 200


async def _write_anything(store: AnyStore, seed: int, started: asyncio.Event) -> None:
    """Some 120 writes of one pod: sessions, chunks that come, move, are scanned and go."""
    chance = random.Random(seed)
    owner = Owner(f"pod-{seed}", f"10.0.0.{seed}", "i", INCARNATION + seed)
    await store.write([writes.open_session(session(owner=owner))])
    await store.write([writes.activate(owner.name, owner.incarnation, TERM)])
    for step in range(60):
        pool = chance.choice(POOLS)
        n = chance.randrange(200)
        await store.write([writes.allocate(pool, n, owner, f"{seed}-{step}", "r")])
        seen = chunk(n, owner)
        assert seen.drsm
        seen = replace(seen, drsm=replace(seen.drsm, grant=f"{seed}-{step}"))
        acts: list[Write] = [
            writes.claim(pool, seen, OTHER, f"claimed-{step}", 1000),
            writes.release(pool, seen),
            writes.join(owner.name, owner.incarnation, (pool,), TERM),
            writes.end_session(owner.name, owner.incarnation, "closed", TERM),
            setting(pool, f"chunkid-{n}", podId="go-1", podIp="10.9.9.9", podInstance=""),
        ]
        await store.write([chance.choice(acts)])
        if step == 10:
            started.set()


def _table(snapshot: Snapshot) -> Table:
    table = Table(POOLS, snapshot.at, HASHES)
    for space, documents in snapshot.spaces.items():
        table.load(space, documents)
    return table


def _content(table: Table) -> object:
    pools = [(pool.chunks, pool.live, pool.keepalives, pool.checksum) for pool in table.pools.values()]
    return (pools, table.sessions, table.stamp)


# --- Resuming ---------------------------------------------------------------------------------------


async def test_resuming_by_token_loses_and_doubles_nothing(store: AnyStore) -> None:
    """A reader that closes and opens again after every batch sees what one uninterrupted sees."""
    await stamp(store)
    at = (await store.snapshot()).at
    writing = asyncio.gather(*(_write_chunks(store, worker) for worker in range(4)))
    batch = await _one_batch(store, after=at)
    seen = list(batch[0])
    while len(seen) < 200:
        batch = await _one_batch(store, token=batch[1])
        seen += batch[0]
    await writing
    await store.write([touch_stamp(TERM, "agent")])
    async with aclosing(store.changes(after=at)) as batches:
        assert seen == (await until_stamp(batches, 1))[:-1]


async def _write_chunks(store: AnyStore, worker: int) -> None:
    for n in range(50):
        await put(store, POOL, chunk(50 * worker + n).document)


async def _one_batch(
    store: AnyStore, *, after: int | None = None, token: str | None = None
) -> tuple[list[Change], str]:
    async with aclosing(store.changes(after=after, token=token)) as batches:
        batch = await first(batches)
        return list(batch.changes), batch.token


async def test_a_stream_goes_on_right_after_any_change(store: AnyStore) -> None:
    """Not only where a batch ended."""
    changes = await changes_of(store, [Insert(POOL, chunk(n).document) for n in range(5)])
    for index, change in enumerate(changes):
        async with aclosing(store.changes(token=change.token)) as batches:
            assert (await until_stamp(batches, 1))[:-1] == changes[index + 1 :]


async def test_a_stream_goes_on_after_any_cluster_time(store: AnyStore) -> None:
    """Excluding the changes of that time itself."""
    changes = await changes_of(store, [Insert(POOL, chunk(n).document) for n in range(5)])
    for index, change in enumerate(changes):
        async with aclosing(store.changes(after=change.at)) as batches:
            assert (await until_stamp(batches, 1))[:-1] == changes[index + 1 :]


async def test_the_token_moves_on_while_nothing_followed_changes(store: AnyStore) -> None:
    """Otherwise a quiet pool's position would fall off the oplog."""
    await stamp(store)
    async with aclosing(store.changes(after=(await store.snapshot()).at)) as batches:
        begin = (await first(batches)).token
        await put(store, LEADER, {"_id": "leader"})
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (batch := await anext(batches)).token == begin:
                assert not batch.changes
        assert not batch.changes
    await store.write([touch_stamp(TERM, "agent")])
    async with aclosing(store.changes(token=batch.token)) as batches:
        assert [change.space for change in await until_stamp(batches, 1)] == [STAMPS]


async def test_idle_batches_come_without_any_write(store: AnyStore) -> None:
    """So that a reader knows that the stream lives."""
    async with aclosing(store.changes(after=(await store.snapshot()).at)) as batches:
        for _ in range(3):
            assert not (await first(batches)).changes


async def test_several_read_the_same_stream(store: AnyStore) -> None:
    """A leader and its standby see the same changes and tokens."""
    await stamp(store)
    at = (await store.snapshot()).at
    async with aclosing(store.changes(after=at)) as one, aclosing(store.changes(after=at)) as other:
        await put(store, POOL, chunk().document)
        await store.write([touch_stamp(TERM, "agent")])
        assert await until_stamp(one, 1) == await until_stamp(other, 1)


# --- The end of a stream ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["garbage", "g0", "82", "8264"])
async def test_a_token_that_is_none_is_a_lost_position(store: AnyStore, token: str) -> None:
    """Trying it again would not help."""
    with pytest.raises(PositionLost):
        await _one_batch(store, token=token)


async def test_a_stream_begins_in_one_place(store: AnyStore) -> None:
    """After a time or after a token."""
    with pytest.raises(ValueError, match="give one of them"):
        store.changes()
    with pytest.raises(ValueError, match="give one of them"):
        store.changes(after=1, token="1")


async def test_a_cancelled_reader_leaves_nothing_behind(store: AnyStore) -> None:
    """The stream may be closed in the midst of waiting for news."""
    await stamp(store)
    at = (await store.snapshot()).at
    reading = asyncio.create_task(_read_for_ever(store, at))
    await asyncio.sleep(0.05)
    others = asyncio.all_tasks() - {reading}
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert asyncio.all_tasks() <= others
    assert (await store.snapshot()).at >= at


async def _read_for_ever(store: AnyStore, at: int) -> None:
    async for _ in store.changes(after=at):
        pass


async def test_a_closed_store_answers_nothing(store: AnyStore) -> None:
    """Typed, as any other outage."""
    at = (await store.snapshot()).at
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.write([Delete(POOL, {"_id": "x"})])
    with pytest.raises(StoreUnavailable):
        await store.read(SESSIONS)
    with pytest.raises(StoreUnavailable):
        await store.snapshot()
    with pytest.raises(StoreUnavailable):
        await _one_batch(store, after=at)
