"""A pool as the application uses it: allocate and release ids, see whose an id is, hear of changes.

Allocating and releasing are local and synchronous. Not for use from several threads: all calls belong
to the event loop that the `Drsm` runs in.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drsm_sdk import changes
from drsm_sdk.errors import AgentUnavailable, BadRequest, DrsmError, PoolEmpty, PoolExhausted, SessionLost
from drsm_sdk.feed import Feed, Reader
from drsm_sdk.follow import Follower
from drsm_sdk.lease import Leases
from drsm_sdk.pods import Owner
from drsm_sdk.rpc import Rpc
from drsm_sdk.scan import InUse, Scanner
from drsm_sdk.session import Life, Listed, Session
from drsm_sdk.stock import Stock
from drsm_sdk.supply import Supply
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition

ALLOCATE_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class Stats:
    """How a pool fares in this pod.

    issued, free  ids issued, and ids that could be issued now
    resting       released ids in quarantine
    oldest        age of the longest issued id in seconds; one that only grows points to a leak
    chunks        chunks held, and of these `closed`: not issued from, before or in their scan
    wanted        free ids that the SDK tries to keep
    rate          ids per second that the stock lost of late: issued, less those free again
    """

    issued: int = 0
    free: int = 0
    resting: int = 0
    oldest: float = 0.0
    chunks: int = 0
    closed: int = 0
    wanted: int = 0
    rate: float = 0.0


class Pool:
    """Made by `Drsm.join`. Every id it issues is an int of the pool's width."""

    def __init__(self, name: str, session: Session, rpc: Rpc, in_use: InUse | None) -> None:
        self.name = name
        self.in_use = in_use
        self._session, self._rpc = session, rpc
        self._clock = session.clock
        self._scanner = Scanner(in_use) if in_use is not None else None
        self._feed: Feed[changes.Change] = Feed()
        self._news = asyncio.Event()
        self._waiting = 0
        self._lives = 0
        # What a session gives; without one: leases that never ran, and nothing in stock.
        self._leases = Leases()
        self._stock = self._nothing = Stock(Definition(name=name))
        self._supply: Supply | None = None
        self._me: Owner | None = None
        self._follower = Follower(
            rpc, session.subjects, name, clock=session.clock, chance=session.chance, heard=self._heard
        )
        self._following: list[asyncio.Task[Any]] = []

    # --- ids ------------------------------------------------------------------------------------

    def allocate_nowait(self) -> int:
        """An id that nobody else has. Raises PoolEmpty when there is no stock just now, AgentUnavailable
        when the allocation lease has run out, SessionLost while there is no session."""
        clock, leases, stock = self._clock, self._leases, self._stock
        now = clock()
        if now >= leases.issue_until:
            raise self._session.refusal()
        id_ = stock.take(now)
        supply = self._supply
        if supply is not None and stock.free < supply.wanted:
            supply.wake()
        if id_ is None:
            raise PoolEmpty(self.name)
        if clock() >= leases.issue_until:  # the process may have been paused since the first look (R4)
            stock.put_back(id_)
            raise self._session.refusal()
        return id_

    async def allocate(self, timeout: float = ALLOCATE_TIMEOUT) -> int:
        """An id that nobody else has, waiting up to `timeout` seconds for one.

        Raises PoolExhausted as soon as the agent confirms that no chunk is free; at the deadline PoolEmpty,
        AgentUnavailable with what went wrong last, or SessionLost while there is no session.
        """
        try:
            return self.allocate_nowait()
        except (PoolEmpty, AgentUnavailable, SessionLost) as error:
            refused: DrsmError = error
            if self._session.closing:
                raise
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                supply, verdicts = self._supply, self._supply.verdicts if self._supply else 0
                while True:
                    if self._supply is not None:
                        self._supply.urge()
                    await self._news.wait()
                    try:
                        return self.allocate_nowait()
                    except (PoolEmpty, AgentUnavailable, SessionLost) as error:
                        refused = error
                    if self._session.closing:
                        raise refused
                    if self._supply is not supply:
                        supply, verdicts = self._supply, 0
                    if supply is not None and supply.verdicts > verdicts:
                        raise PoolExhausted(self.name)
        except TimeoutError:
            raise self._why(refused) from None
        finally:
            self._waiting -= 1

    def release(self, id_: int) -> None:
        """Give an id back; it is issued again last, and not before its quarantine. Raises NotOwner or
        NotAllocated, and then nothing has changed. In a claimed chunk that is not scanned yet it changes
        nothing either: the scan decides. Raises BadRequest for what is no int."""
        if type(id_) is not int:  # True would be taken for 1, and issued later
            raise BadRequest(f"release: expected an id as int, found {type(id_).__name__}")
        self._stock.release(id_, self._clock())
        if self._waiting:
            self._changed()

    def valid(self, id_: int) -> bool:
        """Whether `id_` is still this pod's to use: issued here, or part of a claimed chunk, and the
        allocation lease has not run out. Ask again after any pause before acting on an id."""
        return self._clock() < self._leases.allocation_until and self._stock.issued(id_)

    def grant(self, id_: int) -> str:
        """The fencing token to store with `id_`, 16 hex digits: another one as soon as its chunk has had
        another owner. Raises NotOwner."""
        return self._stock.grant(id_)

    # --- the others -----------------------------------------------------------------------------

    def owner(self, id_: int) -> Owner | None:
        """Whose id it is, this pod's or another's; None when nobody owns its chunk."""
        stock = self._stock
        if (id_ >> stock.definition.block_bits) in stock:
            return self._me
        return self._follower.mirror.owner(id_)

    def pods(self) -> list[Owner]:
        """Every pod of the pool that is up or still owns a chunk, by name."""
        return self._follower.mirror.pods()

    @property
    def synced(self) -> bool:
        """Whether what `owner` and `pods` say was confirmed within the last six seconds."""
        return self._follower.synced

    def changes(self) -> "Reader[changes.Change]":
        """What happens to this pod's chunks from now on, to iterate over with `async for`. A reader that is
        slower than a thousand changes is told what it `Missed`."""
        return self._feed.read()

    @property
    def stats(self) -> Stats:
        now = self._clock()
        level = self._stock.level(now)
        wanted, rate = (self._supply.wanted, self._supply.rate) if self._supply else (0, 0.0)
        return Stats(
            issued=level.issued,
            free=level.free,
            resting=level.resting,
            oldest=level.oldest,
            chunks=level.chunks,
            closed=level.closed,
            wanted=wanted,
            rate=rate,
        )

    # --- for Drsm -------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Begin to follow the pool's events."""
        await self._follower.subscribe()
        start = self._session.tasks.start
        self._following = [
            start(self._follower.run(), f"follow-{self.name}"),
            start(self._follower.watch(), f"watch-{self.name}"),
        ]

    async def ready(self) -> None:
        """Wait until there is a table, and either stock or the verdict that there is none."""
        await self._follower.loaded.wait()
        self._waiting += 1
        try:
            while self._supply is None or not self._supply.first.is_set():
                await self._news.wait()
        finally:
            self._waiting -= 1

    def trouble(self) -> str:
        """What went wrong last, as far as is known."""
        supply = self._supply.trouble if self._supply is not None else None
        return str(supply or self._follower.trouble or self._rpc.trouble or "the answers took too long")

    async def close(self) -> None:
        self._follow_end()
        for task in self._following:
            task.cancel()
        await self._follower.stop()
        if self._scanner is not None:
            self._scanner.close()
        self._feed.close()

    # --- for Session ----------------------------------------------------------------------------

    def begin(self, life: Life, definition: Definition) -> None:
        """A session is open: build up a stock under it."""
        self._supply = Supply(
            self._session,
            life,
            definition,
            self._scanner,
            told=self._feed.publish,
            changed=self._changed,
        )
        self._stock, self._leases = self._supply.stock, life.leases
        self._me = Owner.of(self._session.owner(life), "live")
        self._lives += 1
        if self._lives > 1:
            self._feed.publish(changes.SessionRenewed(self.name, life.incarnation))
        self._changed()

    def end(self, reason: str) -> None:
        """It is over: nothing is issued from this moment on. The application is told, unless it asked."""
        stock = self._follow_end()
        if not self._session.closing and stock is not self._nothing:
            chunks = tuple(sorted(chunk.n for chunk in stock))
            self._feed.publish(
                changes.SessionLost(self.name, reason, chunks, changes.ranges(stock.all_issued()))
            )
        if self._session.tasks.failure is not None:
            self._feed.close()
        self._changed()

    def held(self) -> tuple[int, int]:
        return self._stock.held()

    def use(self) -> wire.Use:
        level = self._stock.level(self._clock())
        return wire.Use(level.issued, level.free, int(level.oldest * 1000), level.closed)

    def holdings(self) -> list[tuple[int, str, bool]]:
        """(number, grant, marked) of every chunk. Not of one on its way back: the agent may have had it, and
        granted it to another, before a restore made it forget both."""
        return [(chunk.n, chunk.grant, chunk.marked) for chunk in self._stock]

    def follow(self, listed: Sequence[Listed], version: wire.Version, said: wire.Stamp) -> None:
        if self._supply is not None:
            self._supply.follow(listed, version, said)

    def give_back(self, count: int) -> None:
        if self._supply is not None:
            self._supply.give_back(count)

    # --- inside ---------------------------------------------------------------------------------

    def _follow_end(self) -> Stock:
        """Let go of the supply; returns the stock as it was."""
        supply, stock = self._supply, self._stock
        self._supply, self._stock, self._me, self._leases = None, self._nothing, None, Leases()
        if supply is not None:
            supply.end()
        return stock

    def _heard(self, head: wire.EventHead, body: wire.EventBody) -> None:
        """Every event of the pool, as soon as it comes: some are about this pod."""
        life, supply = self._session.life, self._supply
        if life is None or supply is None:
            return
        me = (self._session.pod.name, life.incarnation)
        match body:
            case wire.PodDown(pod, reason) if _key(pod) == me:
                self._session.end(life, reason)
            case wire.ChunkClaimed(owner, _, chunks, grants, hold_ms) if _key(owner) == me:
                supply.claimed(list(zip(chunks, grants, strict=False)), hold_ms, head)
            case wire.ChunkClaimed(owner, previous, chunks) if _key(previous) == me:
                if any(n in self._stock for n in chunks):  # else given back before the database was restored
                    self._session.end(life, f"claimed by {owner.name}")
            case wire.ChunkReleased():
                if supply.trouble is not None:
                    supply.urge()

    def _changed(self) -> None:
        """Let everybody who waits look again."""
        if self._waiting:
            self._news.set()
            self._news = asyncio.Event()

    def _why(self, refused: DrsmError) -> DrsmError:
        """The error at the deadline: why there was no stock, where that is known."""
        trouble = self._supply.trouble if self._supply is not None else None
        if isinstance(refused, PoolEmpty) and isinstance(trouble, AgentUnavailable):
            return AgentUnavailable(trouble.reason)
        if isinstance(refused, PoolEmpty) and self._session.state != "live":
            return AgentUnavailable(self._rpc.trouble or "the agent is silent")
        return refused


def _key(ref: wire.OwnerRef) -> tuple[str, int]:
    return ref.name, ref.incarnation
