"""An unfit MongoDB is refused at start: in bounded time, with what to do, without credentials."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest
import pytest_asyncio
from pymongo import AsyncMongoClient
from pymongo.common import URI_OPTIONS_VALIDATOR_MAP
from pymongo.errors import OperationFailure

from drsm_agent.core.documents import Document
from drsm_agent.core.table import SESSIONS
from drsm_agent.core.writes import LEADER, SETTINGS, Insert
from drsm_agent.embedded import Mongod, Stack, start_standalone
from drsm_agent.embedded.binaries import find_mongod
from drsm_agent.errors import AgentError, Misconfigured, StoreRefused, StoreUnavailable
from drsm_agent.store import check
from drsm_agent.store.faults import unavailable
from drsm_agent.store.mongo import MongoStore, client_options
from drsm_agent.store.url import OVERRIDDEN, REFUSED, TAKEN
from tests.store.tools import POOLS, Stand

SHORT = 2.0
"""How long MongoDB is asked in vain. On a slow machine the driver must hear from it until then, too."""
LONG = 20.0


async def _refusal(url: str, timeout: float = SHORT, kind: type[AgentError] = Misconfigured) -> str:
    """Why a store with this URL is refused, or waited for."""
    with pytest.raises(kind) as caught:
        async with MongoStore(url, "d", {"amfid": "d"}, timeout=timeout) as store:
            await store.check()
    assert "secret" not in str(caught.value)
    return str(caught.value)


async def test_a_replica_set_is_accepted_and_left_as_it_was(mongo: Stand) -> None:
    """The check tries reads, writes and the stream, and leaves nothing behind."""
    await mongo.store.check()
    assert not any((await mongo.store.snapshot()).spaces.values())


async def test_pools_in_several_databases_are_accepted(mongo_url: str, database: str) -> None:
    """The stream over the deployment is tried then."""
    pools = {POOLS[0]: database, POOLS[1]: f"{database}b"}
    async with MongoStore(mongo_url, database, pools) as store:
        await store.check()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def standalone(stack: Stack) -> AsyncIterator[Mongod]:
    mongod = await start_standalone(stack.scratch)
    yield mongod
    await mongod.stop()


async def test_a_standalone_is_told_how_to_become_a_replica_set(standalone: Mongod) -> None:
    """It has no change streams."""
    text = await _refusal(f"mongodb://{standalone.address}/", timeout=LONG)
    assert "--replSet rs0" in text
    assert "rs.initiate()" in text
    assert standalone.address in text


async def test_a_standalone_behind_a_replica_set_url_too(standalone: Mongod) -> None:
    """Then the driver finds no member of it."""
    assert "rs.initiate()" in await _refusal(f"mongodb://{standalone.address}/?replicaSet=rs0")


@pytest.mark.parametrize("options", ["directConnection=true", "replicaSet=rs0", ""])
async def test_a_member_that_is_not_initiated_yet_is_waited_for(stack: Stack, options: str) -> None:
    """Whoever makes it a replica set may come later; a standalone never becomes one by itself."""
    member = Mongod(stack.scratch, find_mongod(), options=("--replSet", "rs0"))
    await member.start()
    try:
        text = await _refusal(f"mongodb://{member.address}/?{options}", kind=StoreUnavailable)
    finally:
        await member.stop()
    assert "rs.initiate()" in text


@pytest.mark.parametrize(
    "url", ["mongodb://user:secret@127.0.0.1:1/?replicaSet=rs0", "mongodb://127.0.0.1:1"]
)
async def test_a_mongodb_that_is_not_there_is_told_in_bounded_time(url: str) -> None:
    """With the address. Whether it will ever be there nobody knows."""
    begin = time.monotonic()
    text = await _refusal(url, kind=StoreUnavailable)
    assert time.monotonic() - begin < LONG  # by default the driver looks for half a minute
    assert "127.0.0.1:1" in text
    assert "refused" in text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://localhost",
        "mongodb://",
        "mongodb://user:secret/x@host/",
        "mongodb://user:sec@ret@secret:27x/",
        "mongodb://host:port",
        "mongodb://localhost/?tls=true&tlsCAFile=/nowhere/ca.pem",
    ],
)
async def test_a_malformed_url_is_refused(url: str) -> None:
    """Without naming any part that may be a password."""
    text = await _refusal(url)
    assert "mongodb://user:password@host:27017/" in text
    assert "ret@" not in text


async def test_wrong_credentials_are_refused(mongo_url: str) -> None:
    """The driver's reason, and which permissions are needed."""
    address = mongo_url.removeprefix("mongodb://")
    text = await _refusal(f"mongodb://user:secret@{address}", timeout=LONG)
    assert "readWrite" in text
    assert "Authentication failed" in text


@pytest.mark.parametrize(("code", "expected"), [(13, Misconfigured), (91, StoreUnavailable)])
def test_a_missing_permission_is_told_from_an_outage(code: int, expected: type[Exception]) -> None:
    """The first will not pass by itself."""
    with pytest.raises(expected), check.refused_at_once("host"):
        _fail_for_want_of(OperationFailure("not authorized on d to execute command", code))


def _fail_for_want_of(cause: Exception) -> None:
    raise unavailable(cause, "a test") from cause


async def test_an_old_mongodb_is_refused(mongo: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshot reads came with 5.0."""
    monkeypatch.setattr(check, "OLDEST_WIRE_VERSION", 1000)
    with pytest.raises(Misconfigured, match=r"5\.0"):
        await mongo.store.check()


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("mongodb://host:1,other:2/db?replicaSet=rs0", "host:1,other:2"),
        ("mongodb://user:p%40ss@host:1/", "host:1"),
        ("mongodb+srv://user:p@ss/w@cluster.example.net", "cluster.example.net"),
        ("mongodb://[::1]:27017", "[::1]:27017"),
        ("mongodb://host/?proxyPassword=a@b c", "the given URL"),
        ("", "the given URL"),
    ],
)
def test_only_the_hosts_of_a_url_are_shown(url: str, hosts: str) -> None:
    """Whatever the password looks like."""
    assert check.hosts_of(url) == hosts


async def test_the_urls_options_do_not_weaken_the_guarantees(mongo_url: str, database: str) -> None:
    """Nor break the waiting for news."""
    weak = f"{mongo_url}&w=1&journal=false&readConcernLevel=local&timeoutMS=9000&readPreference=secondary"
    weak += "&wTimeoutMS=1&retryWrites=false&tz_aware=false&maxPoolSize=1&minPoolSize=1"
    weak += "&heartbeatFrequencyMS=600000"
    async with MongoStore(weak, database, {"amfid": database}) as store:
        await store.check()
        client = store._client
        assert client.write_concern.document == {"w": "majority", "j": True, "wtimeout": 0}
        assert client.read_concern.level == "majority"
        assert client.read_preference.name == "Primary"
        async with aclosing(store.changes(after=(await store.snapshot()).at)) as batches:
            await anext(batches)
            async with asyncio.timeout(8.0):  # of idle batches, which come twice a second
                await anext(batches)


def test_every_option_of_the_drivers_urls_is_decided() -> None:
    """A new driver's new options, too; and what is overridden has a value of the agent's."""
    known = {name.lower() for name in URI_OPTIONS_VALIDATOR_MAP}
    assert known == TAKEN | OVERRIDDEN | REFUSED.keys()
    assert len(TAKEN) + len(OVERRIDDEN) + len(REFUSED) == len(known)
    assert {name.lower() for name in client_options(1.0)} >= OVERRIDDEN


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("loadBalanced=true", "load balancer"),
        ("maxStalenessSeconds=90", "primary"),
        ("readPreferenceTags=dc:east", "primary"),
        ("fsync=true", "journal"),
        ("authMechanism=MONGODB-AWS", "SCRAM-SHA-256"),
        ("authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:azure", "SCRAM-SHA-256"),
        ("authMechanism=gssapi", "SCRAM-SHA-256"),
        ("replicaset_=rs0", "expected an option"),
        ("REPLICASET=rs0&LOADBALANCED=true", "load balancer"),
    ],
)
async def test_options_that_the_agent_cannot_work_with_are_refused_before_anything_is_sent(
    option: str, reason: str
) -> None:
    """Ways to authenticate of clouds ask services of theirs: those are never reached."""
    assert reason in await _refusal(f"mongodb://user:secret@127.0.0.1:1/?{option}")


async def test_a_url_that_names_one_member_alone_follows_the_primary_all_the_same(mongo_url: str) -> None:
    """`mongosh` shows such URLs. With a direct connection nobody would lead after the next election."""
    address = mongo_url.removeprefix("mongodb://").partition("/")[0].split(",")[0]
    async with MongoStore(f"mongodb://{address}/?directConnection=true", "d", {"amfid": "d"}) as store:
        await store.check()
        assert store._client.delegate.topology_description.topology_type_name == "ReplicaSetWithPrimary"


@pytest.mark.parametrize("collection", [SESSIONS, "amfid", LEADER, SETTINGS])
async def test_a_validator_that_does_not_let_the_agents_documents_in_is_refused(
    mongo: Stand, collection: str
) -> None:
    """The start tries what the work will do, and leaves nothing behind."""
    await mongo.database.create_collection(collection, validator={"owner": {"$exists": True}})
    with pytest.raises(Misconfigured, match="validator"):
        await mongo.store.check()
    await mongo.database.command({"collMod": collection, "validator": {}})
    await mongo.store.check()
    assert await mongo.database[collection].count_documents({}) == 0


async def test_a_write_that_a_validator_refuses_later_is_told_as_that(mongo: Stand) -> None:
    """Not as an outage."""
    await mongo.database.create_collection("amfid", validator={"owner": {"$exists": True}})
    with pytest.raises(StoreRefused, match="validator"):
        await mongo.store.write([Insert("amfid", {"_id": "chunkid-1"})])


async def test_a_pool_whose_collection_is_a_view_is_refused_at_once(mongo: Stand) -> None:
    await mongo.database.create_collection("amfid", viewOn="others", pipeline=[])
    with pytest.raises(Misconfigured, match="view"):
        await mongo.store.check()


async def test_a_database_that_differs_only_in_capital_letters_is_refused_at_once(
    mongo_url: str, database: str
) -> None:
    """With what to set."""
    async with AsyncMongoClient[Document](mongo_url) as client:
        await client[database.upper()]["other"].insert_one({"_id": 1})
        async with MongoStore(mongo_url, database, {"amfid": database}) as store:
            with pytest.raises(Misconfigured, match="DRSM_MONGO_DATABASE"):
                await store.check()
        await client.drop_database(database.upper())


async def test_a_refused_store_closes_cleanly() -> None:
    """The one that refused it has nothing to tidy up."""
    with suppress(Misconfigured):
        MongoStore("mongodb://:bad", "d", {})
