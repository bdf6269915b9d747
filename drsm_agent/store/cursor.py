"""A MongoDB cursor read by its commands, batch by batch.

Motor's own cursors cost a thread hop per document or hide where a batch ends, and its change stream
hides the token of an idle batch. The commands show all of it. They go to one session, as MongoDB wants
of the commands of one cursor.

The driver's own time limit (`pymongo.timeout`) is no use here: it overwrites a `getMore`'s `maxTimeMS`,
which is how long to wait for news. So the event loop holds the limit, and the client's socket time-out
frees the thread.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pymongo
from bson import CodecOptions, DatetimeConversion, Int64, Timestamp
from motor.motor_asyncio import AsyncIOMotorClientSession, AsyncIOMotorDatabase
from pymongo.errors import NetworkTimeout

from drsm_agent.core.documents import Document
from drsm_agent.store.faults import DRIVER_ERRORS

# Go pods write these collections too, and Go's driver sends any bytes as text: one odd document must
# not stop the stream at its place for ever.
OPTIONS: CodecOptions[Document] = CodecOptions(
    tz_aware=True,
    unicode_decode_error_handler="replace",
    datetime_conversion=DatetimeConversion.DATETIME_CLAMP,
)
KILL_SECONDS = 1.0  # to free a cursor on the way out; the server does it by itself after ten minutes

Database = AsyncIOMotorDatabase[Document]


class RawCursor:
    """`batch` is the last one read; `token` resumes a change stream right after it, `at` is the
    cluster time that a snapshot read was made at."""

    def __init__(self, database: Database, session: AsyncIOMotorClientSession, timeout: float) -> None:
        self._database = database
        self._session = session
        self._timeout = timeout
        self._id = 0
        self._collection = ""
        self.batch: list[Document] = []
        self.token = ""
        self.at = Timestamp(0, 0)

    @property
    def alive(self) -> bool:
        """Whether there may be more."""
        return self._id != 0

    async def open(self, command: Document) -> None:
        """Send the command that makes the cursor; its first batch comes with the answer."""
        self._take(await self._command(command, self._timeout), "firstBatch")

    async def more(self, size: int, wait_ms: int | None = None) -> None:
        """Read the next batch; of a change stream after waiting at most `wait_ms` for news."""
        command: Document = {"getMore": self._id, "collection": self._collection, "batchSize": size}
        limit = self._timeout
        if wait_ms is not None:
            command["maxTimeMS"] = wait_ms
            limit += wait_ms / 1000
        try:
            reply = await self._command(command, limit)
        except DRIVER_ERRORS:
            self._id = 0  # gone or out of reach: nothing is left to kill
            raise
        self._take(reply, "nextBatch")

    async def kill(self) -> None:
        """Free what the server keeps for it, as far as that is possible just now."""
        if self.alive:
            with suppress(*DRIVER_ERRORS), pymongo.timeout(KILL_SECONDS):
                await self._database.command({"killCursors": self._collection, "cursors": [Int64(self._id)]})

    async def _command(self, command: Document, limit: float) -> Document:
        try:
            async with asyncio.timeout(limit):
                return await self._database.command(command, session=self._session, codec_options=OPTIONS)
        except TimeoutError as error:
            raise NetworkTimeout(f"no answer within {limit:g} s") from error

    def _take(self, reply: Document, batch: str) -> None:
        cursor = reply["cursor"]
        self._id = Int64(cursor["id"])
        self._collection = cursor["ns"].partition(".")[2]
        self.batch = cursor[batch]
        # A collection that does not exist is read at no time; then the time of the answer will do.
        self.at = cursor.get("atClusterTime") or reply.get("operationTime") or self.at
        self.token = cursor.get("postBatchResumeToken", {}).get("_data", "")


@asynccontextmanager
async def raw_cursor(database: Database, command: Document, timeout: float) -> AsyncIterator[RawCursor]:
    """An open cursor, gone at the end; every command to it is answered or fails within `timeout` seconds
    (and the time it waits for news)."""
    async with await database.client.start_session(causal_consistency=False) as session:
        cursor = RawCursor(database, session, timeout)
        await cursor.open(command)
        try:
            yield cursor
        finally:
            await cursor.kill()


def plain(value: Any) -> Any:
    """`value` without the driver's own types, which nothing outside the store knows."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, Int64) else value
