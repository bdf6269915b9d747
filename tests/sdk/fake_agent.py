"""A small scripted agent on a real NATS server: it answers as the protocol says, unless told otherwise."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from drsm_sdk.ambient import boottime
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.checksum import MODULUS, holding, ownership
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects

POOL = "amfid"
OTHER = wire.OwnerRef("other", "10.0.0.9", "o", 1)
SILENCE = object()
"""What a script returns for "no answer"."""

Script = Callable[[str, dict[str, Any]], Any]


class SkippingClock:
    """The machine's clock, but a test can let hours pass."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.broken = False

    def __call__(self) -> float:
        if self.broken:
            raise RuntimeError("the clock is broken")
        return boottime() + self.skipped


@dataclass(slots=True)
class Row:
    owner: wire.OwnerRef
    grant: str
    hold_ms: int | None = None


class FakeAgent:
    """One pool, kept in memory. `script` may answer a request in place of the agent: with a message, a
    Failure, SILENCE, or None for "as usual"."""

    def __init__(self, client: Client, subjects: Subjects, definition: Definition) -> None:
        self.client, self.subjects, self.definition = client, subjects, definition
        self.stamp = wire.Stamp("fake", 1, "h1")
        self.chunks: dict[int, Row] = {}
        self.sessions: dict[int, wire.OwnerRef] = {}
        self.by_request: dict[str, int] = {}
        self.granted: dict[str, list[int]] = {}
        self.live: set[wire.OwnerRef] = set()
        self.lost: dict[int, str] = {}
        self.version = 1
        self.capacity = definition.capacity
        self.durations = (3_000, 300_000, 50)
        self.give_back: dict[str, int] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.script: Script = lambda verb, body: None
        self.news = asyncio.Event()
        self._grants = 0
        self._incarnations = 0

    # --- requests -------------------------------------------------------------------------------

    async def serve(self, msg: Msg) -> None:
        route = self.subjects.route(msg.subject)
        assert route is not None
        body = codec.decode(msg.data)
        self.requests.append((route.verb, body))
        self.news.set()
        answer = self.script(route.verb, body)
        if answer is SILENCE:
            return
        if answer is None:
            answer = await self.answer(route.verb, body)
        await self.reply(msg, answer)

    async def reply(self, msg: Msg, answer: Any) -> None:
        stamp = codec.to_map(self.stamp)
        for part in answer if isinstance(answer, list) else [answer]:
            if part == b"":
                await self.client.publish(msg.reply, b"")
                continue
            headers = {"Content-Type": wire.CONTENT_TYPE}
            if isinstance(part, wire.Failure):
                headers |= {wire.ERROR_CODE_HEADER: str(part.code), wire.ERROR_HEADER: part.message}
            data = codec.encode(stamp | codec.to_map(part))
            await self.client.publish(msg.reply, data, headers=headers)

    async def answer(self, verb: str, body: dict[str, Any]) -> Any:  # noqa: C901, PLR0911
        incarnation = body.get("incarnation")
        if incarnation in self.lost and verb != "session.close":
            return wire.Failure("session_lost", "over", self.lost[incarnation])
        match verb:
            case "session.open":
                return self.open(codec.from_map(wire.Open, body))
            case "session.join":
                return wire.Joined((self.definition,)) if body["pools"] == [POOL] else self.unknown()
            case "session.renew":
                await self.activate(body["incarnation"])
                return wire.Renewed(*self.durations, {POOL: self.held(body["incarnation"])}, self.give_back)
            case "session.chunks":
                return self.listed(body["incarnation"])
            case "session.report":
                return wire.Reported(len(body["chunks"]))
            case "session.close":
                return wire.Empty()
            case "acquire":
                return await self.acquire(codec.from_map(wire.Acquire, body))
            case "release":
                return await self.release(codec.from_map(wire.ChunkList, body))
            case "scanned":
                return await self.scanned(codec.from_map(wire.ChunkList, body))
            case "snapshot":
                return [self.page(), b""]
        raise AssertionError(verb)

    def open(self, request: wire.Open) -> Any:
        if any(pool != POOL for pool in request.pools):
            return self.unknown()
        incarnation = self.by_request.get(request.request_id)
        if incarnation is None:
            self._incarnations += 1
            incarnation = self.by_request[request.request_id] = self.stamp.term << 32 | self._incarnations
            pod = request.pod
            self.sessions[incarnation] = wire.OwnerRef(pod.name, pod.ip, pod.instance, incarnation)
        return wire.Opened(incarnation, (self.definition,) if request.pools else (), *self.durations)

    def unknown(self) -> wire.Failure:
        return wire.Failure("unknown_pool", "no such pool")

    async def activate(self, incarnation: int) -> None:
        owner = self.sessions[incarnation]
        if owner not in self.live:
            self.live.add(owner)
            await self.event(wire.PodUp(owner))

    async def acquire(self, request: wire.Acquire) -> Any:
        numbers = self.granted.get(request.request_id)
        if numbers is None:
            free = [n for n in range(self.capacity) if n not in self.chunks][: request.count]
            if not free:
                return wire.Failure("pool_exhausted", "not one chunk is free")
            numbers = self.granted[request.request_id] = free
            await self.give(self.sessions[request.incarnation], *free)
        return wire.Acquired(tuple((n, self.chunks[n].grant) for n in numbers), (self.version, 0))

    async def release(self, request: wire.ChunkList) -> Any:
        released = []
        for n, grant in request.chunks:
            row = self.chunks.get(n)
            if row is not None and row.grant == grant:
                del self.chunks[n]
                await self.event(wire.ChunkReleased(row.owner, (n,)))
            released.append(n)
        return wire.Released(tuple(released))

    async def scanned(self, request: wire.ChunkList) -> Any:
        cleared = [n for n, grant in request.chunks if n in self.chunks and self.chunks[n].grant == grant]
        for n in cleared:
            self.chunks[n].hold_ms = None
            await self.event(wire.ChunkScanned(self.chunks[n].owner, (n,)))
        return wire.Cleared(tuple(cleared))

    # --- what happens ---------------------------------------------------------------------------

    def grant(self) -> str:
        self._grants += 1
        return f"{self._grants:016x}"

    def put(self, owner: wire.OwnerRef, *numbers: int, hold_ms: int | None = None) -> None:
        """Without telling anybody, but as a change that has a version."""
        for n in numbers:
            self.chunks[n] = Row(owner, self.grant(), hold_ms)
        self.version += 1

    async def give(self, owner: wire.OwnerRef, *numbers: int) -> None:
        for n in numbers:
            self.chunks[n] = Row(owner, self.grant())
        await self.event(wire.ChunkAllocated(owner, numbers))

    async def claim(self, owner: wire.OwnerRef, *numbers: int, hold_ms: int) -> None:
        previous = self.chunks[numbers[0]].owner
        for n in numbers:
            self.chunks[n] = Row(owner, self.grant(), hold_ms)
        grants = tuple(self.chunks[n].grant for n in numbers)
        await self.event(wire.ChunkClaimed(owner, previous, numbers, grants, hold_ms))

    async def event(self, body: wire.EventBody, *, lost: bool = False) -> wire.EventHead:
        self.version += 1
        head = self.head(prev=self.version - 1)
        if not lost:
            await self.publish(head, body)
        return head

    async def sync(self) -> None:
        said = sum(ownership(n, row.owner.name, row.owner.incarnation) for n, row in self.chunks.items())
        await self.publish(
            self.head(prev=self.version), wire.Sync(len(self.live), len(self.chunks), said % MODULUS)
        )

    async def reset(self, history: str) -> None:
        self.stamp = replace(self.stamp, history=history, term=self.stamp.term + 1)
        await self.event(wire.Reset("restored"))

    def head(self, *, prev: int) -> wire.EventHead:
        stamp = self.stamp
        return wire.EventHead(POOL, (self.version, 0), (prev, 0), stamp.agent, stamp.term, stamp.history, 0)

    async def publish(self, head: wire.EventHead, body: wire.EventBody) -> None:
        subject = self.subjects.event(POOL, wire.EVENT_VERBS[type(body)])
        await self.client.publish(subject, codec.encode(codec.to_map(head) | codec.to_map(body)))
        await self.client.flush()

    # --- what is ----------------------------------------------------------------------------------

    def owned(self, incarnation: int) -> dict[int, Row]:
        return {n: row for n, row in self.chunks.items() if row.owner.incarnation == incarnation}

    def held(self, incarnation: int) -> tuple[int, int]:
        owned = self.owned(incarnation)
        said = sum(holding(n, row.grant, marked=row.hold_ms is not None) for n, row in owned.items())
        return len(owned), said % MODULUS

    def listed(self, incarnation: int) -> wire.SessionChunks:
        rows = self.owned(incarnation).items()
        return wire.SessionChunks(
            tuple((POOL, n, row.grant, row.hold_ms) for n, row in rows), {POOL: (self.version, 0)}
        )

    def page(self) -> wire.SnapshotPage:
        owners = [
            *self.live,
            *{row.owner: None for row in self.chunks.values() if row.owner not in self.live},
        ]
        return wire.SnapshotPage(
            version=(self.version, 0),
            page=0,
            owners=tuple(
                wire.SnapshotOwner(
                    o.name, o.ip, o.instance, o.incarnation, "live" if o in self.live else "down"
                )
                for o in owners
            ),
            chunks=tuple((owners.index(row.owner), (n,)) for n, row in self.chunks.items()),
            definition=self.definition,
            last=True,
        )

    # --- for tests --------------------------------------------------------------------------------

    def asked(self, verb: str) -> list[dict[str, Any]]:
        return [body for said, body in self.requests if said == verb]

    async def until_asked(self, verb: str, times: int = 1) -> list[dict[str, Any]]:
        async with asyncio.timeout(10):
            while len(found := self.asked(verb)) < times:
                self.news.clear()
                await self.news.wait()
        return found


@asynccontextmanager
async def fake_agent(
    nats_url: str, prefix: str, definition: Definition | None = None
) -> AsyncIterator[FakeAgent]:
    client = await nats.connect(nats_url)
    try:
        agent = FakeAgent(
            client, Subjects(prefix), definition or Definition(name=POOL, block_bits=4, slots=10)
        )
        await client.subscribe(agent.subjects.all_requests, cb=agent.serve)
        await client.flush()
        yield agent
    finally:
        await client.close()


async def eventually(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `holds` says so."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
