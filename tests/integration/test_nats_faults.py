"""What NATS servers do to those connected to them, and how agent and SDK come out of it."""

import asyncio
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from drsm_agent.bus.nats_bus import NatsBus
from drsm_agent.embedded import NatsServer, Scratch, start_nats_server
from drsm_agent.embedded.server import free_port
from drsm_agent.errors import BusUnavailable, Misconfigured, TooLarge
from drsm_agent.ports import Incoming
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.transport import TransportError
from tests.harness import eventually, within

PIECE = bytes(64 * 1024)
PIECES = 400
"""25 MB: more than the buffers of two sockets take."""
CONNECTED_SECONDS = 20.0
"""A bound against hanging."""
NOTICED_SECONDS = 12.0
"""Two unanswered pings, 2 s apart, and time to come back. (nats-py's own setting takes six minutes.)"""


def kinds_of(base: type[Exception]) -> list[type[Exception]]:
    """It and all that are derived from it."""
    kinds = [base, *(kind for derived in base.__subclasses__() for kind in kinds_of(derived))]
    return [
        kind for kind in kinds if not kind.__module__.startswith("nats.js")
    ]  # of JetStream, which nobody uses


def made(kind: type[Exception]) -> Exception:
    """One of them, with as many arguments as it wants."""
    for count in (1, 2, 3, 4):
        with suppress(TypeError):
            error = kind(*["by a test"] * count)
            str(error)
            return error
    return kind()


class Line:
    """A connection of the agent or of the SDK, and what it hears on `x`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.heard: list[bytes] = []

    @classmethod
    async def of_agent(cls, urls: list[str], **options: Any) -> "Line":
        bus = await NatsBus.connect(",".join(urls), name="agent", timeout=CONNECTED_SECONDS, **options)
        line = cls(bus)
        await line.connection.subscribe("x", line._note)
        return line

    @classmethod
    async def of_sdk(cls, urls: list[str], **options: Any) -> "Line":
        line = cls(NatsTransport(urls, options=options))
        await line.connection.connect(CONNECTED_SECONDS)
        await line.connection.subscribe("x", lambda message: line.heard.append(message.data))
        return line

    @property
    def port(self) -> int:
        """Of the server that it is connected to; 0 if to none."""
        url = self.connection._client.connected_url if self.connection.connected else None
        return int(url.port) if url else 0

    async def say(self, data: bytes) -> bool:
        """Whether the connection took it."""
        try:
            await self.connection.publish("x", data)
        except (BusUnavailable, TransportError):
            return False
        return True

    async def stuff(self) -> None:
        """More than a server that stands still can take."""
        for _ in range(PIECES):
            assert await self.say(PIECE)
            await asyncio.sleep(0)

    async def _note(self, incoming: Incoming) -> None:
        self.heard.append(incoming.data)


Make = Callable[..., Any]


@pytest.fixture(params=[Line.of_agent, Line.of_sdk], ids=["agent", "sdk"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    lines: list[Line] = []

    async def make(urls: list[str], **options: Any) -> Line:
        lines.append(await request.param(urls, **options))
        return lines[-1]

    yield make
    for line in lines:
        await within(line.connection.close())


@pytest.fixture
async def scratch() -> AsyncIterator[Scratch]:
    async with Scratch() as scratch:
        yield scratch


async def two_servers(scratch: Scratch, config: str = "") -> dict[int, NatsServer]:
    """A cluster of two, by port."""
    ports = [free_port(), free_port()]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    named = "server_name: n{0}\ncluster {{ name: c, listen: 127.0.0.1:{0}, routes: [{1}] }}\n{2}"
    servers = [await start_nats_server(scratch, config=named.format(port, routes, config)) for port in ports]
    return {server.port: server for server in servers}


async def test_what_a_hung_server_did_not_take_is_not_sent_to_the_next_one(
    make: Make, scratch: Scratch
) -> None:
    """nats-py keeps it, and sends it after it has connected again, however much later."""
    server = await start_nats_server(scratch)
    line = await make([server.url])
    server.pause()
    await line.stuff()
    await within(_gone(line), NOTICED_SECONDS)
    await server.kill()
    await server.start()
    await eventually(lambda: line.connection.connected)
    await eventually_said(line, b"fresh")
    assert set(line.heard) == {b"fresh"}


async def test_a_hung_server_is_left_for_another_whatever_it_did_not_take(
    make: Make, scratch: Scratch
) -> None:
    """A transport that is closed in good order would first wait until the peer has taken everything."""
    servers = await two_servers(scratch)
    line = await make([server.url for server in servers.values()])
    hung = servers[line.port]
    hung.pause()
    await line.stuff()
    await within(_moved(line, hung.port), NOTICED_SECONDS)
    await eventually_said(line, b"fresh")
    assert set(line.heard) == {b"fresh"}


async def test_closing_does_not_wait_for_a_hung_server_to_take_everything(
    make: Make, scratch: Scratch
) -> None:
    server = await start_nats_server(scratch)
    line = await make([server.url])
    server.pause()
    await line.stuff()
    await within(line.connection.close(), 6.0)


async def test_a_server_in_lame_duck_mode_is_left_at_once(make: Make, scratch: Scratch) -> None:
    """It says that it will end, half a minute before it hangs up."""
    servers = await two_servers(scratch, 'lame_duck_grace_period: "30s"\nlame_duck_duration: "60s"\n')
    line = await make([server.url for server in servers.values()])
    lame = servers[line.port]
    lame._signal(signal.SIGUSR2)
    await within(_moved(line, lame.port), 15.0)
    await eventually_said(line, b"fresh")


async def test_a_server_that_is_the_only_one_is_not_left_before_it_ends(make: Make, scratch: Scratch) -> None:
    """It takes no new connections any more, so whoever left it would be without one for all that time."""
    server = await start_nats_server(
        scratch, config='lame_duck_grace_period: "10s"\nlame_duck_duration: "30s"\n'
    )
    line = await make([server.url])
    server._signal(signal.SIGUSR2)
    await eventually(lambda: "Entering lame duck mode" in server.log_tail())
    for _ in range(10):
        assert await line.say(b"fresh")
        await asyncio.sleep(0.1)
    await eventually(lambda: len(line.heard) == 10)


async def test_a_message_is_measured_with_its_headers_before_the_server_would_hang_up(
    scratch: Scratch,
) -> None:
    """nats-py measures the body alone; what is over the limit then costs the connection, for good."""
    server = await start_nats_server(scratch, config="max_payload: 131072")
    line = await Line.of_agent([server.url])
    headers = {"Content-Type": "application/msgpack", "Drsm-Summary": "s" * 200}
    framing = sum(len(name) + len(text) + 4 for name, text in headers.items()) + 12
    largest = bytes(131072 - framing)
    await line.connection.publish("x", largest, headers)
    await line.connection.flush()
    assert line.heard == [largest]
    with pytest.raises(TooLarge, match="131073 bytes"):
        await line.connection.publish("x", largest + b"x", headers)
    await line.connection.flush()
    await line.connection.close()


async def _gone(line: Line) -> None:
    while line.connection.connected:
        await asyncio.sleep(0.01)


async def _moved(line: Line, port: int) -> None:
    while line.port in {0, port}:
        await asyncio.sleep(0.01)


async def eventually_said(line: Line, data: bytes) -> None:
    """It is heard, though subscriptions may be on their way still."""
    async with asyncio.timeout(10):
        while data not in line.heard:
            await line.say(data)
            await asyncio.sleep(0.02)


async def test_a_pod_connects_again_although_the_applications_threads_are_all_busy() -> None:
    """asyncio looks host names up in them, but for the SDK."""
    async with Scratch() as scratch:
        server = await start_nats_server(scratch)
        transport = NatsTransport(server.url.replace("127.0.0.1", "localhost"))
        await transport.connect(CONNECTED_SECONDS)
        busy, loop = threading.Event(), asyncio.get_running_loop()
        threads = ThreadPoolExecutor(1)
        loop.set_default_executor(threads)
        try:
            for _ in range(3):
                threads.submit(busy.wait)
            await server.kill()
            await server.start()
            await eventually(lambda: transport.epoch > 1 and transport.connected, NOTICED_SECONDS)
        finally:
            busy.set()
            loop.set_default_executor(ThreadPoolExecutor())  # other tests have the same loop
            threads.shutdown()
            await transport.close()


@pytest.mark.parametrize(
    "kind", [*kinds_of(NatsError), OSError, ssl.SSLError, ConnectionResetError, EOFError]
)
async def test_no_error_of_the_client_library_leaves_the_bus_unclassified(
    nats_url: str, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Whatever it raises, of whichever operation, is an error of the agent's."""

    async def fail(*_: Any, **__: Any) -> None:
        raise made(kind)

    async def ignore(_: Incoming) -> None:
        pass

    bus = await NatsBus.connect(nats_url, name="agent", timeout=CONNECTED_SECONDS)
    subscription = await bus.subscribe("x", ignore)
    with monkeypatch.context() as broken:
        broken.setattr(Client, "publish", fail)
        broken.setattr(Client, "subscribe", fail)
        broken.setattr("nats.aio.subscription.Subscription.unsubscribe", fail)
        for operation in (
            bus.publish("x", b""),
            bus.flush(),
            bus.carried(),
            bus.request("x", b"", 1.0, lambda _: True),
            bus.subscribe("y", ignore),
        ):
            with pytest.raises(BusUnavailable):
                await operation
        await subscription.stop()
    await bus.close()
    with monkeypatch.context() as broken:
        broken.setattr(Client, "connect", fail)
        with pytest.raises((BusUnavailable, Misconfigured)):
            await NatsBus.connect(nats_url, name="agent", timeout=CONNECTED_SECONDS)
