"""The transport on NATS: the only file that imports nats-py, and the place for what must be known of it.

- nats-py buffers what is published while disconnected and replays it, however old: buffering is off, and what
  a lost connection has not sent is thrown away.
- It notices a half-open connection only by pings, every 120 s by default: here every 2 s.
- Some errors of the server (expired credentials, too many connections) close it for good, whatever the
  settings: a supervising task builds a new client then, and when one has been down for long.
- With a TLS context but a server that offers none it would go on in clear text, and over ws:// it does so
  whatever the server offers: both are refused before any credentials are sent.
- An exception in a callback ends its read loop: callbacks here never raise.
"""

import asyncio
import contextlib
import inspect
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nats import errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport

from drsm_sdk.ambient import Backoff, Chance
from drsm_sdk.errors import BadRequest
from drsm_sdk.resolve import addresses
from drsm_sdk.tasks import Tasks
from drsm_sdk.transport import (
    Callback,
    Message,
    NoAnswer,
    NoResponders,
    NotConnected,
    TooLarge,
    anything,
)
from drsm_sdk.wire.server_url import ServerUrl

log = logging.getLogger("drsm_sdk")

PING_INTERVAL = 2
CONNECT_TIMEOUT = 2
RECONNECT_FIRST, RECONNECT_MOST = 0.05, 2.0
REBUILD_AFTER = 30.0  # seconds down, after which the client itself is not trusted any more
CLOSE_TIMEOUT = 2.0
REFUSED_RETRY = 10.0  # seconds between two tries of a subscription that the server does not allow
FORBIDDEN_MAX = 100  # subjects that it does not allow, remembered for who waits there in vain
HEADERS_MAX = 1024  # what a message's headers may add to its size
NO_RESPONDERS = "503"
Expected = tuple[asyncio.Future[Message], Callable[[Message], bool]]
"""What will be the answer, and whether a message is one."""
SCHEMES = ("", "nats", "tls", "ws", "wss")
_REFUSAL = re.compile('permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE)
OPTIONS = frozenset(inspect.signature(Client.connect).parameters) - {"self", "servers"}


class _Tcp(TcpTransport):
    """Looks host names up in threads of our own, as the application's may all be busy."""

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        failed: OSError | None = None
        async with asyncio.timeout(connect_timeout):
            for address in await addresses(uri.hostname, uri.port):
                try:
                    there = uri._replace(netloc=_at(address, uri.port))
                    await super().connect(there, buffer_size, connect_timeout)
                except OSError as error:
                    failed = error
                else:
                    return
        raise failed or OSError(f"no address found for {uri.hostname}")


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class _Client(Client):
    """Goes on reading after a message whose subject, reply subject or headers cannot be read: anybody can
    send one, and nats-py's read loop would end by it, without a word. And sends nothing of a lost connection
    on the next one."""

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Made anew for each connection where `tls` is what makes it."""
        tls = self.options.get("tls")
        return tls() if callable(tls) else super().ssl_context

    def _setup_server_pool(self, connect_url: Any) -> None:
        super()._setup_server_pool(connect_url)
        for server in self._server_pool:
            server.uri = ServerUrl(*server.uri)

    async def _connect_to_server(self, s: Any) -> None:
        if s.uri.scheme in {"ws", "wss"}:
            return await super()._connect_to_server(s)
        s.last_attempt = time.monotonic()
        self._transport = _Tcp()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, DEFAULT_BUFFER_SIZE, self.options["connect_timeout"])
        return None

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
            log.debug("a message that cannot be read: %s", error)


class _TlsClient(_Client):
    """Sends nothing of its own, credentials least of all, to a server that does not offer TLS."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        scheme = self._current_server.uri.scheme if self._current_server is not None else ""
        begun = self.options["tls_handshake_first"] or scheme == "wss"
        if initial_connection and not (begun or (scheme != "ws" and info.get("tls_required"))):
            raise errors.Error(
                "expected a server that requires TLS, found one that does not; "
                "enable TLS on the server (wss:// instead of ws://), or connect without tls"
            )
        await super()._process_info(info, initial_connection)


@dataclass(slots=True, eq=False)
class _Subscription:
    """A subscription that outlives clients: `client` is the one that has it now."""

    subject: str
    callback: Callback
    client: Client | None = None
    placed: NatsSubscription | None = None
    stopped: bool = False
    refused: bool = False

    async def place(self, client: Client) -> None:
        if self.stopped or (self.client is client and not self.refused):
            return
        if self.client is client and self.placed is not None:  # or a reconnect would bring it back, twice
            await self.placed.unsubscribe()
        self.client, self.refused = client, False
        self.placed = await client.subscribe(self.subject, cb=self._deliver)

    async def stop(self) -> None:
        self.stopped = True
        if self.placed is not None:
            with contextlib.suppress(errors.Error, OSError):
                await self.placed.unsubscribe()

    async def _deliver(self, msg: Msg) -> None:
        if self.stopped:
            return
        try:
            self.callback(_message(msg))
        except Exception:
            log.exception("reading a message on %s failed", msg.subject)


@dataclass(slots=True)
class NatsTransport:
    """A connection to one of the NATS `servers`, made again whenever it breaks.

    `options` go to nats-py's `connect` as they are: `user`, `password`, `token`, `user_credentials`,
    `nkeys_seed`, `tls`, `tls_handshake_first`, `inbox_prefix`, ... They win over what is set here. `tls` may
    also be a function that makes the context: it is called for each connection, so that renewed certificates
    count.
    Raises BadRequest for a URL that is none of NATS, or an option that nats-py does not have.
    """

    servers: str | Sequence[str]
    chance: Chance = field(default_factory=Chance)
    name: str = "drsm-sdk"
    options: Mapping[str, Any] = field(default_factory=dict)
    _client: Client | None = None
    _epoch: int = 0
    _first: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _subscriptions: list[_Subscription] = field(default_factory=list)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)
    _tasks: Tasks = field(default_factory=lambda: Tasks(lambda: None))
    _said: dict[str, None] = field(default_factory=dict)
    _forbidden: dict[str, str] = field(default_factory=dict)
    _inbox: _Subscription | None = None
    _expected: dict[str, Expected] = field(default_factory=dict)
    _last_error: str = "no server answered"

    def __post_init__(self) -> None:
        for url in _urls(self.servers):
            scheme, _, host = url.rpartition("://")
            if scheme not in SCHEMES or not host:
                raise BadRequest(
                    f"expected a NATS URL such as nats://host:4222 (or tls, ws, wss), found {_shown(url)!r}"
                )
        if unknown := sorted(set(self.options) - OPTIONS):
            raise BadRequest(f"expected options of nats-py's connect(), found {', '.join(unknown)}")

    @property
    def connected(self) -> bool:
        return self._client is not None and bool(self._client.is_connected)

    @property
    def epoch(self) -> int:
        return self._epoch

    async def connect(self, timeout: float) -> None:
        self._tasks.start(self._supervise(), "nats")
        try:
            async with asyncio.timeout(timeout):
                await self._first.wait()
        except TimeoutError:
            raise NotConnected(
                f"no connection to NATS at {_shown(self.servers)} within {timeout:g} s ({self._last_error}); "
                "check the address, the credentials, and that a nats-server runs there"
            ) from None

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        client = self._usable(data)
        try:
            await client.publish(subject, data, headers=dict(headers) if headers else None)
        except (errors.Error, OSError) as error:
            raise NotConnected(f"publishing failed: {_text(error)}") from None

    async def subscribe(self, subject: str, callback: Callback) -> _Subscription:
        self._subscriptions = [kept for kept in self._subscriptions if not kept.stopped]
        subscription = _Subscription(subject, callback)
        self._subscriptions.append(subscription)
        if self._client is not None and self.connected:
            with contextlib.suppress(errors.Error, OSError):
                await subscription.place(self._client)
        return subscription

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[Message], bool] = anything
    ) -> Message:
        client = self._usable(data)
        try:
            async with asyncio.timeout(timeout), self._expecting(client, wanted) as (inbox, answer):
                await client.publish(subject, data, reply=inbox)
                message = await answer
        except TimeoutError:
            forbidden = self._forbidden.pop(subject.lower(), "")
            raise NoAnswer(f"no answer within {timeout:.1f} s{forbidden and f': {forbidden}'}") from None
        except (errors.Error, OSError) as error:
            raise NotConnected(f"the request could not be sent: {_text(error)}") from None
        if message.headers.get("Status") == NO_RESPONDERS:
            raise NoResponders("no agent leads just now (no responders)")
        return message

    @contextlib.asynccontextmanager
    async def _expecting(
        self, client: Client, wanted: Callable[[Message], bool]
    ) -> AsyncIterator[tuple[str, asyncio.Future[Message]]]:
        """A subject of our own and what will come on it. (nats-py's own requests wait in a way that can
        swallow a cancellation on Python 3.11: a task of a session that is over would go on for ever.)"""
        if self._inbox is None:
            self._inbox = _Subscription(f"{client.new_inbox()}.*", self._answered)
            self._subscriptions.append(self._inbox)
        if self._inbox.client is not client:  # and not when it was refused, which would be at each request
            await self._inbox.place(client)
        subject = self._inbox.subject.replace("*", self.chance.token())
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._expected[subject] = answer, wanted
        try:
            yield subject, answer
        finally:
            del self._expected[subject]

    def _answered(self, message: Message) -> None:
        answer, wanted = self._expected.get(message.subject, (None, None))
        if answer is not None and wanted is not None and not answer.done() and wanted(message):
            answer.set_result(message)

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        client = self._usable(data)
        answers: asyncio.Queue[Message] = asyncio.Queue()
        try:
            inbox = client.new_inbox()
            subscription = _Subscription(inbox, answers.put_nowait)
            await subscription.place(client)
            await client.publish(subject, data, reply=inbox)
        except (errors.Error, OSError) as error:
            raise NotConnected(f"the request could not be sent: {_text(error)}") from None
        try:
            async with asyncio.timeout(timeout):
                while True:
                    answer = await answers.get()
                    if answer.headers.get("Status") == NO_RESPONDERS:
                        raise NoResponders("no agent leads just now (no responders)")
                    if done(answer):
                        return
        except TimeoutError:
            raise NoAnswer(f"no complete answer within {timeout:.1f} s") from None
        finally:
            await subscription.stop()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        await self._tasks.stop()
        self._subscriptions.clear()
        self._callbacks.clear()

    # --- supervision ----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep one client going; build another when it has closed for good."""
        backoff = Backoff(self.chance, RECONNECT_FIRST, RECONNECT_MOST)
        while True:
            client = _TlsClient() if self._wants_tls() else _Client()
            self._client = client
            try:
                await self._start(client)
                backoff.reset()
                await self._until_useless(client)
            except Exception as error:  # whatever a driver raises, the next client may do better
                self._note(error)
            finally:
                await _close(client)
            await asyncio.sleep(backoff.delay())

    async def _start(self, client: Client) -> None:
        await client.connect(
            **{
                "servers": _urls(self.servers),
                "name": self.name,
                "max_reconnect_attempts": -1,
                "reconnect_time_wait": self.chance.jitter(0.5),
                "connect_timeout": CONNECT_TIMEOUT,
                "ping_interval": PING_INTERVAL,
                "max_outstanding_pings": 2,
                "pending_size": -1,
                "error_cb": self._on_error,
                "disconnected_cb": self._on_disconnected,
                "reconnected_cb": self._on_reconnected,
                "lame_duck_mode_cb": self._on_lame_duck,
                "closed_cb": self._on_closed,
                "reconnect_to_server_handler": self._next_server,
                **self.options,
            }
        )
        await self._place(client)
        self._connected()

    async def _place(self, client: Client) -> None:
        """Subscribe to what this client has not yet."""
        for subscription in list(self._subscriptions):
            await subscription.place(client)

    async def _until_useless(self, client: Client) -> None:
        """Return when the client has closed, or has been down for so long that a new one is better."""
        while not client.is_closed:
            limit: float | None = REBUILD_AFTER
            if client.is_connected:
                limit = REFUSED_RETRY if any(kept.refused for kept in self._subscriptions) else None
            self._changed.clear()
            try:
                async with asyncio.timeout(limit):
                    await self._changed.wait()
            except TimeoutError:
                if not client.is_connected:
                    return
                await self._place(client)

    def _connected(self) -> None:
        self._epoch += 1
        self._said.clear()
        again = self._epoch > 1
        log.log(logging.WARNING if again else logging.INFO, "connected to NATS%s", " again" * again)
        if self._first.is_set():
            for callback in self._callbacks:
                callback()
        self._first.set()

    def _next_server(self, servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
        """The server that failed least, among equals not the one that was just lost (it may hang), and how
        long to wait before trying it: hardly the first time, and with jitter, so that a thousand clients do
        not come back together."""
        with contextlib.suppress(AttributeError):  # nats-py leaves the socket of a failed try open
            self._client._transport.close()  # type: ignore[union-attr]
        lost = self._client._current_server if self._client is not None else None
        server = min(
            servers, key=lambda server: (server.reconnects, lost is not None and server.uri == lost.uri)
        )
        longest = min(RECONNECT_FIRST * 2.0 ** min(server.reconnects, 16), RECONNECT_MOST)
        return server, longest / 2 + self.chance.below(longest / 2)

    async def _on_error(self, error: Exception) -> None:
        self._note(error)
        if not (refusal := _REFUSAL.search(_text(error))):
            return
        what, subject = refusal[1].lower(), refusal[2].lower()
        if what == "publish" and len(self._forbidden) < FORBIDDEN_MAX:
            self._forbidden[subject] = _text(error)
        for kept in self._subscriptions:
            if what == "subscription" and kept.subject.lower() == subject:
                kept.refused = True
                self._changed.set()

    async def _on_disconnected(self) -> None:
        if not self._tasks.stopped:
            log.warning("disconnected from NATS (%s)", self._last_error)
        self._changed.set()

    async def _on_lame_duck(self) -> None:
        """The server is about to end. The only one there is stays: it takes no new connections any more."""
        if (client := self._client) is None:
            return
        elsewhere = len(client.servers) > 1
        log.warning(
            "the NATS server is ending: %s", "moving to another" if elsewhere else "waiting for its end"
        )
        if elsewhere:
            await client.force_reconnect()

    async def _on_reconnected(self) -> None:
        if self._client is not None:
            with contextlib.suppress(errors.Error, OSError):
                await self._place(self._client)
        self._connected()
        self._changed.set()

    async def _on_closed(self) -> None:
        self._changed.set()

    def _note(self, error: Exception) -> None:
        """Errors come with every try: each is logged once per lost connection. That the server hangs up
        after it said why is no news."""
        said = _text(error)
        if said not in self._said:
            log.warning("NATS: %s", said)
        if not (self._said and isinstance(error, ConnectionResetError)):
            self._last_error = said
        self._said[said] = None

    def _usable(self, data: bytes) -> Client:
        client = self._client
        if client is None or not client.is_connected:
            raise NotConnected(f"no connection to NATS at {_shown(self.servers)} ({self._last_error})")
        if len(data) + HEADERS_MAX > client.max_payload:
            raise TooLarge(f"a message of {len(data)} bytes, the server takes {client.max_payload}")
        return client

    def _wants_tls(self) -> bool:
        encrypted = any(url.startswith(("tls://", "wss://")) for url in _urls(self.servers))
        return self.options.get("tls") is not None or encrypted


def _message(msg: Msg) -> Message:
    return Message(msg.subject, msg.data, cast("Mapping[str, str]", msg.headers or {}))


async def _close(client: Client) -> None:
    """Let go of a client in whatever state it is; a driver that fails here must not stop anything."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await client.close()
    except Exception as error:
        log.debug("closing a NATS connection: %s", _text(error))


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shown(servers: str | Sequence[str]) -> str:
    """Addresses without what stands before an `@`: that may be a password."""
    return ", ".join(url.rpartition("@")[2].removeprefix("nats://") for url in _urls(servers))


def _urls(servers: str | Sequence[str]) -> list[str]:
    return [servers] if isinstance(servers, str) else list(servers)
