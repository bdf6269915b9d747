"""A consumer of one pool's table: maps ids to owners, and can never allocate."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from drsm_sdk import naming
from drsm_sdk.ambient import Chance, Clock, boottime
from drsm_sdk.changes import Reloaded
from drsm_sdk.errors import AgentUnavailable, BadRequest, Failed
from drsm_sdk.feed import Feed, Reader
from drsm_sdk.follow import Follower
from drsm_sdk.pods import Owner
from drsm_sdk.rpc import Rpc
from drsm_sdk.tasks import Tasks
from drsm_sdk.transport import NotConnected, Transport, on_nats
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import EventBody, EventHead
from drsm_sdk.wire.space import Item
from drsm_sdk.wire.subjects import PREFIX_DEFAULT

TIMEOUT = 5.0


class Demux:
    """Follows one pool. Use `async with Demux.connect(...) as demux`.

    Entering returns with a complete table; later gaps, agent changes and lost connections heal by
    themselves, and `synced` and `staleness` tell how far the table can be trusted meanwhile.
    """

    def __init__(
        self,
        transport: Transport,
        pool: str,
        *,
        prefix: str = PREFIX_DEFAULT,
        timeout: float = TIMEOUT,
        clock: Clock = boottime,
        chance: Chance | None = None,
    ) -> None:
        self.pool = naming.pool_name(pool)
        self._transport, self._timeout, self._clock = transport, timeout, clock
        chance = chance or Chance()
        self._feed: Feed[EventBody | Reloaded] = Feed()
        self._tasks = Tasks(self._broken)
        self._follower = Follower(
            Rpc(transport, clock, chance),
            naming.domain(prefix),
            pool,
            clock=clock,
            chance=chance,
            applied=self._applied,
            reloaded=self._reloaded,
        )
        self._mirror = self._follower.mirror

    @classmethod
    def connect(
        cls,
        url: str | Sequence[str],
        pool: str,
        *,
        prefix: str = PREFIX_DEFAULT,
        timeout: float = TIMEOUT,
        transport: Transport | None = None,
        clock: Clock = boottime,
        chance: Chance | None = None,
        **options: Any,
    ) -> Self:
        """A demux that will connect when it is entered; arguments as of `Drsm.connect`.

        Raises BadRequest for arguments that cannot be; entering raises AgentUnavailable after `timeout`
        seconds, BadRequest for a pool that the agent does not know.
        """
        chance = chance or Chance()
        transport = transport or on_nats(url, chance, f"drsm-demux-{pool}", options)
        return cls(transport, pool, prefix=prefix, timeout=timeout, clock=clock, chance=chance)

    def owner(self, id_: Item, *, space: str | None = None) -> Owner | None:
        """Whose id it is: `live`, or `down` when its chunks are about to move; None when nobody owns it.

        Of a pool with several spaces `space` names the id's. An address may be given as text, and stands for
        the prefix that it lies in. Raises BadRequest for what cannot be an id of the pool.
        """
        if self._tasks.failure is not None:
            raise Failed from self._tasks.failure
        try:
            return self._mirror.owner(id_, space)
        except ValueError as error:
            raise BadRequest(f"pool {self.pool}: {error}") from None

    @property
    def definition(self) -> Definition:
        """What the pool is. `definition.prefixes` tells the prefixes of chunks of addresses."""
        if self._mirror.definition is None:
            raise AgentUnavailable("no snapshot was taken yet")
        return self._mirror.definition

    def pods(self) -> list[Owner]:
        """Every pod of the pool that is up or still owns a chunk, by name."""
        return self._mirror.pods()

    def chunks(self) -> dict[int, Owner]:
        """The whole table as it stands: chunk number -> owner. For who programs routes by chunk."""
        return self._mirror.chunks()

    @property
    def synced(self) -> bool:
        """Whether the table is complete and was confirmed within the last six seconds."""
        return self._tasks.failure is None and self._follower.synced

    @property
    def staleness(self) -> float:
        """Seconds since the table was known to be what the database has."""
        return self._follower.staleness

    def events(self) -> "Reader[EventBody | Reloaded]":
        """The pool's events from now on, each once and after `owner` reflects it, to iterate over with
        `async for`; `Reloaded` where a snapshot stands for missed ones. A reader that is slower than a
        thousand events is told what it `Missed`."""
        return self._feed.read()

    async def __aenter__(self) -> Self:
        try:
            begun = self._clock()
            await self._transport.connect(self._timeout)
            async with asyncio.timeout(max(begun + self._timeout - self._clock(), 0)):
                await self._follower.subscribe()
                self._tasks.start(self._follower.run(), f"follow-{self.pool}")
                self._tasks.start(self._follower.watch(), f"watch-{self.pool}")
                await self._follower.settled.wait()
            if self._tasks.failure is not None:
                raise Failed from self._tasks.failure
            if isinstance(self._follower.trouble, BadRequest):
                raise self._follower.trouble
        except NotConnected as error:
            await self._close()
            raise AgentUnavailable(str(error)) from None
        except TimeoutError:
            trouble = self._follower.trouble
            await self._close()
            raise AgentUnavailable(
                f"no snapshot of pool {self.pool} within {self._timeout:g} s: {trouble or 'no answer'}"
            ) from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()
        if error is None and self._tasks.failure is not None:
            raise Failed from self._tasks.failure

    def _applied(self, _head: EventHead, body: EventBody) -> None:
        self._feed.publish(body)

    def _reloaded(self) -> None:
        self._feed.publish(Reloaded(self.pool, self._mirror.version))

    def _broken(self) -> None:
        """A background task broke: whoever waits shall hear of it at once."""
        self._feed.close()
        self._follower.settled.set()

    async def _close(self) -> None:
        await self._tasks.stop()
        await self._follower.stop()
        self._feed.close()
        await self._transport.close()
