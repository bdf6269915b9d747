"""Making single mongods a replica set, and waiting until it is one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import PyMongoError

READY_SECONDS = 60.0
POLL_SECONDS = 0.02
SELECTION_MS = 500  # what is waited for here comes soon, so the driver shall look again soon
HEARTBEATS_PER_ELECTION_TIMEOUT = 5
PRIMARY, SECONDARY = 1, 2  # member states of replSetGetStatus

T = TypeVar("T")
Client = AsyncIOMotorClient[dict[str, Any]]


async def initiate(hosts: Sequence[str], name: str, election_timeout_ms: int) -> None:
    """Make the mongods at these `host:port` one replica set; does not wait for a primary."""
    members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
    settings = {
        "electionTimeoutMillis": election_timeout_ms,
        # By heartbeats the members learn of each other's state; the default, 2 s, is made for long distances.
        "heartbeatIntervalMillis": election_timeout_ms // HEARTBEATS_PER_ELECTION_TIMEOUT,
    }
    async with _client(f"mongodb://{hosts[0]}/?directConnection=true") as client:
        await client.admin.command("replSetInitiate", {"_id": name, "members": members, "settings": settings})


async def await_primary(url: str, timeout: float = READY_SECONDS) -> str:
    """Wait until the replica set has a writable primary, and say which (`host:port`)."""
    async with _client(url) as client:

        async def primary() -> str | None:
            hello = await client.admin.command("hello")
            return str(hello["me"]) if hello.get("isWritablePrimary") else None

        return await _until(primary, timeout, f"a writable primary of {url}")


async def await_members(url: str, timeout: float = READY_SECONDS) -> None:
    """Wait until the primary sees every member as primary or secondary."""
    async with _client(url) as client:

        async def whole() -> bool | None:
            status = await client.admin.command("replSetGetStatus")
            return all(member["state"] in {PRIMARY, SECONDARY} for member in status["members"]) or None

        await _until(whole, timeout, f"all members of {url} to be primary or secondary")


async def _until(probe: Callable[[], Awaitable[T | None]], timeout: float, what: str) -> T:
    """Probe until it answers; errors are expected on the way (no primary yet) and told at the timeout."""
    last: PyMongoError | None = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    if (found := await probe()) is not None:
                        return found
                except PyMongoError as error:
                    last = error
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"Waited {timeout:g} s in vain for {what}. The last error: {last}") from last


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Client]:
    client: Client = AsyncIOMotorClient(url, serverSelectionTimeoutMS=SELECTION_MS)
    try:
        yield client
    finally:
        client.close()
