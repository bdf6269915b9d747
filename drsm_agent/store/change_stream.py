"""The change stream: raw events of the followed collections to the core's `Change`.

It reads one cursor to its end, and tells how that ended: what can never go on from there, what may later,
and what a person has to mend are told apart by MongoDB's error code and by the event (a drop, a rename). The
`$match` lets these events through: a filter that hides them ends a stream silently. Whoever reads opens the
next one where the last broke off (`feed`).
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from bson import Timestamp
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import OperationFailure

from drsm_agent import cancellation
from drsm_agent.core.documents import Document
from drsm_agent.core.table import Change
from drsm_agent.errors import DROPPED, OVER, AgentError, PositionLost
from drsm_agent.ports import Batch
from drsm_agent.store.cursor import Database, plain, raw_cursor
from drsm_agent.store.faults import DRIVER_ERRORS, REMEDIES, code_of, reason, unavailable

BATCH = 1000  # bounds memory and how long the event loop is kept; adds no latency
WAIT_MS = 500  # for news; an idle batch's token is at most this old, and a cancelled wait ends within it

# Errors after which a position is of no use any more (measured and documented ones).
POSITION_DEAD = {
    136: "CappedPositionLost: the stream was read too slowly for the size of the oplog",
    260: "InvalidResumeToken",
    280: "ChangeStreamFatalError",
    286: "ChangeStreamHistoryLost: the oplog does not reach back to the position",
    464: "a shard was removed",
    10334: "a change is larger than MongoDB can send",
}
# What MongoDB says to text that never was a token: FailedToParse, Overflow, InvalidUUID, and the numbered
# assertions of its parsers, 50811 above all, whose only name is `Location<code>`.
NO_TOKEN, NO_TOKEN_NAME = {9, 15, 207}, "Location"

Start = Mapping[str, Any]
Names = Mapping[tuple[str, str], str]


def start_at(after: int | None, token: str | None) -> Start:
    """The options of `$changeStream` that begin right after a cluster time or a token."""
    if (after is None) == (not token):
        raise ValueError(
            "A change stream begins either after a cluster time or after a token: give one of them"
        )
    if after is not None:
        return {"startAtOperationTime": timestamp(after + 1)}
    return {"startAfter": {"_data": token}}  # unlike resumeAfter it also goes on after an invalidate


class ChangeStream:
    """Changes of the collections in `names`, (database, collection) -> space."""

    def __init__(
        self, client: AsyncIOMotorClient[Document], database: str, names: Names, timeout: float
    ) -> None:
        self._names = names
        self._timeout = timeout
        self._everywhere = {name for name, _ in names} != {database}
        self._database: Database = client["admin" if self._everywhere else database]

    async def batches(self, start: Start) -> AsyncGenerator[Batch, None]:
        """Batches until something ends them: raises PositionLost, StoreRefused, StoreUnavailable."""
        try:
            async with aclosing(self._read(start)) as batches:
                async for batch in batches:
                    yield batch
        except DRIVER_ERRORS as error:
            cancellation.heed()
            raise _classified(error) from error

    async def _read(self, start: Start) -> AsyncGenerator[Batch, None]:
        """The batches of one cursor, an empty one whenever WAIT_MS pass without news."""
        command = {"aggregate": 1, "pipeline": self.pipeline(start), "cursor": {"batchSize": BATCH}}
        async with raw_cursor(self._database, command, self._timeout) as cursor:
            while True:
                changes = [read_event(event, self._names) for event in cursor.batch]
                yield Batch(changes, cursor.token)
                if not cursor.alive:
                    text = "MongoDB ended the change stream without a reason; read everything anew"
                    raise PositionLost(text, end=OVER)
                await cursor.more(BATCH, WAIT_MS)

    def pipeline(self, start: Start) -> list[Document]:
        """Only what the followed collections see, and whatever may end them."""
        stage = {**start, "allChangesForCluster": True} if self._everywhere else dict(start)
        collections: dict[str, list[str]] = {}
        for database, collection in sorted(self._names):
            collections.setdefault(database, []).append(collection)
        wanted: list[Document] = [{"operationType": "invalidate"}]
        for database, names in collections.items():
            wanted += [
                {"ns.db": database, "ns.coll": {"$in": names}},
                {"to.db": database, "to.coll": {"$in": names}},
                {"operationType": "dropDatabase", "ns.db": database},
            ]
        return [{"$changeStream": stage}, {"$match": {"$or": wanted}}]


def _classified(error: Exception) -> AgentError:
    """What a driver's error says about the stream."""
    code = code_of(error)
    if dead := _why_dead(error):
        return PositionLost(f"The change stream cannot go on: {dead} ({code}); read everything anew", code)
    return unavailable(error, "the change stream")


def _why_dead(error: Exception) -> str:
    """Why nothing ever goes on from this position; empty if it may."""
    if not isinstance(error, OperationFailure) or error.code is None or error.code in REMEDIES:
        return ""
    name = (error.details or {}).get("codeName", "")
    if error.code in NO_TOKEN or name.startswith(NO_TOKEN_NAME):
        return f"MongoDB does not accept the token: {reason(error)}"
    return POSITION_DEAD.get(error.code, "")


def read_event(event: Document, names: Names) -> Change:
    """A raw event as the core has it; PositionLost for one that ends what was followed."""
    kind = event["operationType"]
    if kind not in {"insert", "replace", "update", "delete"}:
        raise PositionLost(_what_ended(event), end=DROPPED)
    change = {
        "space": names[event["ns"]["db"], event["ns"]["coll"]],
        "key": str(event["documentKey"]["_id"]),
        "at": cluster_time(event["clusterTime"]),
        "token": event["_id"]["_data"],
    }
    if kind == "delete":
        return Change(**change, gone=True)
    if kind == "update":
        return Change(**change, **_delta(event["updateDescription"], change["key"]))
    return Change(**change, document=plain(event["fullDocument"]))


def _delta(update: Document, key: str) -> Document:
    if update.get("truncatedArrays"):  # no write of ours or of Go pods; the new array is not in the event
        raise PositionLost(f"An array in document {key!r} was cut by somebody else; read everything anew")
    return {"updated": plain(update["updatedFields"]), "removed": tuple(update["removedFields"])}


def _what_ended(event: Document) -> str:
    names = [".".join(event[side].values()) for side in ("ns", "to") if side in event]
    where = " to ".join(names) or "the followed database"
    return f"The change stream saw {event['operationType']!r} of {where}; read everything anew"


def timestamp(at: int) -> Timestamp:
    return Timestamp(at >> 32, at & 0xFFFFFFFF)


def cluster_time(timestamp: Timestamp) -> int:
    return timestamp.time << 32 | timestamp.inc
