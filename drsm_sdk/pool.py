"""A pool as the application uses it: allocate and release ids, see whose an id is, hear of changes.

Allocating and releasing are local and synchronous. Not for use from several threads: all calls belong
to the event loop that the `Drsm` runs in.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from drsm_sdk import changes
from drsm_sdk.errors import (
    AgentUnavailable,
    BadRequest,
    DrsmError,
    NotOwner,
    PoolEmpty,
    PoolExhausted,
    SessionLost,
)
from drsm_sdk.feed import Feed, Reader
from drsm_sdk.follow import Follower
from drsm_sdk.lease import Leases
from drsm_sdk.mirror import GO_INCARNATION
from drsm_sdk.pods import Owner
from drsm_sdk.rpc import Rpc
from drsm_sdk.scan import InUse, Scanner
from drsm_sdk.session import Life, Listed, Session
from drsm_sdk.stock import Stock
from drsm_sdk.supply import Supply
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import INTEGER, Item

ALLOCATE_TIMEOUT = 1.0

T = TypeVar("T")
Beside = tuple[str, Item]
"""A space and an id in it."""


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
    """Made by `Drsm.join`. An id is an int of the pool's width; in a pool of addresses an IPv4Address or
    IPv6Address, or an IPv6Network (IPv4Network) where each id is a prefix."""

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
        self._refused: BadRequest | None = None
        # What a session gives; without one: leases that never ran, and nothing in stock.
        self._leases = Leases()
        self._define(Definition(name=name))
        self._stock = self._nothing
        self._supply: Supply | None = None
        self._me: Owner | None = None
        self._follower = Follower(
            rpc,
            session.subjects,
            name,
            clock=session.clock,
            chance=session.chance,
            heard=self._heard,
            reloaded=self._redefine,
        )
        self._following: list[asyncio.Task[Any]] = []

    # --- ids ------------------------------------------------------------------------------------

    def allocate_nowait(self, *, space: str | None = None, beside: Beside | None = None) -> Item:
        """An id that nobody else has; of a pool with several spaces, of the one that is named.

        `beside` names a space and an id of this pod in it, and the new one is of the same chunk. Raises
        PoolEmpty when there is no stock just now, AgentUnavailable when the allocation lease has run out,
        SessionLost while there is no session, BadRequest for a space that is not there, or when the session
        was opened anew and the agents have no such pool any more.
        """
        clock, leases, stock = self._clock, self._leases, self._stock
        now = clock()
        if now >= leases.issue_until:
            raise self._refusal()
        place = 0 if space is None and self._single else self._place(space)
        id_ = stock.take(now, place) if beside is None else stock.take_beside(now, place, self._near(beside))
        supply = self._supply
        if supply is not None and stock.free < supply.wanted:
            supply.wake()
        if id_ is None:
            raise PoolEmpty(self.name)
        item = id_ if self._plain else self._parts[place].item(id_)
        if clock() >= leases.issue_until:  # the process may have been paused since the first look (R4)
            stock.put_back(id_, place)
            raise self._refusal()
        return item

    def allocate_set_nowait(self, *spaces: str) -> dict[str, Item]:
        """An id of each of these spaces (without arguments of all), all of one chunk: whoever claims it has
        all of them. Raises as `allocate_nowait`."""
        clock, leases, stock = self._clock, self._leases, self._stock
        now = clock()
        if now >= leases.issue_until:
            raise self._refusal()
        places = tuple(map(self._place, spaces)) if spaces else tuple(range(len(self._parts)))
        if len(set(places)) < len(places):
            raise BadRequest(f"pool {self.name}: expected each space once, found {', '.join(spaces)}")
        ids = stock.take_set(now, places)
        supply = self._supply
        if supply is not None and stock.free < supply.wanted:
            supply.wake()
        if ids is None:
            if supply is not None:
                supply.lack()
            raise PoolEmpty(self.name)
        items = {self._parts[i].name: self._parts[i].item(id_) for i, id_ in zip(places, ids, strict=True)}
        if clock() >= leases.issue_until:
            for i, id_ in zip(places, ids, strict=True):
                stock.put_back(id_, i)
            raise self._refusal()
        return items

    async def allocate(self, timeout: float = ALLOCATE_TIMEOUT, *, space: str | None = None) -> Item:
        """An id that nobody else has, waiting up to `timeout` seconds for one.

        Raises PoolExhausted as soon as the agent confirms that no chunk is free; at the deadline PoolEmpty,
        AgentUnavailable with what went wrong last, or SessionLost while there is no session.
        """
        return await self._waiting_for(partial(self.allocate_nowait, space=space), timeout)

    async def allocate_set(self, *spaces: str, timeout: float = ALLOCATE_TIMEOUT) -> dict[str, Item]:
        """As `allocate_set_nowait`, waiting and raising as `allocate`."""
        return await self._waiting_for(partial(self.allocate_set_nowait, *spaces), timeout)

    async def _waiting_for(self, draw: Callable[[], T], timeout: float) -> T:
        try:
            return draw()
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
                        return draw()
                    except (PoolEmpty, AgentUnavailable, SessionLost) as error:
                        refused = error
                    if self._session.closing:
                        raise refused
                    if self._supply is not supply:
                        supply, verdicts = self._supply, 0
                    if supply is not None and supply.verdict and supply.verdicts > verdicts:
                        raise PoolExhausted(self.name, supply.verdict.said, supply.verdict.wait)
        except TimeoutError:
            raise self._why(refused) from None
        finally:
            self._waiting -= 1

    def release(self, id_: Item, *, space: str | None = None) -> None:
        """Give an id back; it is issued again last, and not before its quarantine. Raises NotOwner or
        NotAllocated, and then nothing has changed. In a claimed chunk that is not scanned yet it changes
        nothing either: the scan decides. Raises BadRequest for what cannot be an id."""
        place = 0 if space is None and self._single else self._place(space)
        if not self._plain:
            id_ = self._ordinal(id_, place)
        elif type(id_) is not int:  # True would be taken for 1, and issued later
            raise BadRequest(f"release: expected an id as int, found {type(id_).__name__}")
        self._stock.release(id_, self._clock(), place)
        if self._waiting:
            self._changed()

    def valid(self, id_: Item, *, space: str | None = None) -> bool:
        """Whether `id_` is still this pod's to use: issued here, or part of a claimed chunk, and the
        allocation lease has not run out. Ask again after any pause before acting on an id."""
        if self._clock() >= self._leases.allocation_until:
            return False
        if self._plain and space is None and id_.__class__ is int:
            return self._stock.issued(id_)
        place = self._place(space)
        ordinal = self._located(id_, place)
        return ordinal is not None and self._stock.issued(ordinal, place)

    def grant(self, id_: Item, *, space: str | None = None) -> str:
        """The fencing token to store with `id_`, 16 hex digits: another one as soon as its chunk has had
        another owner. Raises NotOwner."""
        if self._plain and space is None and id_.__class__ is int:
            return self._stock.grant(id_)
        place = self._place(space)
        return self._stock.grant(self._ordinal(id_, place), place)

    # --- the others -----------------------------------------------------------------------------

    def owner(self, id_: Item, *, space: str | None = None) -> Owner | None:
        """Whose id it is, this pod's or another's; None when nobody owns its chunk. An address may be given
        as text, and stands for the prefix that it lies in. Raises BadRequest for what cannot be an id."""
        plain = self._plain and space is None and id_.__class__ is int
        n: int | None = id_ >> self._defined.block_bits if plain else self._chunk_of(id_, space)
        if n is None:
            return None
        return self._me if n in self._stock else self._follower.mirror.owner_of(n)

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

    @property
    def definition(self) -> Definition:
        """What the pool is. Before a first session it is not known, and a default."""
        return self._defined

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
        self._stock, self._leases, self._refused = self._supply.stock, life.leases, None
        self._define(definition)
        self._me = Owner.of(self._session.owner(life), "live")
        self._lives += 1
        if self._lives > 1:
            self._feed.publish(changes.SessionRenewed(self.name, life.incarnation))
        self._changed()

    def end(self, reason: str) -> None:
        """It is over: nothing is issued from this moment on. The application is told, unless it asked."""
        stock, self._refused = self._follow_end(), None
        if not self._session.closing and stock is not self._nothing:
            chunks = tuple(sorted(chunk.n for chunk in stock))
            self._feed.publish(
                changes.SessionLost(
                    self.name, reason, chunks, changes.issued_ids(stock.definition, stock.all_issued())
                )
            )
        if self._session.tasks.failure is not None:
            self._feed.close()
        self._changed()

    def refuse(self, error: BadRequest) -> None:
        """There is a session, but the agent does not let it join this pool, for now at least."""
        self._refused = error
        self._changed()

    def resume(self) -> None:
        """A lease that had run out was renewed: what is in stock may be issued, or more be asked for."""
        if self._supply is not None:
            self._supply.wake()
        self._changed()

    def held(self) -> tuple[int, int]:
        return self._stock.held()

    def use(self) -> wire.Use:
        level = self._stock.level(self._clock())
        oldest_ms = int(level.oldest * 1000)
        return wire.Use(level.issued, level.free, oldest_ms, level.closed, self._stock.releases)

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

    def _define(self, definition: Definition) -> None:
        self._defined, self._parts, self._nothing = definition, definition.parts, Stock(definition)
        self._single = len(self._parts) == 1
        self._plain = self._single and self._parts[0].kind == INTEGER

    def _redefine(self) -> None:
        """A new snapshot, and perhaps a new definition with it."""
        definition, supply = self._follower.mirror.definition, self._supply
        if supply is not None and definition is not None and definition.revision > self._defined.revision:
            supply.redefine(definition)
            self._define(definition)

    def _chunk_of(self, id_: Item, space: str | None) -> int | None:
        try:
            return self._defined.chunk_of(id_, space)
        except ValueError as error:
            raise BadRequest(f"pool {self.name}: {error}") from None

    def _place(self, space: str | None) -> int:
        """The place of a space among the pool's. Raises BadRequest."""
        try:
            return self._defined.index(space)
        except ValueError as error:
            raise BadRequest(f"pool {self.name}: {error}") from None

    def _located(self, id_: Item, place: int) -> int | None:
        """The ordinal of an id; None for one outside of the space. Raises BadRequest."""
        try:
            return self._parts[place].ordinal(id_)
        except ValueError as error:
            raise BadRequest(f"pool {self.name}: {error}") from None

    def _ordinal(self, id_: Item, place: int) -> int:
        """The same; raises NotOwner for an id outside of the space."""
        ordinal = self._located(id_, place)
        if ordinal is None:
            raise NotOwner(self.name, id_)
        return ordinal

    def _near(self, beside: Beside) -> int:
        space, id_ = beside
        place = self._place(space)
        return self._ordinal(id_, place) >> self._parts[place].block_bits

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
            case wire.ChunkClaimed(owner, previous, chunks, grants, hold_ms) if _key(owner) == me:
                pairs = list(zip(chunks, grants, strict=False))
                supply.claimed(pairs, hold_ms, head, anew=_key(previous) == me)
            case wire.ChunkClaimed(owner, previous, chunks) if _key(previous) == me:
                if owner.incarnation == GO_INCARNATION:  # a Go pod asks nobody whether this one lives
                    supply.claimed_away(chunks, owner.name, head)
                elif any(
                    n in self._stock for n in chunks
                ):  # else given back before the database was restored
                    self._session.end(life, f"claimed by {owner.name}")
            case wire.Sync(revision=revision):
                supply.announced(revision, head.term)
                self._redefine()  # also where the session was opened by a leader with an older definition
            case wire.ChunkReleased():
                if supply.trouble is not None:
                    supply.urge()

    def _refusal(self) -> DrsmError:
        """Why nothing may be issued just now."""
        if self._supply is not None or self._session.life is None:
            return self._session.refusal()
        return self._refused or AgentUnavailable(f"pool {self.name} is being joined again")

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
        if isinstance(refused, PoolEmpty) and isinstance(trouble, BadRequest):
            return BadRequest(str(trouble), trouble.error)
        if isinstance(refused, PoolEmpty) and self._session.state != "live":
            return AgentUnavailable(self._rpc.trouble or "the agent is silent")
        return refused


def _key(ref: wire.OwnerRef) -> tuple[str, int]:
    return ref.name, ref.incarnation
