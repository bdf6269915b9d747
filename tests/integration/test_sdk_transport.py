"""The NATS connection against servers of its own that stop, hang, refuse and lie."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from functools import partial

import nats
import pytest
from nats.aio.msg import Msg

from drsm_agent.embedded import NatsServer, Scratch, start_nats_server
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.transport import Message, NoAnswer, NoResponders, NotConnected, TooLarge
from tests.harness import SEEN_SECONDS, raw, unreadable
from tests.sdk.fake_agent import DEADLINE, eventually


@pytest.fixture
async def scratch() -> AsyncIterator[Scratch]:
    async with Scratch() as scratch:
        yield scratch


@pytest.fixture
async def server(scratch: Scratch) -> NatsServer:
    return await start_nats_server(scratch)


async def echo(transport: NatsTransport) -> list[bytes]:
    """Subscribe; what arrives."""
    heard: list[bytes] = []
    await transport.subscribe("echo", lambda message: heard.append(message.data))
    return heard


async def test_subscriptions_outlive_a_restart_of_the_server(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    again: list[int] = []
    transport.on_reconnect(lambda: again.append(transport.epoch))
    heard = await echo(transport)
    await server.restart()
    await eventually(lambda: transport.epoch == 2)
    await transport.publish("echo", b"hello")
    await eventually(lambda: heard == [b"hello"])
    assert again == [2]
    await transport.close()


async def test_nothing_is_kept_for_later_while_disconnected(server: NatsServer) -> None:
    """A stale request must not be replayed minutes later."""
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    heard = await echo(transport)
    await server.kill()
    await eventually(lambda: not transport.connected)
    with pytest.raises(NotConnected):
        await transport.publish("echo", b"stale")
    with pytest.raises(NotConnected):
        await transport.request("echo", b"stale", 1.0)
    await server.start()
    await eventually(lambda: transport.connected)
    await transport.publish("echo", b"fresh")
    await eventually(lambda: heard == [b"fresh"])
    await transport.close()


async def test_a_server_that_hangs_is_noticed_within_seconds(server: NatsServer) -> None:
    """nats-py alone would take six minutes."""
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    server.pause()
    await eventually(lambda: not transport.connected)
    server.resume()
    await eventually(lambda: transport.connected)
    await transport.close()


async def test_a_connection_that_was_closed_for_good_is_built_anew(scratch: Scratch) -> None:
    """After some errors of the server nats-py never reconnects, whatever its settings."""
    server = await start_nats_server(scratch, config='authorization { user: a, password: "one" }')
    transport = NatsTransport(server.url, options={"user": "a", "password": "one"})
    await transport.connect(SEEN_SECONDS)
    heard = await echo(transport)
    config = server.home / "nats.conf"
    config.write_text('authorization { user: a, password: "two" }')
    server._signal(signal.SIGHUP)
    await eventually(lambda: not transport.connected)
    config.write_text('authorization { user: a, password: "one" }')
    server._signal(signal.SIGHUP)
    await eventually(lambda: transport.connected and transport.epoch == 2)
    await transport.publish("echo", b"hello")
    await eventually(lambda: heard == [b"hello"])
    await transport.close()


async def test_wrong_credentials_are_told_at_the_deadline(scratch: Scratch) -> None:
    server = await start_nats_server(scratch, config='authorization { user: a, password: "one" }')
    transport = NatsTransport(server.url, options={"user": "a", "password": "wrong"})
    with pytest.raises(NotConnected, match="Authorization Violation"):
        await transport.connect(DEADLINE)
    await transport.close()


async def test_a_failing_callback_does_not_end_the_others(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    heard: list[bytes] = []

    def fails_once(message: Message) -> None:
        if message.data == b"bad":
            raise ValueError("bad")
        heard.append(message.data)

    await transport.subscribe("echo", fails_once)
    await transport.publish("echo", b"bad")
    await transport.publish("echo", b"good")
    await eventually(lambda: heard == [b"good"])
    await transport.close()


async def test_messages_that_cannot_be_read_do_not_end_the_connection(server: NatsServer) -> None:
    """A single one, from anybody, ends nats-py's read loop: it hears nothing until pings time out."""
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    heard = await echo(transport)
    for count, packet in enumerate(unreadable("echo").values(), start=1):
        await raw(server.url, packet)
        await transport.publish("echo", b"good")
        await eventually(partial(lambda wanted: heard.count(b"good") == wanted, count))
    assert transport.epoch == 1
    await transport.close()


async def test_each_way_of_not_getting_an_answer_has_its_error(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    with pytest.raises(NoResponders):
        await transport.request("nobody", b"", SEEN_SECONDS)
    with pytest.raises(NoResponders):
        await transport.request_many("nobody", b"", SEEN_SECONDS, lambda message: True)
    subscription = await transport.subscribe("silent", lambda message: None)
    with pytest.raises(NoAnswer):
        await transport.request("silent", b"", 0.1)
    with pytest.raises(NoAnswer):
        await transport.request_many("silent", b"", 0.1, lambda message: True)
    with pytest.raises(TooLarge):
        await transport.request("silent", bytes(1024 * 1024), 1.0)
    await subscription.stop()
    await transport.close()


async def test_a_cancellation_that_comes_together_with_the_answer_ends_the_task(server: NatsServer) -> None:
    """nats-py's own request may drop it, and a task that asks again and again never ends."""
    responder = await nats.connect(server.url)
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)

    async def answer(message: Msg) -> None:
        await responder.publish(message.reply, b"yes")
        if message.data == b"0":
            await responder.publish("over", b"")

    async def ask() -> None:
        for i in itertools.count():
            await transport.request("ask", str(i).encode(), SEEN_SECONDS)

    def cancel(_: Message) -> None:
        asking.cancel()

    await responder.subscribe("ask", cb=answer)
    await responder.flush()
    await transport.subscribe("over", cancel)
    for _ in range(10):
        asking = asyncio.create_task(ask())
        await asyncio.wait([asking], timeout=SEEN_SECONDS)
        assert asking.cancelled()
    await transport.close()
    await responder.close()


async def test_closing_works_while_the_server_hangs(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    await echo(transport)
    server.pause()
    async with asyncio.timeout(SEEN_SECONDS):
        await transport.close()


async def test_closing_works_while_the_server_is_gone(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    await echo(transport)
    await server.kill()
    await eventually(lambda: not transport.connected)
    async with asyncio.timeout(SEEN_SECONDS):
        await transport.close()


async def test_what_is_subscribed_to_while_disconnected_is_heard_later(server: NatsServer) -> None:
    transport = NatsTransport(server.url)
    await transport.connect(SEEN_SECONDS)
    await server.kill()
    await eventually(lambda: not transport.connected)
    heard = await echo(transport)
    await server.start()
    await eventually(lambda: transport.epoch == 2)
    await transport.publish("echo", b"once")
    await eventually(lambda: heard)
    await asyncio.sleep(0.1)
    assert heard == [b"once"]
    await transport.close()
