"""Making single mongods a replica set, and waiting until it is one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import PyMongoError

from drsm_agent.store.faults import reason

READY_SECONDS = 60.0
POLL_SECONDS = 0.02
SELECTION_MS = 500  # what is waited for here comes soon, so the driver shall look again soon
HEARTBEATS_PER_ELECTION_TIMEOUT = 5
PRIMARY, SECONDARY = 1, 2  # member states of replSetGetStatus
ALREADY_INITIALIZED = 23

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


async def ensure(hosts: Sequence[str], name: str, election_timeout_ms: int, timeout: float) -> str:
    """Have the mongods at these `host:port` be one replica set with a primary, and say which that is.

    They may still be starting, or be one already; then a member may be down. Raises TimeoutError, or
    ValueError when they are one with other members.
    """
    async with _client(f"mongodb://{','.join(hosts)}/?replicaSet={name}") as client:

        async def led() -> dict[str, Any] | None:
            formed, hello = await asyncio.gather(
                initiate(hosts, name, election_timeout_ms),
                client.admin.command("hello"),
                return_exceptions=True,
            )
            if isinstance(hello, dict):  # it is a set, whichever member is down
                return hello if hello.get("isWritablePrimary") else None
            if isinstance(formed, BaseException) and getattr(formed, "code", None) != ALREADY_INITIALIZED:
                raise formed  # also while another member cannot be reached yet
            raise hello

        hello = await _until(led, timeout, f"{', '.join(hosts)} to be the replica set {name} with a primary")
    if set(hello["hosts"]) != set(hosts):
        raise ValueError(
            f"Expected the replica set {name} to have the members {', '.join(hosts)}, found "
            f"{', '.join(sorted(hello['hosts']))}: name these, or change the set (rs.reconfig() in mongosh)"
        )
    return str(hello["me"])


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
        told = reason(last) if last is not None else "none"
        raise TimeoutError(f"Waited {timeout:.3g} s in vain for {what}. The last error: {told}") from last


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Client]:
    client: Client = AsyncIOMotorClient(url, serverSelectionTimeoutMS=SELECTION_MS)
    try:
        yield client
    finally:
        client.close()
