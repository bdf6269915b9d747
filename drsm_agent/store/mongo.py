"""The store on MongoDB, through Motor.

Everything is written with majority and journal and read as a majority has it, from the primary. Every
operation is bounded: `timeout` covers finding a primary, the connection, the answer and the driver's
own retries together.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from itertools import product
from typing import Any, Self

import pymongo
import structlog
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from pymongo import DeleteOne, InsertOne, UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError, OperationFailure
from pymongo.server_description import ServerDescription

from drsm_agent.core.documents import Document
from drsm_agent.core.table import STAMPS
from drsm_agent.core.writes import Delete, Insert, Outcome, Update, Write
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.ports import Batch, Snapshot
from drsm_agent.store import check
from drsm_agent.store.change_stream import ChangeStream, cluster_time, start_at, timestamp
from drsm_agent.store.cursor import OPTIONS, plain, raw_cursor
from drsm_agent.store.faults import DRIVER_ERRORS, answering
from drsm_agent.store.spaces import FOLLOWED, UNFOLLOWED, space_of
from drsm_agent.store.tls import TlsFiles
from drsm_agent.store.url import check_options

APP_NAME = "drsm-agent"
OPERATION_SECONDS = 5.0  # longer than a planned election, shorter than a pod's patience with a request
HEARTBEAT_MS = 10_000  # between two looks at each server, as is the driver's default
CONNECTIONS = 10  # Motor's threads are no more on two cores; one of them is the change stream's
READ_BATCH = 1000  # documents: a batch keeps the event loop for some 10 ms
SNAPSHOT_ATTEMPTS = 5  # a collection made since the snapshot's time cannot be read at it, only at a later one
DUPLICATE_KEY, SNAPSHOT_UNAVAILABLE = 11000, 246
SYSTEM = {"admin", "config", "local"}
DATABASES_MAX = 1000  # that are looked into for a Go fleet; a read each, within one time-out for all
A_CHUNK = {"_id": {"$gte": "chunkid-", "$lt": "chunkid."}}  # a range of the index on _id
OF_GO = {"type": {"$in": ["chunk", "keepalive"]}, "drsm": None}

log = structlog.get_logger("drsm_agent.store")
_Operation = InsertOne[Document] | UpdateOne | UpdateMany | DeleteOne


class MongoStore:
    """The `Store` port. `pools` names each pool's database; `options` are the driver's (TLS, credentials)."""

    def __init__(
        self,
        url: str,
        database: str,
        pools: Mapping[str, str],
        *,
        timeout: float = OPERATION_SECONDS,
        **options: Any,
    ) -> None:
        self._timeout = timeout
        self._hosts = check.hosts_of(url)
        if overridden := check_options(url):
            log.info("mongodb_options_overridden", options=overridden)
        try:
            self._client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
                url, **{**options, **client_options(timeout)}
            )
        except (*DRIVER_ERRORS, ValueError, TypeError) as error:
            raise Misconfigured(check.malformed(url, error)) from error
        given = self._client.delegate.options
        self._tls = TlsFiles(given.pool_options._ssl_context, given._options, time.monotonic)
        followed = dict.fromkeys(FOLLOWED, database) | dict(pools)
        self._followed = tuple(followed)
        self._databases = dict.fromkeys(UNFOLLOWED, database) | followed
        names = {(name, space): space for space, name in followed.items()}
        self._stream = ChangeStream(self._client, database, names, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def check(self) -> None:
        """Raise Misconfigured unless this MongoDB can do, and lets us do, what the agent needs of it."""
        self._tls.look()
        await check.check_deployment(self._client, self._hosts)
        with check.refused_at_once(self._hosts):
            for space in self._databases:
                await self.write([Delete(space, {"_id": check.NO_SUCH_ID})])
            await self._try_inserts()
            with self._answering("a read at a cluster time"):
                at = await self._snapshot_time()
            async with aclosing(self.changes(after=at)) as batches:
                await anext(batches)

    async def _try_inserts(self) -> None:
        """Insert what the work will, and take it back: a rule of the database may not let it in. In a
        transaction, so that nobody ever sees it."""
        what = "inserts into the agent's collections"
        with self._answering(what), pymongo.timeout(self._timeout):
            async with await self._client.start_session() as session, session.start_transaction():
                for space in self._databases:
                    for document in check.samples(space):
                        await self._collection(space).insert_one(document, session=session)
                await session.abort_transaction()

    async def write(self, writes: Sequence[Write]) -> Outcome:
        if not writes:
            return Outcome(changed=0)
        space = space_of(writes, self._databases)
        operations = [_operation(write) for write in writes]
        with self._answering(f"{len(writes)} writes to {space}"), pymongo.timeout(self._timeout):
            try:
                result = await self._collection(space).bulk_write(operations, ordered=False)
            except BulkWriteError as error:
                return _partly(error)
        return _outcome(result.bulk_api_result)

    async def read(self, space: str) -> list[Document]:
        with self._answering(f"a read of {space}"), pymongo.timeout(self._timeout):
            documents = await self._collection(space).find().to_list(None)
        return [plain(document) for document in documents]

    async def snapshot(self) -> Snapshot:
        with self._answering("a snapshot"):
            for _ in range(SNAPSHOT_ATTEMPTS - 1):
                try:
                    return await self._snapshot()
                except OperationFailure as error:
                    if error.code != SNAPSHOT_UNAVAILABLE:
                        raise
            return await self._snapshot()

    async def ttl(self, space: str) -> int | None:
        with self._answering(f"the indexes of {space}"), pymongo.timeout(self._timeout):
            indexes = await self._collection(space).index_information()
        after = [i["expireAfterSeconds"] for i in indexes.values() if _is_ttl(i)]
        return int(after[0]) if after else None

    async def has_chunks(self, space: str, database: str | None = None) -> bool:
        collection = self._client[database or self._databases[space]][space]
        with self._answering(f"a look at {space}"), pymongo.timeout(self._timeout):
            return await collection.find_one(A_CHUNK, {"_id": 1}) is not None

    async def has_go(self, space: str) -> bool:
        with self._answering(f"a look at {space}"), pymongo.timeout(self._timeout):
            return await self._collection(space).find_one(OF_GO, {"_id": 1}) is not None

    async def elsewhere(self, spaces: Sequence[str]) -> dict[str, list[str]]:
        """Not being allowed to look is no fault, nor that it takes long."""
        found: dict[str, list[str]] = {}
        with suppress(*DRIVER_ERRORS, StoreUnavailable), pymongo.timeout(self._timeout):
            listed = await self._client.admin.command(
                {"listDatabases": 1, "nameOnly": True, "authorizedDatabases": True}
            )
            names = sorted({database["name"] for database in listed["databases"]} - SYSTEM)[:DATABASES_MAX]
            for space, name in product(spaces, names):
                if name != self._databases[space]:
                    with suppress(StoreUnavailable):
                        if await self.has_chunks(space, name):
                            found.setdefault(space, []).append(name)
        return found

    def changes(self, *, after: int | None = None, token: str | None = None) -> AsyncGenerator[Batch, None]:
        self._tls.look()
        return self._stream.batches(start_at(after, token))

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)  # it tells the server and waits for that

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        self._tls.look()
        with answering(what):
            yield

    def _collection(self, space: str) -> AsyncIOMotorCollection[Document]:
        return self._client[self._databases[space]].get_collection(space, codec_options=OPTIONS)

    async def _snapshot(self) -> Snapshot:
        at = await self._snapshot_time()
        return Snapshot(at, {space: await self._read_at(at, space) for space in self._followed})

    async def _snapshot_time(self) -> int:
        """A cluster time that a majority has; all collections are then read at it."""
        command = {"find": STAMPS, "limit": 1, "readConcern": {"level": "snapshot"}}
        async with raw_cursor(self._client[self._databases[STAMPS]], command, self._timeout) as cursor:
            return cluster_time(cursor.at)

    async def _read_at(self, at: int, space: str) -> list[Document]:
        concern = {"level": "snapshot", "atClusterTime": timestamp(at)}
        command = {"find": space, "batchSize": READ_BATCH, "readConcern": concern}
        async with raw_cursor(self._client[self._databases[space]], command, self._timeout) as cursor:
            documents = [plain(document) for document in cursor.batch]
            while cursor.alive:
                await cursor.more(READ_BATCH)
                documents += [plain(document) for document in cursor.batch]
        return documents


def _is_ttl(index: Mapping[str, Any]) -> bool:
    """Of part of the documents is of none that matters."""
    whole = "expireAfterSeconds" in index and "partialFilterExpression" not in index
    return whole and [name for name, _ in index["key"]] == ["expireAt"]


def client_options(timeout: float) -> Document:
    """Above anything that the URL says: the guarantees rest on them."""
    milliseconds = int(timeout * 1000)
    return {
        "appname": APP_NAME,
        "w": "majority",
        "journal": True,
        "readConcernLevel": "majority",
        "readPreference": "primary",
        "retryWrites": True,
        "retryReads": True,
        "maxPoolSize": CONNECTIONS,
        "serverSelectionTimeoutMS": milliseconds,
        "connectTimeoutMS": milliseconds,
        "socketTimeoutMS": milliseconds,
        "waitQueueTimeoutMS": milliseconds,
        "timeoutMS": 0,  # set per operation: see cursor.py
        "wTimeoutMS": 0,
        "minPoolSize": 0,
        "heartbeatFrequencyMS": HEARTBEAT_MS,
        "directConnection": False,  # or the agent stays with one server when another one becomes the primary
        "connect": False,
        "tz_aware": OPTIONS.tz_aware,
        "unicode_decode_error_handler": OPTIONS.unicode_decode_error_handler,
        "datetime_conversion": "DATETIME_CLAMP",
        "uuidRepresentation": "unspecified",
        "server_selector": one_router,
    }


def one_router(servers: list[ServerDescription]) -> list[ServerDescription]:
    """Of several mongos always the same: a cursor lives in the one that opened it, and the commands of
    `cursor.py` do not say to which they belong."""
    routers = [server for server in servers if server.server_type_name == "Mongos"]
    return [min(routers, key=lambda server: server.address)] if routers else servers


def _operation(write: Write) -> _Operation:
    match write:
        case Insert():
            return InsertOne(write.document)
        case Delete():
            return DeleteOne(write.where)
        case Update():
            operators = {"$set": write.set, "$addToSet": write.add_to_set, "$inc": write.inc}
            update = {operator: fields for operator, fields in operators.items() if fields}
            return UpdateMany(write.where, update) if write.many else UpdateOne(write.where, update)


def _partly(error: BulkWriteError) -> Outcome:
    """The outcome when nothing but taken `_id`s went wrong; otherwise it is unknown."""
    details = error.details
    faults = [fault for fault in details["writeErrors"] if fault["code"] != DUPLICATE_KEY]
    faults += details["writeConcernErrors"]
    if faults:
        found = f"{len(faults)} faults, the first: {faults[0].get('errmsg')}"
        raise OperationFailure(found, faults[0].get("code")) from error
    return _outcome(details)


def _outcome(result: Mapping[str, Any]) -> Outcome:
    changed = result["nInserted"] + result["nModified"] + result["nRemoved"]
    return Outcome(changed, frozenset(fault["index"] for fault in result["writeErrors"]))
