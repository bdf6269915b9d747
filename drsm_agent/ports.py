"""What the agent needs of the world, as narrow as it can be: a store, a bus, a clock, chance.

`store` and `bus` implement these on MongoDB and NATS; the in-memory twins implement them for tests and
for the simulator. The agent's tasks know only what is written here (and asyncio's own clock to sleep).
"""

import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from drsm_agent.core.documents import Document
from drsm_agent.core.table import Change
from drsm_agent.core.writes import Outcome, Write

Clock = Callable[[], float]
"""Seconds of a clock that never goes back; only differences count."""

WallClock = Callable[[], float]
"""Seconds since the epoch: for `expireAt` of mirrors and for people, never for a decision."""


def boottime() -> float:
    """Seconds of a clock that goes on while the machine is suspended, so that no lease outlives a sleep."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Chance:
    """Randomness, as a part that a simulator replaces by a seeded one."""

    def token(self) -> str:
        """16 hex digits that nobody guesses: grants, histories."""
        return secrets.token_hex(8)

    def below(self, n: int) -> int:
        return secrets.randbelow(n)

    def jitter(self, seconds: float) -> float:
        """`seconds`, up to a tenth less or more."""
        return seconds * random.uniform(0.9, 1.1)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All documents of the followed spaces as they were at one cluster time `at`."""

    at: int
    spaces: Mapping[str, Sequence[Document]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes in oplog order. `token` resumes right after them, also when there were none; changes of one
    clusterTime may be split over two batches, so a token is saved only between two clusterTimes."""

    changes: Sequence[Change]
    token: str


class Store(Protocol):
    """The one truth. Every method raises StoreUnavailable within a bounded time when it cannot answer.

    A space is a pool's collection, named as the pool, or one of the agent's own (`drsm_...`).
    """

    async def write(self, writes: Sequence[Write]) -> Outcome:
        """Carry out guarded writes in one space as one unordered bulk, acknowledged by a majority."""

    async def read(self, space: str) -> list[Document]:
        """All documents of one of the agent's small spaces, as a majority has them."""

    async def snapshot(self) -> Snapshot:
        """Read sessions, stamps and all pools at one cluster time."""

    def changes(self, *, after: int | None = None, token: str | None = None) -> AsyncGenerator[Batch, None]:
        """Every change of those spaces after a snapshot's cluster time, or after a token; without end.

        Idle batches come too, about once a second. Raises PositionLost when it can never go on from
        there, StoreUnavailable when it may later.
        """

    async def ttl(self, space: str) -> int | None:
        """After how many seconds beyond `expireAt` documents of a space are deleted; None if never."""

    async def has_chunks(self, space: str, database: str | None = None) -> bool:
        """Whether a pool's collection has a chunk; in another database, if one is named."""

    async def has_go(self, space: str) -> bool:
        """Whether a pool's collection has a document that a Go pod wrote and no agent has touched."""

    async def elsewhere(self, spaces: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Other databases in which collections of these names have chunks, as far as they may be read."""

    async def close(self) -> None:
        """Let go of all connections."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as it came from the bus. `reply` is empty where nobody waits."""

    subject: str
    data: bytes
    reply: str


Handler = Callable[[Incoming], Awaitable[None]]


class Subscription(Protocol):
    async def stop(self) -> None:
        """No further call of the handler after this returns."""


class Bus(Protocol):
    """NATS as the agent sees it. Nothing is kept for later: what cannot be sent now raises."""

    @property
    def connected(self) -> bool: ...

    @property
    def reconnects(self) -> int: ...

    @property
    def errors(self) -> int:
        """How many errors the connection has reported."""

    @property
    def forbidden(self) -> str:
        """What the server said when it refused an event, or a subscription, for want of a permission; empty
        if it did not."""

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have, headers included."""

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Call `handler` for each message, one after another: it must not wait. Once this returns, the
        server knows of it. Raises BusUnavailable, Forbidden."""

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """Hand a message to the connection. Raises BusUnavailable while there is none, TooLarge."""

    async def carried(self) -> None:
        """Return once the server has all that was handed over so far: who sends much waits for it, so that
        others need not. BusUnavailable if the connection changed meanwhile."""

    async def flush(self) -> None:
        """The same for events: BusUnavailable also if the server refused one since the last flush."""

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[bytes], bool]
    ) -> bytes:
        """Ask and wait for the first answer that is `wanted`. Raises BusUnavailable without one after
        `timeout` seconds."""

    async def broken(self) -> str:
        """Returns the reason once the connection is closed for good, and not before."""

    async def close(self) -> None:
        """Send what is pending and disconnect."""
