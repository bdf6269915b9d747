"""What only a real MongoDB can show: ends of the stream, outages, odd documents, several databases."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import pytest
import pytest_asyncio
from bson import Int64, Timestamp
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError
from pymongo.hello import Hello
from pymongo.server_description import ServerDescription
from pymongo.synchronous.pool import Connection

from drsm_agent import errors
from drsm_agent.core.documents import Document
from drsm_agent.core.table import SESSIONS
from drsm_agent.core.writes import LEADER, POSITION, Insert, touch_stamp
from drsm_agent.embedded import ReplicaSet, Stack, start_replica_set
from drsm_agent.errors import DROPPED, AgentError, PositionLost, StoreRefused, StoreUnavailable
from drsm_agent.ports import Batch
from drsm_agent.store import mongo
from drsm_agent.store.change_stream import POSITION_DEAD, cluster_time, read_event, timestamp
from drsm_agent.store.cursor import RawCursor, plain
from drsm_agent.store.faults import REMEDIES
from drsm_agent.store.mongo import MongoStore
from tests.store.tools import (
    POOLS,
    TERM,
    Stand,
    chunk,
    eventually,
    first,
    found,
    put,
    session,
    stamp,
    until_stamp,
)

POOL = POOLS[0]
FAULT_TIMEOUT = 3.0


# --- The end of a followed collection -----------------------------------------------------------------


async def _lost(stand: Stand, after: int) -> PositionLost:
    with pytest.raises(PositionLost) as caught:
        async with aclosing(stand.store.changes(after=after)) as batches:
            await until_stamp(batches, -1)
    return caught.value


async def _filled(stand: Stand) -> int:
    """A store with something in every followed collection; the cluster time after that."""
    await stamp(stand.store)
    await put(stand.store, SESSIONS, session().document)
    for pool in POOLS:
        await put(stand.store, pool, chunk().document)
    return (await stand.store.snapshot()).at


@pytest.mark.parametrize("space", [POOL, SESSIONS])
async def test_a_dropped_collection_ends_the_stream(mongo: Stand, space: str) -> None:
    """Its chunks are gone without a single delete event."""
    after = await _filled(mongo)
    await mongo.database.drop_collection(space)
    lost = await _lost(mongo, after)
    assert f"'drop' of {mongo.name}.{space}" in str(lost)
    assert (lost.end, lost.data_lost) == (DROPPED, True)


async def test_a_renamed_collection_ends_the_stream(mongo: Stand) -> None:
    """Away from its name, or another one onto it."""
    after = await _filled(mongo)
    await mongo.database[POOL].rename("elsewhere")
    assert f"'rename' of {mongo.name}.{POOL} to {mongo.name}.elsewhere" in str(await _lost(mongo, after))
    after = (await mongo.store.snapshot()).at
    await mongo.database["elsewhere"].rename(POOL)
    assert f"to {mongo.name}.{POOL}" in str(await _lost(mongo, after))


async def test_a_dropped_database_ends_the_stream(mongo: Stand) -> None:
    """Never silently, though MongoDB would just end the cursor."""
    after = await _filled(mongo)
    await mongo.client.drop_database(mongo.name)
    lost = await _lost(mongo, after)
    assert "drop" in str(lost)
    assert lost.end == DROPPED


async def test_a_database_that_goes_without_a_followed_collection_ends_the_stream(mongo: Stand) -> None:
    """MongoDB ends the cursor for good then."""
    await mongo.database["other"].insert_one({"_id": 1})
    after = (await mongo.store.snapshot()).at
    await mongo.client.drop_database(mongo.name)
    assert mongo.name in str(await _lost(mongo, after))


async def test_other_collections_may_come_and_go(mongo: Stand) -> None:
    """Only the followed ones matter."""
    after = await _filled(mongo)
    await mongo.database["other"].insert_one({"_id": 1})
    await mongo.database["other"].rename("another")
    await mongo.database.drop_collection("another")
    await mongo.store.write([touch_stamp(TERM, "agent")])
    async with aclosing(mongo.store.changes(after=after)) as batches:
        assert len(await until_stamp(batches, 1)) == 1


async def test_after_the_end_a_new_snapshot_goes_on(mongo: Stand) -> None:
    """Reading everything anew heals."""
    after = await _filled(mongo)
    await mongo.database.drop_collection(POOL)
    await _lost(mongo, after)
    snapshot = await mongo.store.snapshot()
    assert snapshot.spaces[POOL] == []
    await mongo.store.write([touch_stamp(TERM, "agent")])
    async with aclosing(mongo.store.changes(after=snapshot.at)) as batches:
        assert len(await until_stamp(batches, 1)) == 1


async def test_an_array_cut_by_somebody_ends_the_stream(mongo: Stand) -> None:
    """The event does not say what is left of it."""
    after = await _filled(mongo)
    await mongo.database[SESSIONS].update_one({}, {"$set": {"pools": list("abcdefgh")}})
    cut = [{"$set": {"pools": {"$slice": ["$pools", 6]}}}]
    await mongo.database[SESSIONS].update_one({}, cut)
    assert "array" in str(await _lost(mongo, after))


# --- Outages ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own_set(stack: Stack) -> ReplicaSet:
    """A replica set that these tests may break."""
    return await start_replica_set(stack.scratch, parameters={"enableTestCommands": 1})


@pytest_asyncio.fixture
async def fragile(own_set: ReplicaSet, database: str) -> AsyncIterator[Stand]:
    async with Stand.open(own_set.url, database) as stand:
        yield stand


async def _fail(stand: Stand, commands: Sequence[str], times: int, **fault: object) -> None:
    """Make the store's next commands of these names fail."""
    data = {"failCommands": commands, "appName": mongo.APP_NAME, **fault}
    point = {"configureFailPoint": "failCommand", "mode": {"times": times}, "data": data}
    await stand.client.admin.command(point)


@pytest.mark.parametrize(
    "fault",
    [
        {"closeConnection": True},
        {"errorCode": 43},
        {"errorCode": 10107, "errorLabels": []},
        {"errorCode": 63, "errorLabels": ["ResumableChangeStreamError"]},
    ],
    ids=["network", "cursor", "primary", "label"],
)
@pytest.mark.parametrize("commands", [("getMore",), ("getMore", "aggregate")], ids=["reading", "opening"])
async def test_an_interrupted_stream_goes_on_from_its_token(
    fragile: Stand, commands: tuple[str, ...], fault: Document
) -> None:
    """Nothing is missed and nothing comes twice; each interruption is told, so that it can be counted."""
    after = await _filled(fragile)
    async with aclosing(fragile.store.changes(after=after)) as batches:
        await put(fragile.store, POOL, *(chunk(n).document for n in range(10, 20)))
        await fragile.store.write([touch_stamp(TERM, "agent")])
        changes = await until_stamp(batches, 1)
        token = changes[-1].token
        await _fail(fragile, commands, len(commands), **fault)
        await put(fragile.store, POOL, *(chunk(n).document for n in range(20, 30)))
        await fragile.store.write([touch_stamp(TERM, "agent")])
        ends = [await _interrupted(batches)]
    while len(ends) < len(commands):
        async with aclosing(fragile.store.changes(token=token)) as batches:
            ends.append(await _interrupted(batches))
    async with aclosing(fragile.store.changes(token=token)) as batches:
        changes += await until_stamp(batches, 2)
    chunks = [change.key for change in changes if change.space == POOL]
    assert chunks == [f"chunkid-{n}" for n in range(10, 30)]
    assert ends == ["interrupted"] * len(commands)


async def _interrupted(batches: AsyncIterator[Batch]) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        await until_stamp(batches, -1)
    return caught.value.end


@pytest.mark.parametrize("code", [*sorted(POSITION_DEAD), 50811])
async def test_a_dead_position_is_told_by_its_code(fragile: Stand, code: int) -> None:
    """Without an attempt to go on from it."""
    after = await _filled(fragile)
    async with aclosing(fragile.store.changes(after=after)) as batches:
        await first(batches)
        await _fail(fragile, ["getMore"], 1, errorCode=code)
        with pytest.raises(PositionLost) as caught:
            await until_stamp(batches, -1)
    assert (caught.value.code, caught.value.end) == (code, errors.POSITION_DEAD)


OF_THEIR_OWN_TESTS = {121, 166, 303}
"""A failpoint cannot give what MongoDB sends along with these."""


@pytest.mark.parametrize("code", sorted(REMEDIES.keys() - OF_THEIR_OWN_TESTS))
async def test_a_refusal_is_told_from_an_outage_with_what_to_do(fragile: Stand, code: int) -> None:
    """Of the stream and of every other operation: no waiting mends a permission that was taken away."""
    after = await _filled(fragile)
    await _fail(fragile, ["aggregate", "find", "insert"], 4, errorCode=code)
    async with aclosing(fragile.store.changes(after=after)) as batches:
        operations = [
            first(batches),
            fragile.store.read(SESSIONS),
            fragile.store.snapshot(),
            put(fragile.store, POOL, chunk(10).document),
        ]
        for operation in operations:
            with pytest.raises(StoreRefused) as caught:
                await operation
            assert caught.value.code == code
            assert REMEDIES[code] in str(caught.value)


@pytest.mark.parametrize("code", [1, 64, 91, 133, 262, 11600])
async def test_any_other_error_may_be_an_outage(fragile: Stand, code: int) -> None:
    """Internal, write concern, shutting down, no primary for mongos, too slow, interrupted."""
    after = await _filled(fragile)
    await _fail(fragile, ["getMore"], 1, errorCode=code)
    async with aclosing(fragile.store.changes(after=after)) as batches:
        assert await _interrupted(batches) == "interrupted"


@pytest.mark.parametrize("code", [91, 189, 246, 262, 10107, 11600])
@pytest.mark.parametrize("command", ["delete", "insert", "find", "aggregate"])
async def test_what_is_an_outage_while_running_is_one_at_start(
    fragile: Stand, own_set: ReplicaSet, database: str, code: int, command: str
) -> None:
    """During an election, say: the start waits, whichever of its commands met it."""
    await _fail(fragile, [command], 2**31 - 1, errorCode=code)
    async with MongoStore(own_set.url, database, {POOL: database}, timeout=FAULT_TIMEOUT / 6) as store:
        with pytest.raises(StoreUnavailable) as caught:
            await store.check()
    assert not isinstance(caught.value, StoreRefused)
    await fragile.database.client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    await fragile.store.check()


def _classes(*bases: type[Exception]) -> list[type[Exception]]:
    """These and all that are derived from them."""
    found = dict.fromkeys(bases)
    for base in bases:
        found |= dict.fromkeys(_classes(*base.__subclasses__()))
    return list(found)


def _made(kind: type[Exception]) -> Exception:
    possible: list[tuple[Any, ...]] = [("by a test",), ({},), ("by a test", {}), ()]
    for arguments in possible:
        with suppress(Exception):
            return kind(*arguments)
    return OSError("by a test")


@pytest.mark.parametrize(
    "kind",
    [*_classes(PyMongoError, BSONError), OSError, ssl.SSLError, ssl.SSLCertVerificationError, EOFError],
)
async def test_no_error_of_the_driver_leaves_the_store_unclassified(
    mongo_url: str, database: str, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Whatever it raises, of whichever operation, is an error of the agent's."""

    def fail(self: Connection, database: str, command: Any, *more: Any, **options: Any) -> Any:
        if {"hello", "isMaster", "ismaster"} & set(command):  # how the driver finds the primary
            return really(self, database, command, *more, **options)
        raise _made(kind)

    really = Connection.command

    def fail_to_send(*_: Any, **__: Any) -> None:
        raise _made(kind)

    monkeypatch.setattr(Connection, "command", fail)
    monkeypatch.setattr(Connection, "send_message", fail_to_send)
    store = MongoStore(mongo_url, database, {POOL: database}, timeout=FAULT_TIMEOUT / 3)

    async def changes() -> None:
        async with aclosing(store.changes(after=1)) as batches:
            await anext(batches)

    async with store:
        raised = await asyncio.gather(
            store.check(),
            store.write([touch_stamp(TERM, "agent")]),
            store.write([Insert(POOL, chunk(10).document)]),
            store.read(SESSIONS),
            store.snapshot(),
            store.ttl(POOL),
            store.has_chunks(POOL),
            store.has_go(POOL),
            changes(),
            return_exceptions=True,
        )
        assert [error for error in raised if not isinstance(error, AgentError)] == []
        assert await store.elsewhere([POOL]) == {}


async def test_the_caller_goes_on_from_its_token_after_an_outage(
    fragile: Stand, own_set: ReplicaSet, database: str
) -> None:
    """MongoDB is killed and comes back."""
    after = await _filled(fragile)
    async with Stand.open(own_set.url, database, timeout=FAULT_TIMEOUT) as stand:
        async with aclosing(stand.store.changes(after=after)) as batches:
            token = (await first(batches)).token
            await put(fragile.store, POOL, chunk(10).document)
            await own_set.members[0].kill()
            with pytest.raises(StoreUnavailable):
                await until_stamp(batches, -1)
        await own_set.members[0].start()
        await own_set.await_primary()
    await put(fragile.store, POOL, chunk(11).document)
    await fragile.store.write([touch_stamp(TERM, "agent")])
    async with aclosing(fragile.store.changes(token=token)) as batches:
        keys = [change.key for change in await until_stamp(batches, 1)]
    assert keys == ["chunkid-10", "chunkid-11", "stamp"]


async def test_a_paused_mongodb_is_given_up_in_bounded_time(
    fragile: Stand, own_set: ReplicaSet, database: str
) -> None:
    """Its connections stay open and nothing answers."""
    after = await _filled(fragile)
    async with Stand.open(own_set.url, database, timeout=FAULT_TIMEOUT) as stand:
        store = stand.store
        async with aclosing(store.changes(after=after)) as batches:
            await first(batches)
            own_set.members[0].pause()
            try:
                operations = [
                    store.write([Insert(POOL, chunk(10).document)]),
                    store.read(SESSIONS),
                    store.snapshot(),
                    until_stamp(batches, -1),
                ]
                outcomes = await asyncio.gather(*map(_seconds_until_unavailable, operations))
            finally:
                own_set.members[0].resume()
        assert max(outcomes[:3]) < 2 * FAULT_TIMEOUT
        assert outcomes[3] < 4 * FAULT_TIMEOUT
        await own_set.await_primary()
        assert await store.read(SESSIONS)


async def _seconds_until_unavailable(operation: object) -> float:
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await operation  # type: ignore[misc]
    return time.monotonic() - begin


async def test_a_write_that_a_majority_did_not_confirm_has_no_outcome(fragile: Stand) -> None:
    """It may have happened: only a read tells."""
    await _filled(fragile)
    concern = {"code": 64, "errmsg": "waiting for replication timed out"}
    await _fail(fragile, ["insert"], 1, writeConcernError=concern)
    with pytest.raises(StoreUnavailable, match="waiting for replication"):
        await put(fragile.store, POOL, chunk(10).document)
    await eventually(lambda: found(fragile.store, POOL, "chunkid-10"))


async def test_a_fault_beside_a_taken_number_is_an_outage(fragile: Stand) -> None:
    """It is not to be taken for a plain refusal."""
    await _filled(fragile)
    await fragile.database.command({"collMod": POOL, "validator": {"podId": {"$ne": "forbidden"}}})
    bulk = [Insert(POOL, chunk().document), Insert(POOL, chunk(10).document | {"podId": "forbidden"})]
    with pytest.raises(StoreUnavailable, match="validation"):
        await fragile.store.write(bulk)


async def test_a_cut_connection_is_retried_by_the_driver(fragile: Stand) -> None:
    """A write is made once, and its outcome is known."""
    await _filled(fragile)
    await _fail(fragile, ["insert"], 1, closeConnection=True)
    outcome = await fragile.store.write([Insert(POOL, chunk(10).document)])
    assert (outcome.changed, outcome.refused) == (1, frozenset())


async def test_a_closed_stream_leaves_no_cursor_at_the_server(fragile: Stand) -> None:
    """Also when its reader was cancelled while it waited for news."""
    after = await _filled(fragile)
    reading = asyncio.create_task(_lost(fragile, after))
    await eventually(lambda: _has_open_cursors(fragile, 1))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(lambda: _has_open_cursors(fragile, 0))


async def _has_open_cursors(stand: Stand, count: int) -> bool:
    """Whether so many stay open on the test's own database."""
    ours: list[Document] = [
        {"$currentOp": {"idleCursors": True, "allUsers": True}},
        {"$match": {"ns": {"$regex": f"^{stand.name}."}, "cursor.tailable": True}},
    ]
    operations = await stand.client.admin.aggregate(ours).to_list(None)
    return len({operation["cursor"]["cursorId"] for operation in operations}) == count


# --- Databases and documents ----------------------------------------------------------------------------


async def test_pools_may_live_in_several_databases(mongo_url: str, database: str) -> None:
    """Then the whole deployment is watched, and a like-named collection elsewhere is not taken for a pool."""
    pools = {POOLS[0]: f"{database}a", POOLS[1]: f"{database}b"}
    async with Stand.open(mongo_url, database, pools) as stand:
        after = await _filled(stand)
        await stand.client[database][POOLS[0]].insert_one({"_id": "stranger"})
        await stand.client[f"{database}b"][POOLS[0]].insert_one({"_id": "stranger"})
        for pool in POOLS:
            await put(stand.store, pool, chunk(10).document)
        await stand.store.write([touch_stamp(TERM, "agent")])
        async with aclosing(stand.store.changes(after=after)) as batches:
            changes = await until_stamp(batches, 1)
        assert [(change.space, change.key) for change in changes[:-1]] == [
            (pool, "chunkid-10") for pool in POOLS
        ]
        assert set(await stand.client[f"{database}b"].list_collection_names()) == set(POOLS)
        after = (await stand.store.snapshot()).at
        await stand.client.drop_database(f"{database}a")
        assert f"of {database}a" in str(await _lost(stand, after))


async def test_a_large_pool_is_read_in_batches(mongo: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, and each document once."""
    monkeypatch.setattr("drsm_agent.store.mongo.READ_BATCH", 7)
    await put(mongo.store, POOL, *(chunk(n).document for n in range(100)))
    documents = (await mongo.store.snapshot()).spaces[POOL]
    assert sorted(document["_id"] for document in documents) == sorted(f"chunkid-{n}" for n in range(100))


async def test_a_snapshot_stays_at_its_time(mongo: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while it is read is not in it."""
    monkeypatch.setattr("drsm_agent.store.mongo.READ_BATCH", 1)
    more, begun, emptied = RawCursor.more, asyncio.Event(), asyncio.Event()

    async def after_all_was_deleted(cursor: RawCursor, size: int) -> None:
        begun.set()
        await emptied.wait()
        await more(cursor, size)

    await _filled(mongo)
    await put(mongo.store, POOL, *(chunk(n).document for n in range(10, 60)))
    monkeypatch.setattr(RawCursor, "more", after_all_was_deleted)
    reading = asyncio.create_task(mongo.store.snapshot())
    await begun.wait()
    await mongo.database[POOL].delete_many({})
    emptied.set()
    assert len((await reading).spaces[POOL]) == 51


async def test_text_that_is_none_does_not_stop_the_stream(mongo: Stand) -> None:
    """Go's driver sends any bytes; and a year beyond Python's is clamped."""
    after = await _filled(mongo)
    broken = b"\x11\x00\x00\x00\x02_id\x00\x03\x00\x00\x00x\xff\x00\x00"
    await mongo.database[POOL].insert_one(RawBSONDocument(broken))
    far = {"_id": "far", "expireAt": {"$toDate": Int64(2**60)}}
    await mongo.database[POOL].update_one({"_id": "far"}, [{"$set": far}], upsert=True)
    await mongo.store.write([touch_stamp(TERM, "agent")])
    async with aclosing(mongo.store.changes(after=after)) as batches:
        odd, late, _ = await until_stamp(batches, 1)
    assert odd.key == "x\ufffd"
    assert late.document
    assert late.document["expireAt"].year == 9999
    assert len((await mongo.store.snapshot()).spaces[POOL]) == 3
    assert len(await mongo.store.read(POOL)) == 3


async def test_nothing_of_the_driver_comes_out(mongo: Stand) -> None:
    """Neither its integers nor its documents, at any depth."""
    after = await _filled(mongo)
    big = {"_id": "big", "n": 2**40, "deep": {"list": [2**41, {"n": 2**42}]}}
    await put(mongo.store, POOL, big)
    await put(mongo.store, POSITION, big)
    await mongo.database[POOL].update_one({"_id": "big"}, {"$set": {"deep.list": [2**43]}})
    await mongo.store.write([touch_stamp(TERM, "agent")])
    async with aclosing(mongo.store.changes(after=after)) as batches:
        inserted, updated, _ = await until_stamp(batches, 1)
    snapshot = (await mongo.store.snapshot()).spaces[POOL]
    for value in (inserted.document, updated.updated, snapshot, await mongo.store.read(POSITION)):
        _assert_plain(value)
    assert type(inserted.at) is int


def _assert_plain(value: object) -> None:
    assert type(value) in {dict, list, int, str, bool, type(None)}, value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _assert_plain(item)


# --- Pure parts -----------------------------------------------------------------------------------------


def test_a_cluster_time_goes_there_and_back() -> None:
    """Also where the increment is at its end."""
    for at in (1, 5 << 32 | 7, (5 << 32 | 0xFFFFFFFF) + 1):
        assert cluster_time(timestamp(at)) == at
    assert timestamp((5 << 32 | 0xFFFFFFFF) + 1) == Timestamp(6, 0)


def test_removed_fields_are_named() -> None:
    """Neither we nor Go pods remove any, but an operator may."""
    event = {
        "_id": {"_data": "token"},
        "operationType": "update",
        "ns": {"db": "d", "coll": POOL},
        "documentKey": {"_id": "a"},
        "clusterTime": Timestamp(5, 7),
        "updateDescription": {"updatedFields": {"n": Int64(1)}, "removedFields": ["x.y"]},
    }
    change = read_event(event, {("d", POOL): POOL})
    assert (change.updated, change.removed, change.at) == ({"n": 1}, ("x.y",), 5 << 32 | 7)
    assert type(plain(Int64(1))) is int


def test_all_commands_go_to_one_mongos() -> None:
    """Of a replica set the driver chooses freely."""
    hello: Hello[Document] = Hello({"ok": 1, "msg": "isdbgrid"})
    routers = [ServerDescription(("host", port), hello) for port in (3, 1, 2)]
    assert [server.address for server in mongo.one_router(routers)] == [("host", 1)]
    members = [ServerDescription(("host", port)) for port in (3, 1)]
    assert mongo.one_router(members) == members


def test_the_lead_is_not_followed() -> None:
    """It is renewed all the time."""
    stream = mongo.MongoStore("mongodb://localhost:1", "d", {POOL: "d"})._stream
    assert LEADER not in str(stream.pipeline({}))
