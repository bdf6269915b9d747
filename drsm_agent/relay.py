"""Log -> events on NATS -> flush -> position saved. What only the leader publishes goes through here.

The order is the guarantee (G4): an event is published and the server has it before any answer that
depends on it, and the position moves on only after that. What was not confirmed is published again;
consumers drop what they hold already.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from drsm_agent.core import events as ev
from drsm_agent.core import writes
from drsm_agent.core.documents import Owner
from drsm_agent.core.events import Event, Version
from drsm_agent.core.position import Position
from drsm_agent.core.table import STAMPS
from drsm_agent.core.writes import Outcome, Write
from drsm_agent.errors import BusUnavailable, LeadLost, StoreUnavailable, Unheard
from drsm_agent.feed import Entry, Feed, State
from drsm_agent.flight import Flight
from drsm_agent.lead import Lead
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Bus, Store, WallClock
from drsm_sdk.wire import codec, messages
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import EventBody, EventHead, OwnerRef, Prefixes
from drsm_sdk.wire.subjects import Subjects

SYNC_INTERVAL = 2.0
POSITION_INTERVAL = 1.0
"""How much is published twice at most after a crash, in seconds of events."""
IDLE_INTERVAL = 2.0
"""How long after its start a standby may have to wait until it could go on in the same history."""
FLUSH_RETRY = 0.2
SHOWN_TIMEOUT = 4.0
"""A change that was written comes back in the stream within milliseconds; after this long something is
down, and the requester is told to try again. (Meanwhile its repeats join the same flight.)"""

log = structlog.get_logger("drsm_agent.relay")
Key = tuple[str, str]


class Relay:
    """Publishes one lead's events, and tells when a change has been published."""

    def __init__(
        self,
        *,
        tasks: asyncio.TaskGroup,
        state: State,
        feed: Feed,
        store: Store,
        bus: Bus,
        lead: Lead,
        subjects: Subjects,
        metrics: Metrics,
        wall_clock: WallClock,
        definitions: Mapping[str, Definition],
        history: str,
    ) -> None:
        self._state, self._feed, self._store, self._bus = state, feed, store, bus
        self._lead, self._subjects, self._metrics, self._wall_clock = lead, subjects, metrics, wall_clock
        self._definitions = definitions
        addressed = max(sum(bool(part.ranges) for part in one.parts) for one in definitions.values())
        self._most = messages.CHUNKS_PER_EVENT // (1 + addressed)  # a prefix is as long as a grant
        self.history = history
        self.published = 0
        self._expected: dict[Key, set[asyncio.Future[None]]] = defaultdict(set)
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._position: Position | None = None
        self._saved: Position | None = None
        self._barriers: Flight[None, None] = Flight(tasks, self._touch)
        self._unknown = self._read_back = 0
        """Writes of unknown outcome, and how many of them the table has shown since."""

    # --- What requests and claims use -----------------------------------------------------------

    async def commit(self, decided: Sequence[Write], shown: Callable[[], bool] = lambda: True) -> Outcome:
        """Write, and return once all that it changed was published, and the server has it.

        Raises StoreUnavailable when the outcome is unknown, LeadLost. A guard that did not match is no
        error: look at the table, which has then passed the write. `shown` says whether the table shows the
        result, where another change of the same documents may be under way and be taken for it.
        """
        self._lead.check()
        keys = [(write.space, write.key) for write in decided]
        expected = self._expect(keys)
        try:
            outcome = await self._store.write(decided)
            if outcome.changed == len(decided):
                await _within(SHOWN_TIMEOUT, asyncio.gather(*expected))
            if outcome.changed != len(decided) or not shown():
                await self.barrier()
        except StoreUnavailable:
            self._unknown += 1
            raise
        finally:
            self._expect_no_more(keys, expected)
        return outcome

    async def read_back(self) -> None:
        """After a write whose outcome is unknown: return once the table shows what became of it. Who is
        about to decide the same again calls this first, and then looks at the table."""
        unknown = self._unknown
        if self._read_back < unknown:
            await self.barrier()
            self._read_back = max(self._read_back, unknown)

    async def write_unseen(self, decided: Sequence[Write]) -> None:
        """Write what is no event, so that nobody waits to see it: keepalive mirrors."""
        self._lead.check()
        await self._store.write(decided)

    async def barrier(self) -> None:
        """Return once everything that was written before this call is in the table and was published."""
        await self._barriers.board(object(), None)

    async def caught_up(self) -> None:
        """Return once everything that the table shows at this moment was published."""
        if self.published >= self._state.table.applied:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._state.table.applied, future))
        await _within(SHOWN_TIMEOUT, future)

    async def _touch(self, passengers: Sequence[None]) -> Sequence[None]:
        self._lead.check()
        number = self._lead.next_touch()
        outcome = await self._store.write([writes.touch_stamp(self._lead.term, self._lead.agent, number)])
        if not outcome.changed:
            raise LeadLost("an agent of a higher term has stamped the sessions")
        await _within(SHOWN_TIMEOUT, self._until_shown(number))
        return passengers

    async def _until_shown(self, number: int) -> None:
        """Not any touch will do: those before it, also the last leader's, come back later than they were
        written, too."""
        keys = [(STAMPS, "stamp")]
        while not self._shows_touch(number):
            expected = self._expect(keys)
            try:
                await expected[0]
            finally:
                self._expect_no_more(keys, expected)
        await self.caught_up()

    def _shows_touch(self, number: int) -> bool:
        """Whether the table has passed a touch of this term, or a later one."""
        stamp = self._state.table.stamp
        return stamp.get("term") == self._lead.term and int(stamp.get("number") or 0) >= number

    def _expect(self, keys: Iterable[Key]) -> list[asyncio.Future[None]]:
        futures = []
        for key in keys:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._expected[key].add(future)
            futures.append(future)
        return futures

    def _expect_no_more(self, keys: Sequence[Key], futures: Sequence["asyncio.Future[None]"]) -> None:
        for key, future in zip(keys, futures, strict=True):
            future.cancel()
            if waiting := self._expected.get(key):
                waiting.discard(future)
                if not waiting:
                    del self._expected[key]

    # --- Publishing -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish what the feed logs, a `sync` of every pool each SYNC_INTERVAL, and save the position."""
        loop = asyncio.get_running_loop()
        sync_at = loop.time()
        save_at = loop.time() + POSITION_INTERVAL
        reached, idle_at = 0, loop.time() + IDLE_INTERVAL
        while True:
            # Syncs are of the table at this moment: just what consumers have once these entries are out.
            # One pass a turn, as the log is never empty while changes never cease.
            entries = list(self._state.log)
            # Until the table has passed this leader's stamp, it may lack what the last one has told of: syncs
            # would contradict that one's, and the saved position go back.
            stamped = self._shows_touch(1)
            syncs = self._syncs() if stamped and loop.time() >= sync_at else []
            await self._publish(entries)
            if syncs:
                await self._delivered(partial(self._send_syncs, syncs))
                sync_at = loop.time() + SYNC_INTERVAL
            if loop.time() >= save_at:
                if stamped:
                    await self._save_position()
                save_at = loop.time() + POSITION_INTERVAL
            if (at := self._position.at if self._position else 0) != reached:
                reached, idle_at = at, loop.time() + IDLE_INTERVAL
            elif loop.time() >= idle_at:
                await self._move()
                idle_at = loop.time() + IDLE_INTERVAL
            try:
                async with asyncio.timeout_at(min(sync_at, save_at) if stamped else save_at):
                    await self._feed.news()
            except TimeoutError:
                continue

    async def publish_log(self, above: dict[str, Version] | None = None) -> None:
        """Publish everything logged so far; of each pool only what is above a version, if given. What comes
        meanwhile `run` publishes: Go pods write also while nobody leads, perhaps without end."""
        await self._publish(list(self._state.log), above)

    async def _publish(self, entries: Sequence[Entry], above: dict[str, Version] | None = None) -> None:
        if not entries:
            return
        events = [event for entry in entries for event in entry.events]
        if above is not None:
            events = [event for event in events if event.version > above[event.pool]]
        if events:
            merged = ev.coalesce(events, most=self._most)
            await self._delivered(partial(self._send_events, merged))
        self._settle(entries)
        self._feed.shorten(self._state, entries[-1].index)

    async def send_resets(self, reason: str) -> None:
        """A new history begins: every consumer takes a snapshot."""
        await self._delivered(partial(self._send_resets, messages.Reset(reason)))

    async def _send_resets(self, reset: messages.Reset) -> None:
        for pool in self._state.table.pools.values():
            await self._send(pool.name, reset, (pool.version, pool.version), self.history)

    async def _send_events(self, events: Sequence[Event]) -> None:
        for event in events:
            body = event_body(event, self._definitions[event.pool].prefixes(event.chunks))
            await self._send(event.pool, body, (event.version, event.prev), event.token)

    def _syncs(self) -> list[tuple[str, messages.Sync, Version]]:
        """What the table says at this moment, of each pool and at which version."""
        return [
            (
                pool.name,
                messages.Sync(
                    pods=len(pool.live),
                    chunks=len(pool.chunks),
                    checksum=pool.checksum,
                    revision=self._definitions[pool.name].revision,
                ),
                pool.version,
            )
            for pool in self._state.table.pools.values()
        ]

    async def _send_syncs(self, syncs: Sequence[tuple[str, messages.Sync, Version]]) -> None:
        for pool, sync, version in syncs:
            await self._send(pool, sync, (version, version))

    async def _send(
        self, pool: str, body: EventBody, versions: tuple[Version, Version], token: str = ""
    ) -> None:
        self._lead.check()
        verb, (version, prev) = messages.EVENT_VERBS[type(body)], versions
        head = EventHead(
            pool=pool,
            version=version,
            prev=prev,
            agent=self._lead.agent,
            term=self._lead.term,
            history=self.history,
            at=round(self._wall_clock() * 1000),
        )
        headers = {
            messages.CONTENT_TYPE_HEADER: messages.CONTENT_TYPE,
            messages.SUMMARY_HEADER: messages.summary(head, body),
        }
        if token:
            headers["Nats-Msg-Id"] = f"{pool}.{verb}.{token}"
        data = codec.encode(codec.to_map(head) | codec.to_map(body))
        await self._bus.publish(self._subjects.event(pool, verb), data, headers)
        self._metrics.events.labels(verb=verb).inc()

    async def _delivered(self, send: Callable[[], Awaitable[None]]) -> None:
        """Send and flush; again from the start until the server has confirmed all of it. Raises Unheard when
        it did not for `T` (rule R7)."""
        failures, began = 0, self._lead.age()
        while True:
            self._lead.check()
            try:
                await send()
                await self._bus.flush()
            except BusUnavailable as error:
                failures += 1
                if failures == 1:  # once; the counter says how often
                    log.warning("not_confirmed", error=str(error), action="publishing again")
                self._metrics.republished.inc()
                if (silent := self._lead.age() - began) >= self._lead.ttl:
                    raise Unheard(f"NATS has confirmed nothing for {silent:.1f} s: {error}") from error
                await asyncio.sleep(FLUSH_RETRY)
            else:
                if failures:
                    log.info("confirmed_again", failures=failures)
                return

    def _settle(self, entries: Sequence[Entry]) -> None:
        """These were published and the server has them: whoever waited for it may go on."""
        for entry in entries:
            for key in entry.changed:
                for future in self._expected.pop(key, ()):
                    _resolve(future)
            if entry.position:
                self._position = entry.position
        self.published = max(self.published, entries[-1].index)
        for _, future in (ready := [waiter for waiter in self._waiting if waiter[0] <= self.published]):
            _resolve(future)
        self._waiting = [waiter for waiter in self._waiting if waiter not in ready]

    async def _save_position(self) -> None:
        if self._position is None or self._position == self._saved:
            return
        self._lead.check()
        try:
            outcome = await self._store.write(
                [writes.save_position(self._lead.term, self._position.document(self.history))]
            )
            if not outcome.changed:
                await self._explain_unsaved()
        except StoreUnavailable as error:
            log.warning("position_not_saved", error=str(error))
            return
        self._saved = self._position if outcome.changed else None

    async def _move(self) -> None:
        """Nothing happens, so make something happen: the position then passes the time at which a standby
        has begun, and a change of leader need not begin a new history."""
        with contextlib.suppress(StoreUnavailable):
            touch = writes.touch_stamp(self._lead.term, self._lead.agent, self._lead.next_touch())
            await self.write_unseen([touch])

    async def _explain_unsaved(self) -> None:
        """Raise LeadLost if a higher term has saved its position; a document that is missing is made anew."""
        if await self._store.read(writes.POSITION):
            raise LeadLost("an agent of a higher term has saved its position")
        await self._store.write([writes.first_position()])


async def _within(timeout: float, expected: Awaitable[Any]) -> None:
    try:
        async with asyncio.timeout(timeout):
            await expected
    except TimeoutError:
        raise StoreUnavailable(
            f"a change was not seen to be published within {timeout:g} s: the change stream or NATS is behind"
        ) from None


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def event_body(event: Event, prefixes: Prefixes) -> EventBody:
    """The wire message of a core event."""
    match event.kind, event.owner, event.previous:
        case ev.UP, Owner() as owner, _:
            return messages.PodUp(owner_ref(owner))
        case ev.DOWN, Owner() as owner, _:
            return messages.PodDown(owner_ref(owner), event.reason)
        case ev.ALLOCATED, Owner() as owner, _:
            return messages.ChunkAllocated(owner_ref(owner), event.chunks, prefixes)
        case ev.CLAIMED, Owner() as owner, Owner() as previous:
            return messages.ChunkClaimed(
                owner_ref(owner), owner_ref(previous), event.chunks, event.grants, event.hold_ms, prefixes
            )
        case ev.SCANNED, Owner() as owner, _:
            return messages.ChunkScanned(owner_ref(owner), event.chunks, prefixes)
        case ev.RELEASED, _, Owner() as previous:
            return messages.ChunkReleased(owner_ref(previous), event.chunks, prefixes)
    raise AssertionError(f"an event that the wire does not know: {event}")


def owner_ref(owner: Owner) -> OwnerRef:
    return OwnerRef(owner.name, owner.ip, owner.instance, owner.incarnation)
