"""NATS, simulated: one server, and a connection of each node with a line in either direction.

As on TCP a line keeps its order; it can be slow, silent for a while (a cut), and when it is silent for
longer than the client's pings bear, or the server restarts, what is under way on it is lost and the client
makes a new connection. Beyond what NATS does, a seed's weather may also lose, double and reorder what
comes from the server: whatever holds then, holds on the real thing.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from drsm_agent.errors import BusUnavailable
from drsm_agent.ports import Handler, Incoming
from drsm_sdk.transport import Callback, Message, NoAnswer, NoResponders, NotConnected, anything
from tests.simulation.loop import Node

PATIENCE = 5.0  # seconds of silence after which a client gives its connection up: two pings, 2 s apart
FLUSH_TIMEOUT = 2.0
CALM_DELAY = 0.001
NO_RESPONDERS = {"Status": "503"}
INBOXES = "_INBOX."


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad a seed's network is. `slow` and `typical` are seconds; the others probabilities."""

    typical: float = 0.002
    slow: float = 1.0
    slowness: float = 0.0005
    loss: float = 0.0
    doubling: float = 0.0
    reordering: float = 0.0


CALM = Weather()


@dataclass(slots=True)
class Packet:
    subject: str
    data: bytes
    headers: Mapping[str, str]
    reply: str


class Line:
    """One direction between a client and the server."""

    def __init__(self, network: "Network") -> None:
        self._network = network
        self._free_at = 0.0
        self.cut = False
        self._stalled: list[Callable[[], None]] = []

    def carry(self, deliver: Callable[[], None], *, ordered: bool = True) -> None:
        """Deliver after a while, unless the connection it belongs to is over by then."""
        if self.cut:
            self._stalled.append(deliver)
            return
        now = self._network.node.now()
        at = now + self._network.delay()
        if ordered:
            at = self._free_at = max(at, self._free_at)
        self._network.node.later(at - now, self._arrive, deliver)

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if self.cut:
            self._stalled.append(deliver)
        else:
            deliver()

    @property
    def busy(self) -> bool:
        """Whether something is under way that was sent before the weather calmed down, or is held up."""
        return self._network.node.now() + CALM_DELAY < self._free_at or bool(self._stalled)

    def mend(self) -> None:
        self.cut = False
        stalled, self._stalled = self._stalled, []
        for deliver in stalled:
            self.carry(deliver)

    def clear(self) -> None:
        self._stalled.clear()


@dataclass(eq=False, slots=True)
class Interest:
    """A subscription, as the server knows it."""

    connection: "Connection"
    pattern: str
    callback: Callable[[Packet], None]
    known: bool = False

    def matches(self, subject: str) -> bool:
        return subject == self.pattern or (
            self.pattern.endswith(">") and subject.startswith(self.pattern[:-1])
        )

    async def stop(self) -> None:
        self.connection.interests = [kept for kept in self.connection.interests if kept is not self]


class Network:
    """The server. `heard` sees every message that reaches it, in order: the all-knowing observer's ear."""

    def __init__(self, node: Node, chance: random.Random, weather: Weather) -> None:
        self.node, self.chance, self.weather = node, chance, weather
        self.connections: list[Connection] = []
        self.heard: Callable[[Packet], None] = lambda packet: None
        self.up = True
        self.calm = False
        self._numbers = 0

    def number(self) -> int:
        """Another one each time."""
        self._numbers += 1
        return self._numbers

    def delay(self) -> float:
        if self.calm:
            return CALM_DELAY
        if self.chance.random() < self.weather.slowness:
            return self.chance.uniform(0, self.weather.slow)
        return self.chance.expovariate(1 / self.weather.typical)

    def restart(self, down: float) -> None:
        """The server is gone for a while, and with it all that was under way."""
        self.up = False
        for connection in self.connections:
            connection.drop()
        self.node.later(down, self._come_back)

    def _come_back(self) -> None:
        self.up = True
        for connection in list(self.connections):
            connection.reconnect_soon()

    def route(self, sender: "Connection", packet: Packet) -> None:
        """A message has reached the server."""
        self.heard(packet)
        subject, found = packet.subject, False
        for connection in self.connections:
            if not connection.connected or connection.ignores(subject):
                continue
            for interest in connection.interests:
                if interest.known and interest.matches(subject):
                    found = True
                    self._forward(connection, interest, packet)
        if not found and packet.reply:
            self.route(sender, Packet(packet.reply, b"", NO_RESPONDERS, ""))

    def _forward(self, connection: "Connection", interest: Interest, packet: Packet) -> None:
        weather = CALM if self.calm else self.weather
        own = packet.subject.startswith(connection.inbox)  # losing answers is losing requests, once more
        if not own and self.chance.random() < weather.loss:
            return
        copies = 2 if self.chance.random() < weather.doubling else 1
        for _ in range(copies):
            ordered = self.chance.random() >= weather.reordering
            connection.to_client.carry(connection.living(interest, packet), ordered=ordered)


class Connection:
    """A node's connection to the server, made again whenever it is lost."""

    def __init__(self, network: Network, node: Node) -> None:
        self.network, self.node = network, node
        self.to_server, self.to_client = Line(network), Line(network)
        self.interests: list[Interest] = []
        self.connected = False
        self.epoch = 0
        self.inbox = f"{INBOXES}{node.name}.{network.number()}."
        self.reconnected: list[Callable[[], None]] = []
        self._inboxes = 0
        self._life = object()
        network.connections.append(self)

    def ignores(self, subject: str) -> bool:
        """Whether it is another one's inbox: most messages are answers."""
        return subject.startswith(INBOXES) and not subject.startswith(self.inbox)

    def open(self) -> None:
        if not self.connected and self.network.up and not self.to_server.cut and not self.to_client.cut:
            self.connected = True
            self.epoch += 1
            for interest in self.interests:
                interest.known = True
            if self.epoch > 1:
                for call in self.reconnected:
                    call()

    def reconnect_soon(self) -> None:
        self.node.later(self.network.chance.uniform(0.01, 0.5), self.open)

    def drop(self) -> None:
        """What is under way is lost; the client hears of it at once."""
        self.connected = False
        self.to_server.clear()
        self.to_client.clear()
        for interest in self.interests:
            interest.known = False
        self._life = object()

    def close(self) -> None:
        self.drop()
        self.interests.clear()
        if self in self.network.connections:
            self.network.connections.remove(self)

    def cut(self, *, out: bool, back: bool, seconds: float) -> None:
        """Black-hole one direction or both. Noticed after a while, if it lasts; mended in the end."""
        self.to_server.cut |= out
        self.to_client.cut |= back
        life = self._life
        if seconds > PATIENCE:
            self.network.node.later(PATIENCE, self._give_up, life)
        self.network.node.later(seconds, self.mend)

    @property
    def is_cut(self) -> bool:
        return self.to_server.cut or self.to_client.cut

    def _give_up(self, life: object) -> None:
        if life is self._life and (self.to_server.cut or self.to_client.cut):
            self.drop()

    def mend(self) -> None:
        """Carry both ways again."""
        self.to_server.mend()
        self.to_client.mend()
        if not self.connected:
            self.reconnect_soon()

    def send(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        packet, life = Packet(subject, data, headers or {}, reply), self._life

        def deliver() -> None:
            if life is self._life and self.network.up:
                self.network.route(self, packet)

        self.to_server.carry(deliver)

    def living(self, interest: Interest, packet: Packet) -> Callable[[], None]:
        """Hands a message over in this node, unless connection or subscription are over by then."""
        life = self._life

        def deliver() -> None:
            if life is self._life and interest in self.interests:
                self.node.soon(interest.callback, packet)

        return deliver

    def listen(self, pattern: str, callback: Callable[[Packet], None]) -> Interest:
        interest = Interest(self, pattern, callback)
        self.interests.append(interest)
        life = self._life

        def known() -> None:
            if life is self._life:
                interest.known = True

        if self.connected:
            self.to_server.carry(known)
        return interest

    def new_inbox(self) -> str:
        self._inboxes += 1
        return f"{self.inbox}{self._inboxes}"


class PodTransport:
    """`drsm_sdk.transport.Transport` on the simulated network."""

    def __init__(self, network: Network, node: Node) -> None:
        self.connection = Connection(network, node)

    @property
    def connected(self) -> bool:
        return self.connection.connected

    @property
    def epoch(self) -> int:
        return self.connection.epoch

    async def connect(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not self.connection.connected:
                    self.connection.open()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise NotConnected("no connection") from None

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._require()
        self.connection.send(subject, data, headers)

    async def subscribe(self, subject: str, callback: Callback) -> Interest:
        return self.connection.listen(subject, lambda packet: callback(_message(packet)))

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[Message], bool] = anything
    ) -> Message:
        answers: list[Message] = []

        def first(message: Message) -> bool:
            answers.append(message)
            return wanted(message)

        await self.request_many(subject, data, timeout, first)
        return answers[-1]

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        self._require()
        inbox = self.connection.new_inbox()
        answers: asyncio.Queue[Message | None] = asyncio.Queue()
        interest = self.connection.listen(inbox, lambda packet: answers.put_nowait(_message(packet)))
        interest.known = True  # a client has one subscription for all its inboxes, made once
        self.connection.send(subject, data, reply=inbox)
        late = asyncio.get_running_loop().call_later(timeout, answers.put_nowait, None)
        try:
            while (answer := await answers.get()) is not None:
                if answer.headers.get("Status"):
                    raise NoResponders("no agent leads just now (no responders)")
                if done(answer):
                    return
            raise NoAnswer(f"no answer within {timeout:.1f} s")
        finally:
            late.cancel()
            await interest.stop()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.connection.reconnected.append(callback)

    async def close(self) -> None:
        self.connection.close()

    def _require(self) -> None:
        if not self.connection.connected:
            raise NotConnected("no connection")


class AgentBus:
    """`drsm_agent.ports.Bus` on the simulated network."""

    def __init__(self, network: Network, node: Node) -> None:
        self.connection = Connection(network, node)
        self.connection.open()
        self.forbidden = ""
        self.errors = 0
        self.speaks: Callable[[str], None] = lambda subject: None

    @property
    def connected(self) -> bool:
        return self.connection.connected

    @property
    def reconnects(self) -> int:
        return self.connection.epoch

    @property
    def max_payload(self) -> int:
        return 1024 * 1024

    async def subscribe(self, subject: str, handler: Handler) -> Interest:
        self._require()
        node = self.connection.node

        def receive(packet: Packet) -> None:
            node.start(_handled(handler(Incoming(packet.subject, packet.data, packet.reply))))

        interest = self.connection.listen(subject, receive)
        try:
            await self.flush()
        except BaseException:
            await interest.stop()
            raise
        return interest

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        self._require()
        self.speaks(subject)
        self.connection.send(subject, data, headers, reply)

    async def carried(self) -> None:
        await self.flush()

    async def flush(self) -> None:
        before = self.connection.epoch
        try:
            await self.request(self.connection.new_inbox(), b"", FLUSH_TIMEOUT, echo=True)
        except BusUnavailable as error:
            raise BusUnavailable(f"NATS did not confirm: {error}") from None
        if not self.connected or self.connection.epoch != before:
            raise BusUnavailable("the NATS connection changed while messages were under way")

    async def request(
        self,
        subject: str,
        data: bytes,
        timeout: float,
        wanted: Callable[[bytes], bool] = lambda _: True,
        *,
        echo: bool = False,
    ) -> bytes:
        self._require()
        inbox = subject if echo else self.connection.new_inbox()
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def receive(packet: Packet) -> None:
            if not answer.done() and not packet.headers.get("Status") and wanted(packet.data):
                answer.set_result(packet.data)

        interest = self.connection.listen(inbox, receive)
        interest.known = True
        self.connection.send(subject, data, reply="" if echo else inbox)
        late = asyncio.get_running_loop().call_later(timeout, _give_up, answer)
        try:
            return await answer
        except TimeoutError:
            raise BusUnavailable(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            late.cancel()
            await interest.stop()

    async def broken(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def close(self) -> None:
        self.connection.close()

    def _require(self) -> None:
        if not self.connected:
            raise BusUnavailable("NATS is not connected")


def _give_up(answer: "asyncio.Future[bytes]") -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


async def _handled(work: Awaitable[None]) -> None:
    await work


def _message(packet: Packet) -> Message:
    return Message(packet.subject, packet.data, packet.headers)
