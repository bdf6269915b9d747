"""A message bus in memory, behind the interface that the SDK has for NATS (`drsm_sdk.transport`).

As on NATS: who is not connected gets nothing, now or later; each subscriber gets messages in the order in
which they were published; a request that nobody serves is told so at once. All of it in one event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from drsm_sdk.transport import (
    Callback,
    Message,
    NoAnswer,
    NoResponders,
    NotConnected,
    TooLarge,
    anything,
)

log = logging.getLogger("drsm_sdk.testing")

PAYLOAD_MAX = 1024 * 1024  # bytes; what a nats-server takes by default

Reply = Callable[[Message], None]
Receiver = Callable[[str, bytes, Reply], None]
"""Takes a request: its subject, its bytes, and what to call with each answer. Must neither wait nor raise."""


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` gets `subject`; of NATS' wildcards only a trailing `>`."""
    if pattern.endswith(".>"):
        return subject.startswith(pattern[:-1]) and len(subject) >= len(pattern)
    return subject == pattern


class Bus:
    """Who is connected, and who answers requests."""

    def __init__(self) -> None:
        self.connections: list[MemoryTransport] = []
        self._served = ""
        self._receiver: Receiver | None = None

    def serve(self, pattern: str, receiver: Receiver) -> None:
        """From now on `receiver` gets the requests whose subject matches."""
        self._served, self._receiver = pattern, receiver

    def serve_no_more(self) -> None:
        """From now on requests have no responders."""
        self._receiver = None

    def publish(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Deliver to all that are connected and subscribed, in the next turn of the event loop."""
        message = Message(subject, data, headers)
        for connection in self.connections:
            connection.deliver(message)

    def ask(self, subject: str, data: bytes, reply: Reply) -> None:
        """Hand a request over. Raises NoResponders."""
        if self._receiver is None or not matches(self._served, subject):
            raise NoResponders("no agent leads just now (no responders)")
        self._receiver(subject, data, reply)


@dataclass(slots=True, eq=False)
class MemorySubscription:
    """What `MemoryTransport.subscribe` returns."""

    pattern: str
    callback: Callback
    stopped: bool = False

    async def stop(self) -> None:
        self.stopped = True


class MemoryTransport:
    """One connection to a `Bus`; a Transport for `Drsm.connect` and `Demux.connect`. `name` says whose."""

    def __init__(self, bus: Bus, name: str = "") -> None:
        self.name = name
        self._bus = bus
        self._wanted, self._cut = False, False
        self._epoch = 0
        self._first = asyncio.Event()
        self._subscriptions: list[MemorySubscription] = []
        self._callbacks: list[Callable[[], None]] = []
        bus.connections.append(self)

    # --- what tests may do to it ----------------------------------------------------------------

    def cut(self) -> None:
        """The connection breaks: nothing goes out or comes in, what is under way is lost. Until `mend`."""
        self._cut = True

    def kill(self) -> None:
        """The connection breaks for good: whoever had it is dead."""
        self._cut, self._wanted = True, False
        if self in self._bus.connections:
            self._bus.connections.remove(self)

    def mend(self) -> None:
        """It is made again, as a new connection; does nothing unless it was cut."""
        if self._cut:
            self._cut = False
            self._connected()

    # --- drsm_sdk.transport.Transport -----------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._wanted and not self._cut

    @property
    def epoch(self) -> int:
        return self._epoch

    async def connect(self, timeout: float) -> None:
        self._wanted = True
        if not self._cut:
            self._connected()
        try:
            async with asyncio.timeout(timeout):
                await self._first.wait()
        except TimeoutError:
            raise NotConnected(f"no connection within {timeout:g} s (cut by the test)") from None

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._check(data)
        self._bus.publish(subject, data, dict(headers or {}))

    async def subscribe(self, subject: str, callback: Callback) -> MemorySubscription:
        subscription = MemorySubscription(subject, callback)
        self._subscriptions = [kept for kept in self._subscriptions if not kept.stopped]
        self._subscriptions.append(subscription)
        return subscription

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
        self._check(data)
        answers: asyncio.Queue[Message] = asyncio.Queue()
        epoch = self._epoch
        self._bus.ask(subject, data, lambda message: self._soon(epoch, answers.put_nowait, message))
        try:
            async with asyncio.timeout(timeout):
                while not done(await answers.get()):
                    pass
        except TimeoutError:
            raise NoAnswer(f"no complete answer within {timeout:.1f} s") from None

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        self._wanted = False
        self._subscriptions.clear()
        self._callbacks.clear()
        if self in self._bus.connections:
            self._bus.connections.remove(self)

    # --- for the bus ----------------------------------------------------------------------------

    def deliver(self, message: Message) -> None:
        """Hand a message to the subscriptions there are now, in the next turn of the event loop."""
        for subscription in self._subscriptions:
            if matches(subscription.pattern, message.subject):
                self._soon(self._epoch, _call, subscription, message)

    # --- inside ---------------------------------------------------------------------------------

    def _connected(self) -> None:
        if not self._wanted:
            return
        self._epoch += 1
        if self._first.is_set():
            for callback in self._callbacks:
                callback()
        self._first.set()

    def _soon(self, epoch: int, take: Callable[..., None], *arguments: object) -> None:
        """Unless the connection of this `epoch` is gone now, or by then."""

        def arrive() -> None:
            if self.connected and self._epoch == epoch:
                take(*arguments)

        if self.connected and self._epoch == epoch:
            asyncio.get_running_loop().call_soon(arrive)

    def _check(self, data: bytes) -> None:
        if not self.connected:
            raise NotConnected("no connection (cut by the test, or closed)")
        if len(data) > PAYLOAD_MAX:
            raise TooLarge(f"a message of {len(data)} bytes, the bus takes {PAYLOAD_MAX}")


def _call(subscription: MemorySubscription, message: Message) -> None:
    if subscription.stopped:
        return
    try:
        subscription.callback(message)
    except Exception:  # as the transport on NATS: one reader's fault is not the bus's
        log.exception("reading a message on %s failed", message.subject)
