"""What the SDK needs of a message bus, as narrow as it can be; `nats_transport` has it on NATS.

Nothing is kept for later: what cannot be sent now raises. Whoever implements this in memory, with
virtual time, can run the whole SDK in a simulator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from drsm_sdk.ambient import Chance


class TransportError(Exception):
    """Base of what a transport raises; the text says what happened."""


class NotConnected(TransportError):
    """There is no connection just now."""


class NoResponders(TransportError):
    """Nobody listens on the subject: there is no leader just now."""


class NoAnswer(TransportError):
    """No answer came in time. Whether the request was heard is unknown."""


class TooLarge(TransportError):
    """The message is larger than the server takes."""


@dataclass(frozen=True, slots=True)
class Message:
    """What arrived: an event, or an answer."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def anything(_: Message) -> bool:
    """Wants whatever comes."""
    return True


Callback = Callable[[Message], None]
"""Called in the event loop for each message, in order; must neither wait nor raise."""


class Subscription(Protocol):
    async def stop(self) -> None:
        """No further call of the callback after this returns."""


class Transport(Protocol):
    """A connection that comes and goes by itself. Its methods raise nothing but TransportErrors."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""

    @property
    def epoch(self) -> int:
        """How many times a connection was made; another number means that messages may have been lost."""

    async def connect(self, timeout: float) -> None:
        """Begin to connect, and go on for good. Returns with the first connection; raises NotConnected
        with the last error after `timeout` seconds, and then goes on trying until `close`."""

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Hand a message to the connection. Raises NotConnected or TooLarge."""

    async def subscribe(self, subject: str, callback: Callback) -> Subscription:
        """Call `callback` for each message, over all later connections too."""

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[Message], bool] = anything
    ) -> Message:
        """Ask and wait up to `timeout` seconds for the first answer that is `wanted`. Raises NotConnected,
        NoResponders, NoAnswer or TooLarge."""

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        """Ask, and hand every answer to `done` until it returns True. Raises as `request`; NoAnswer when
        `done` was not satisfied in `timeout` seconds."""

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each connection but the first."""

    async def close(self) -> None:
        """Disconnect for good; bounded, and never raises."""


def on_nats(servers: str | Sequence[str], chance: Chance, name: str, options: Mapping[str, Any]) -> Transport:
    """The transport on NATS; `options` are nats-py's. Raises BadRequest for those that cannot be."""
    # Only here: nats-py takes longer to import than all the rest, and not everybody needs it.
    from drsm_sdk.nats_transport import NatsTransport  # noqa: PLC0415

    return NatsTransport(servers, chance, name, options)
