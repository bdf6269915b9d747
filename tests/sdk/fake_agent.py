"""The agent of `drsm_sdk.testing` on a real NATS server, scripted: it answers as the protocol says, unless a
test tells otherwise. It does nothing by itself: no sessions expire, nothing is claimed, no `sync` is sent."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from drsm_sdk.ambient import Chance, boottime
from drsm_sdk.testing.agent import Agent, Refused, Timing
from drsm_sdk.testing.tables import Row, Table
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Route, Subjects

POOL = "amfid"
OTHER = wire.OwnerRef("other", "10.0.0.9", "o", 1)
SILENCE = object()
"""What a script returns for "no answer"."""
SEEN_SECONDS = 20.0
"""How long a test waits for what must happen; a bound against hanging, not a measurement."""
DEADLINE = 3.0
"""A deadline that passes in vain, and tells what was heard until then: a slow machine must hear it, too."""

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


class FakeAgent(Agent):
    """One pool. `script` may answer a request in place of the agent: with a message, several in a list, a
    Failure, SILENCE, or None for "as usual"."""

    def __init__(self, client: Client, subjects: Subjects, definition: Definition) -> None:
        super().__init__(
            subjects,
            [definition],
            lambda subject, data, headers: self._outbox.append((subject, data, dict(headers))),
            timing=Timing(hold=0.0, liveness=30.0, allocation=300.0, renew=0.05),
            clock=boottime,
            chance=Chance(),
        )
        self.lead()
        self.client, self.definition = client, definition
        self.give_back: dict[str, int] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.script: Script = lambda verb, body: None
        self.news = asyncio.Event()
        self._outbox: deque[tuple[str, bytes, dict[str, str]]] = deque()

    @property
    def table(self) -> Table:
        return self.tables[POOL]

    @property
    def chunks(self) -> dict[int, Row]:
        return self.table.rows

    # --- requests -------------------------------------------------------------------------------

    async def hear(self, msg: Msg) -> None:
        route = self.subjects.route(msg.subject)
        assert route is not None
        body = codec.decode(msg.data)
        self.requests.append((route.verb, body))
        self.news.set()
        answer = self.script(route.verb, body)
        if answer is SILENCE:
            return
        if answer is None:
            answer = self._usual(route, body)
        await self._send_events()
        for part in answer if isinstance(answer, list) else [answer]:
            data, headers = self.packed(part)
            await self.client.publish(msg.reply, data, headers=headers or None)

    def _usual(self, route: Route, body: dict[str, Any]) -> Any:
        try:
            return self.answer(route, body)
        except Refused as refused:
            return refused.failure

    def renew(self, request: wire.Renew) -> wire.Renewed:
        return replace(super().renew(request), give_back=self.give_back)

    # --- what happens ---------------------------------------------------------------------------

    def put(self, owner: wire.OwnerRef, *numbers: int, hold_ms: int | None = None) -> None:
        """Without telling anybody, but as a change that has a version."""
        for n in numbers:
            self.chunks[n] = Row(owner, Chance().token(), hold_ms)
        self.table.version += 1

    async def give(self, owner: wire.OwnerRef, *numbers: int) -> None:
        self.allocate(self.table, owner, numbers)
        await self._send_events()

    async def move(self, owner: wire.OwnerRef, *numbers: int, hold_ms: int) -> None:
        self.claim(self.table, owner, numbers, hold_ms)
        await self._send_events()

    async def event(self, body: wire.EventBody, *, lost: bool = False) -> None:
        self.announce(self.table, body)
        if lost:
            self._outbox.pop()
        await self._send_events()

    async def sync(self) -> None:
        self.confirm()
        await self._send_events()

    async def reset(self, history: str) -> None:
        self.stamp = replace(self.stamp, history=history, term=self.stamp.term + 1)
        await self.event(wire.Reset("restored"))

    async def _send_events(self) -> None:
        if not self._outbox:
            return
        while self._outbox:
            subject, data, headers = self._outbox.popleft()
            await self.client.publish(subject, data, headers=headers)
        await self.client.flush()

    # --- for tests --------------------------------------------------------------------------------

    def page(self) -> wire.SnapshotPage:
        page = self.snapshot(self.table)[0]
        assert isinstance(page, wire.SnapshotPage)
        return page

    def asked(self, verb: str) -> list[dict[str, Any]]:
        return [body for said, body in self.requests if said == verb]

    async def until_asked(self, verb: str, times: int = 1) -> list[dict[str, Any]]:
        async with asyncio.timeout(SEEN_SECONDS):
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
        await client.subscribe(agent.subjects.all_requests, cb=agent.hear)
        await client.flush()
        yield agent
    finally:
        await client.close()


async def eventually(holds: Callable[[], Any], seconds: float = SEEN_SECONDS) -> None:
    """Wait until `holds` says so."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
