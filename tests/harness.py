"""What the tests of the running whole share: an agent beside the real servers, and a bare requester.

Agents run in the test's own process unless a test is about processes; servers never do.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from pymongo import AsyncMongoClient

from drsm_agent import settings
from drsm_agent.service import Agent, running
from drsm_sdk import Demux
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects

T = TypeVar("T")
POOL = "amfid"
SEEN_SECONDS = 20.0
"""How long a test waits for what must happen; a bound against hanging, not a measurement."""
PROCESS_SECONDS = 60.0
"""The same for one that has to start first: Python alone takes seconds where many start at once."""
TRY_SECONDS = 5.0
"""How long one request of a test waits for its answer, before it is sent again."""
RENEWAL_SECONDS = 1.0
"""How long a renewal waits, below the smallest `L`: one that a falling leader has heard is not answered."""
ONE_LEAD: dict[str, Any] = {"leader_ttl": 60.0}
"""For an agent whose test counts what one lead does: it is not lost when the machine stands still for a
while, and so nothing is told twice. Who ends well gives it up, so that the next one need not wait."""
NONE_EXPIRES: dict[str, Any] = {"liveness_ttl": 60.0, "allocation_ttl": 300.0}
"""For an agent whose test opens sessions that nobody renews, and wants none of them to end by itself."""
UNHURRIED: dict[str, Any] = ONE_LEAD | {"liveness_ttl": 20.0}
"""Leases of a test that is not about them: a machine that stands still ends neither lead nor session."""


@dataclass(frozen=True, slots=True)
class Domain:
    """A test's own domain on the shared servers: its database and its subject prefix."""

    mongo_url: str
    nats_url: str
    database: str
    prefix: str

    def settings(self, **overrides: Any) -> settings.Settings:
        """Settings of an agent: one pool `amfid`, and no HTTP port unless asked for."""
        given: dict[str, Any] = {
            "mongo_url": self.mongo_url,
            "nats_url": self.nats_url,
            "mongo_database": self.database,
            "subject_prefix": self.prefix,
            "pools": [{"name": POOL}],
            "http_port": 0,
        }
        return settings.load(**(given | overrides))

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables, for an agent as a process of its own."""
        return {
            "DRSM_MONGO_URL": self.mongo_url,
            "DRSM_NATS_URL": self.nats_url,
            "DRSM_MONGO_DATABASE": self.database,
            "DRSM_SUBJECT_PREFIX": self.prefix,
            "DRSM_POOLS": f'[{{"name": "{POOL}"}}]',
            "DRSM_HTTP_PORT": "0",
        }

    def agent(self, **overrides: Any) -> AbstractAsyncContextManager[Agent]:
        """An agent that leads and serves."""
        return leading(self.settings(**overrides))

    @asynccontextmanager
    async def served(self, **overrides: Any) -> AsyncIterator["Requester"]:
        """A requester that has recorded every event since before the agent began to lead."""
        async with requester(self.nats_url, self.prefix) as asking, self.agent(**overrides):
            yield asking


@asynccontextmanager
async def leading(configured: settings.Settings) -> AsyncIterator[Agent]:
    """An agent that leads and serves."""
    async with running(configured) as agent:
        await within(agent.leader.leading.wait())
        yield agent


async def within(awaitable: Any, seconds: float = SEEN_SECONDS) -> Any:
    """The awaited value, or a failed test."""
    async with asyncio.timeout(seconds):
        return await awaitable


async def eventually(condition: Callable[[], object], seconds: float = SEEN_SECONDS) -> None:
    """Wait for what no event tells: looks again each time the loop has had a turn."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Requester:
    """Bare requests and a record of every event, as another language's client would see them."""

    def __init__(self, client: Client, subjects: Subjects) -> None:
        self.client, self.subjects = client, subjects
        self.events: list[tuple[m.EventHead, m.EventBody]] = []
        self.raw: list[Msg] = []
        self._told: list[m.EventBody] = []
        self._held: dict[str, m.Version] = {}
        self._news = asyncio.Event()

    async def ask(self, subject: str, message: Any, kind: type[T], timeout: float | None = None) -> T:
        """The answer as a message of `kind`; raises Failed for an error answer. Without `timeout` it asks as
        every client must, again while there is no answer: when the lead changes nobody gives one."""
        data = codec.encode(codec.to_map(message))
        if timeout is not None:
            return self._answer(await self.client.request(subject, data, timeout=timeout), kind)
        async with asyncio.timeout(SEEN_SECONDS):
            while True:
                try:
                    return self._answer(await self.client.request(subject, data, timeout=TRY_SECONDS), kind)
                except NatsTimeout:
                    pass
                except NoRespondersError:
                    await asyncio.sleep(0.05)

    @staticmethod
    def _answer(reply: Msg, kind: type[T]) -> T:
        if reply.headers and m.ERROR_HEADER in reply.headers:
            raise Failed(codec.unpack(m.Failure, reply.data), reply)
        return codec.unpack(kind, reply.data)

    async def open(
        self,
        name: str,
        *,
        request_id: str = "",
        pools: tuple[str, ...] = (POOL,),
        timeout: float | None = None,
    ) -> m.Opened:
        request = m.Open(m.PodRef(name, "10.0.0.1", "i"), pools, request_id or f"open-{name}")
        return await self.ask(self.subjects.session("open"), request, m.Opened, timeout)

    async def renew(self, name: str, incarnation: int, *, timeout: float | None = None) -> m.Renewed:
        request = m.Renew(name, incarnation)
        return await self.ask(self.subjects.session("renew"), request, m.Renewed, timeout)

    async def acquire(
        self,
        name: str,
        incarnation: int,
        count: int = 1,
        request_id: str = "a",
        pool: str = POOL,
        *,
        timeout: float | None = None,
    ) -> m.Acquired:
        request = m.Acquire(name, incarnation, count, request_id)
        return await self.ask(self.subjects.pool(pool, "acquire"), request, m.Acquired, timeout)

    async def snapshot(self, pool: str = POOL) -> list[m.SnapshotPage]:
        """All pages of a snapshot, its end awaited."""
        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox)
        await self.client.publish(self.subjects.pool(pool, "snapshot"), b"", reply=inbox)
        pages = []
        while "pages" not in codec.decode(data := (await subscription.next_msg(timeout=SEEN_SECONDS)).data):
            pages.append(codec.unpack(m.SnapshotPage, data))
        await subscription.unsubscribe()
        return pages

    async def seen(self, found: Callable[[], T | bool | None], seconds: float = SEEN_SECONDS) -> T:
        """Wait until `found` says so, looking again at every event."""
        async with asyncio.timeout(seconds):
            while not (value := found()):
                self._news.clear()
                await self._news.wait()
        return value  # type: ignore[return-value]

    def of(self, kind: type[T]) -> list[T]:
        """The events of a kind, each once: what was not confirmed in time is published again."""
        return [body for body in self._told if isinstance(body, kind)]

    async def note(self, message: Msg) -> None:
        head = codec.unpack(m.EventHead, message.data)
        kind = m.EVENT_KINDS[self.subjects.event_verb(message.subject)]
        body = codec.unpack(kind, message.data)
        self.events.append((head, body))
        self.raw.append(message)
        if isinstance(body, m.Sync | m.Reset):
            self._told.append(body)
        elif head.version > self._held.get(head.history, (0, 0)):
            self._held[head.history] = head.version
            self._told.append(body)
        self._news.set()


class Failed(Exception):
    """An error answer."""

    def __init__(self, failure: m.Failure, reply: Msg) -> None:
        super().__init__(f"{failure.error}: {failure.message}")
        self.failure, self.reply = failure, reply


@asynccontextmanager
async def requester(nats_url: str, prefix: str, pool: str = POOL) -> AsyncIterator[Requester]:
    """A connected requester that records all events of one pool."""
    client = await nats.connect(nats_url)
    try:
        asking = Requester(client, Subjects(prefix))
        await client.subscribe(asking.subjects.events(pool), cb=asking.note)
        await client.flush()
        yield asking
    finally:
        await client.close()


@asynccontextmanager
async def renewing(asking: Requester, *pods: tuple[str, int]) -> AsyncIterator[None]:
    """Keep sessions of bare requesters alive."""

    async def renew(pod: tuple[str, int]) -> None:
        with suppress(NatsTimeout, NoRespondersError, Failed):  # the next one may do better
            await asking.renew(*pod, timeout=RENEWAL_SECONDS)

    async def renew_all() -> None:
        while True:
            await asyncio.gather(*[renew(pod) for pod in pods])
            await asyncio.sleep(0.5)

    task = asyncio.create_task(renew_all())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def demuxes_equal_mongodb(domain: Domain, *demuxes: Demux) -> None:
    """Wait until each is synced and has MongoDB's table, chunk for chunk. It is read each time anew: pods
    go on taking chunks, as their stock grows with their rate."""
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            table = await mongo_table(domain)
            if all(demux.synced and routed(demux) == table for demux in demuxes):
                return


def routed(demux: Demux) -> dict[int, tuple[str, int]]:
    """Whom a demux takes for the owner of which chunk."""
    return {n: owner.key for n, owner in demux.chunks().items()}


async def mongo_table(domain: Domain, pool: str = POOL) -> dict[int, tuple[str, int]]:
    """Who owns which chunk, read from MongoDB itself; incarnation 0 is a Go pod."""
    async with mongo_client(domain) as client:
        chunks = client[domain.database][pool].find({"type": "chunk"})
        return {
            int(chunk["_id"].removeprefix("chunkid-")): (
                chunk["podId"],
                int(chunk.get("drsm", {}).get("incarnation", 0)),
            )
            async for chunk in chunks
        }


@asynccontextmanager
async def mongo_client(domain: Domain) -> AsyncIterator[AsyncMongoClient[dict[str, Any]]]:
    """MongoDB without the agent: as Go pods and operators see it."""
    async with AsyncMongoClient[dict[str, Any]](domain.mongo_url) as client:
        yield client


async def raw(nats_url: str, *packets: bytes) -> None:
    """Bytes on NATS as no client library would send them; returns when the server has them."""
    host, port = nats_url.removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n')
        for packet in packets:
            writer.write(packet)
        writer.write(b"PING\r\n")
        while b"PONG" not in (line := await within(reader.readline())):
            assert line, "the server hung up"
    finally:
        writer.close()


def unreadable(subject: str) -> dict[str, bytes]:
    """Messages that nats-py raises over in its read loop."""
    return {
        "subject": f"PUB {subject}".encode() + b"\xff\xfe 0\r\n\r\n",
        "reply": f"PUB {subject} ".encode() + b"\xff\xfe 0\r\n\r\n",
        "no headers": f"HPUB {subject} 8 8\r\nNATS/1.0\r\n".encode(),
        "status": f"HPUB {subject} 17 17\r\nNATS/1.0 ".encode() + b"\xff\xff\xff\xff\r\n\r\n\r\n",
        "header": f"HPUB {subject} 20 20\r\nNATS/1.0\r\n".encode() + b"\xff: \xff\xff\xff\r\n\r\n\r\n",
    }
