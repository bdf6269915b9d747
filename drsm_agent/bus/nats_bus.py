"""The agent's connection to NATS: a `ports.Bus` on nats-py.

What nats-py does by itself and must not do here: it buffers while disconnected and replays minutes
later (so publishing is refused while there is no connection, and what a lost one has not sent is thrown
away), and an `-ERR` of the server can close it for good (so `broken` tells, and the process ends).

Its own `flush()` is not used: it returns at once while it reconnects, and one that timed out kills the
read loop when its late PONG comes, after which every further one succeeds without a round trip. A
message to an inbox of our own says the same, and proves that we still hear: NATS keeps the order of
one connection, so when it is back the server has everything before it.

Its read loop ends, and says nothing, at a message whose subject, reply subject or headers it cannot read;
anybody can send one. Such messages are dropped here.

It encrypts only what the server asks it to encrypt, whatever its caller asked for, and nothing at all over
ws://. Here a connection in clear text carries nothing, credentials least of all, when TLS was asked for.
"""

import asyncio
import contextlib
import random
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from drsm_agent import cancellation
from drsm_agent.errors import BusUnavailable, Forbidden, Misconfigured, TooLarge
from drsm_agent.ports import Handler, Incoming
from drsm_sdk.wire.messages import SUMMARY_HEADER
from drsm_sdk.wire.server_url import ServerUrl

PING_INTERVAL = 2
PINGS_UNANSWERED_MAX = 2
"""A peer that is gone without a word is noticed after 2 x 2 s; nats-py's own default is six minutes."""
CONNECT_TIMEOUT = 2
RECONNECT_WAIT_MAX = 2.0
FLUSH_TIMEOUT = 2
NO_RESPONDERS = "503"
PAYLOAD_MIN = 128 * 1024
"""What the server must take in one message: an event of 1000 claimed chunks with their grants is 40 KiB."""
PENDING_REQUESTS_MAX = 65_536
"""Requests that wait to be read; beyond, nats-py drops the newest and the requester asks again."""
PENDING_BYTES_MAX = 32 * 1024 * 1024
"""The same in bytes. A request is some hundred bytes, so only a flood of large ones comes near."""

BUS_ERRORS = (NatsError, OSError, EOFError)
"""All that nats-py raises once it is connected: its own errors, and those of sockets, TLS and streams."""

log = structlog.get_logger("drsm_agent.bus")


class _Client(Client):
    """Goes on reading after a message that cannot be read, sends nothing of a lost connection later, and
    nothing at all in clear text where TLS was asked for."""

    def __init__(self, tls: bool) -> None:
        super().__init__()
        self._tls = tls

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        scheme = self._current_server.uri.scheme if self._current_server is not None else ""
        begun = scheme == "wss" or self.options["tls_handshake_first"]
        encrypted = begun or (scheme != "ws" and info.get("tls_required"))
        if self._tls and initial_connection and not encrypted:
            raise NatsError(
                "expected a server that requires TLS, found one that does not; "
                "enable TLS on the server (wss:// instead of ws://), or take DRSM_NATS_TLS_* and tls:// away"
            )
        await super()._process_info(info, initial_connection)

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Made anew for each connection where `tls` is what makes it."""
        tls = self.options.get("tls")
        return tls() if callable(tls) else super().ssl_context

    def _setup_server_pool(self, connect_url: Any) -> None:
        super()._setup_server_pool(connect_url)
        for server in self._server_pool:
            server.uri = ServerUrl(*server.uri)

    def abandon(self) -> None:
        """Let go of the connection and of all that it has not sent. In good order it would be closed only
        once the peer took everything, which one that hangs never does."""
        if writer := getattr(self._transport, "_io_writer", None):
            writer.transport.abort()
        self._pending, self._pending_data_size = [], 0

    async def _attempt_reconnect(self) -> None:
        self.abandon()
        await super()._attempt_reconnect()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except (ValueError, IndexError) as error:
            log.debug("unreadable_message", error=str(error))


class NatsSubscription:
    """A subscription of the agent."""

    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def stop(self) -> None:
        try:
            await self._subscription.unsubscribe()
        except BUS_ERRORS as error:  # closed meanwhile: then nothing is delivered either
            log.debug("unsubscribe", error=str(error))


class NatsBus:
    """One connection. Events go out on it in order; `reconnects` counts how often it was made anew."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self.reconnects = 0
        self.errors = 0
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._refused = ""
        self._forbidden = ""
        """The server's words when it refused an event for want of a permission, until a flush succeeds."""
        self._denied: dict[str, str] = {}
        """By subject, its words when it refused a subscription, until it takes it."""
        self._said: set[str] = set()
        self._last_error = ""
        self._events: set[str] = set()
        self._inbox = ""
        self._answers: dict[str, tuple[asyncio.Future[bytes], Callable[[bytes], bool]]] = {}
        self._asked = 0
        self._closing = False

    @classmethod
    async def connect(cls, url: str, *, name: str, timeout: float, **options: Any) -> "NatsBus":
        """Connect within `timeout` seconds, trying again meanwhile. Raises BusUnavailable, Misconfigured."""
        bus = cls(_Client(tls=_wants_tls(url, options)))
        try:
            async with asyncio.timeout(timeout):
                await bus._connect(url, name, options)
        except TimeoutError:
            found = f" (the last try: {bus._last_error})" if bus._last_error else ""
            raise BusUnavailable(
                f"no NATS server took the connection at {_shown(url)} within {timeout:g} s{found}; "
                f"check DRSM_NATS_URL, credentials and TLS settings, and that the server runs"
            ) from None
        except (*BUS_ERRORS, ValueError) as error:
            raise Misconfigured(
                f"cannot connect to NATS at {_shown(url)}: {str(error) or type(error).__name__}; "
                f"check DRSM_NATS_URL, credentials and TLS settings"
            ) from error
        if bus.max_payload < PAYLOAD_MIN:
            await bus.close()
            raise Misconfigured(
                f"expected a max_payload of at least {PAYLOAD_MIN} bytes at {_shown(url)}, "
                f"found {bus.max_payload}; raise max_payload in the NATS server's configuration"
            )
        return bus

    async def _connect(self, url: str, name: str, options: dict[str, Any]) -> None:
        await self._client.connect(
            servers=url.split(","),
            name=name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            reconnect_to_server_handler=self._next_server,
            ping_interval=PING_INTERVAL,
            max_outstanding_pings=PINGS_UNANSWERED_MAX,
            pending_size=-1,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
            reconnected_cb=self._on_reconnected,
            disconnected_cb=self._on_disconnected,
            lame_duck_mode_cb=self._on_lame_duck,
            **{"connect_timeout": CONNECT_TIMEOUT, **options},
        )
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def forbidden(self) -> str:
        return self._forbidden or next(iter(self._denied.values()), "")

    @property
    def max_payload(self) -> int:
        return int(self._client.max_payload)

    async def broken(self) -> str:
        """Returns the reason once the connection is closed for good, and not before."""
        return await asyncio.shield(self._broken)

    async def subscribe(self, subject: str, handler: Handler) -> NatsSubscription:
        async def deliver(message: Msg) -> None:
            await handler(Incoming(message.subject, message.data, message.reply))

        self._denied.pop(subject.lower(), None)
        try:
            subscription = NatsSubscription(
                await self._client.subscribe(
                    subject,
                    cb=deliver,
                    pending_msgs_limit=PENDING_REQUESTS_MAX,
                    pending_bytes_limit=PENDING_BYTES_MAX,
                )
            )
        except BUS_ERRORS as error:
            raise BusUnavailable(f"cannot subscribe to {subject}: {error}") from error
        try:
            cancellation.heed()
            await self.flush()  # the server says no before it sends the echo
            if denied := self._denied.get(subject.lower()):
                raise Forbidden(f"{denied}; give the agent's NATS user the permission")
        except BaseException:
            await subscription.stop()
            raise
        return subscription

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        self._require_connection()
        # nats-py looks at the payload alone; the server counts headers too, and closes for good what is over.
        size = len(data) + sum(len(name) + len(text) + 4 for name, text in (headers or {}).items()) + 12
        if size > self.max_payload:
            raise TooLarge(f"{size} bytes for {subject}; the server takes {self.max_payload}")
        if headers and SUMMARY_HEADER in headers:
            self._events.add(subject.lower())
        try:
            await self._client.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except BUS_ERRORS as error:
            raise BusUnavailable(f"NATS did not take a message for {subject}: {error}") from error
        cancellation.heed()

    async def carried(self) -> None:
        self._require_connection()
        before = self.reconnects
        with self._expecting() as (inbox, echo):
            try:
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await self._client.publish(inbox, b"")
                    await echo
            except (*BUS_ERRORS, TimeoutError) as error:
                raise BusUnavailable(f"NATS did not confirm: {str(error) or type(error).__name__}") from error
        if not self.connected or self.reconnects != before:
            raise BusUnavailable("the NATS connection changed while messages were under way")

    async def flush(self) -> None:
        await self.carried()
        if refused := self._refused:
            self._refused = ""
            raise BusUnavailable(f"{refused}; give the agent's NATS user the permission")
        self._forbidden = ""

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[bytes], bool]
    ) -> bytes:
        with self._expecting(wanted) as (inbox, answer):
            try:
                async with asyncio.timeout(timeout):
                    await self.publish(subject, data, reply=inbox)
                    return await answer
            except TimeoutError:
                raise BusUnavailable(f"no answer on {subject} within {timeout:g} s") from None

    @contextlib.contextmanager
    def _expecting(
        self, wanted: Callable[[bytes], bool] = lambda _: True
    ) -> Iterator[tuple[str, asyncio.Future[bytes]]]:
        """A subject of our own and what will come on it. (nats-py's own requests wait in a way that can
        swallow a cancellation on Python 3.11, and then a task does not end.)"""
        self._asked += 1
        inbox = f"{self._inbox}.{self._asked}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[inbox] = answer, wanted
        try:
            yield inbox, answer
        finally:
            del self._answers[inbox]

    async def close(self) -> None:
        self._closing = True
        if self.connected:
            try:
                await self.flush()
            except BusUnavailable as error:
                log.warning("closed_unflushed", error=str(error))
                self._client.abandon()
        try:
            await self._client.close()
        except BUS_ERRORS as error:
            log.debug("close", error=str(error))

    def _require_connection(self) -> None:
        if not self.connected:
            raise BusUnavailable("NATS is not connected")

    def _next_server(self, servers: list[Any], _info: Any) -> tuple[Any, float]:
        """The server that failed least (one that hangs costs a time-out with each try), among equals not the
        one that was just lost; and a random wait, so that a thousand clients do not return at once."""
        with contextlib.suppress(AttributeError):  # nats-py leaves the socket of a failed try open
            self._client._transport.close()  # type: ignore[union-attr]
        attempts = min((server.reconnects for server in servers), default=0)
        longest = min(RECONNECT_WAIT_MAX, 0.1 * 2 ** min(attempts, 5))
        likely = [server for server in servers if server.reconnects == attempts]
        lost = self._client._current_server
        others = [server for server in likely if lost is None or server.uri != lost.uri]
        return random.choice(others or likely), random.uniform(0, longest)

    # Callbacks are awaited in nats-py's read loop: they never wait and never raise.

    async def _on_answer(self, message: Msg) -> None:
        answer, wanted = self._answers.get(message.subject, (None, None))
        if answer is None or wanted is None or answer.done():
            return
        if (message.headers or {}).get("Status") == NO_RESPONDERS:
            answer.set_exception(BusUnavailable("the server knows of nobody who listens there"))
        elif wanted(message.data):
            answer.set_result(message.data)

    async def _on_error(self, error: Exception) -> None:
        self.errors += 1
        said = str(error) or type(error).__name__
        kind, subject = _parts(said)
        self._last_error = said
        if kind not in self._said:  # nats-py repeats it with every try, and with every subject
            log.warning("nats_error", error=said)
        self._said.add(kind)
        # The server says so before it sends the echo of a flush. (Of replies it is the asker's fault.)
        if "permissions violation for publish" in kind.lower() and subject.lower() in self._events:
            self._refused = self._forbidden = said
        if "permissions violation for subscription" in kind.lower():
            self._denied[subject.lower()] = said

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("nats_disconnected")

    async def _on_lame_duck(self) -> None:
        """The server is about to end. The only one there is stays: it takes no new connections any more."""
        elsewhere = len(self._client.servers) > 1
        log.warning(
            "nats_lame_duck", action="moving to another server" if elsewhere else "waiting for its end"
        )
        if elsewhere:
            await self._client.force_reconnect()

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._said.clear()
        log.info("nats_reconnected", reconnects=self.reconnects)

    async def _on_closed(self) -> None:
        if not self._broken.done():
            self._broken.set_result(str(self._client.last_error or "closed"))


def _wants_tls(url: str, options: Mapping[str, Any]) -> bool:
    """One server by `tls://` or `wss://` is enough: the others, also those it tells of, are no way around."""
    return "tls" in options or any(one.startswith(("tls://", "wss://")) for one in url.split(","))


def _parts(said: str) -> tuple[str, str]:
    """What an error says, and the subject in it: a stranger chooses what he asks and where he is answered."""
    kind, _, rest = said.partition('"')
    return re.split(r",? subject:", kind)[0], rest.partition('"')[0]


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    return ",".join(part.rpartition("@")[2] if "@" in part else part for part in url.split(","))
