"""Keeping a mirror true: subscribe first, take a snapshot, apply events, heal gaps, watch the syncs."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from drsm_sdk.ambient import Backoff, Chance, Clock
from drsm_sdk.errors import AgentUnavailable, BadRequest, DrsmError
from drsm_sdk.mirror import Mirror, Verdict
from drsm_sdk.rpc import Refused, Rpc, Unusable
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.transport import Message, Subscription, TransportError
from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import EVENT_KINDS, EventBody, EventHead, Reset, SnapshotPage, Sync
from drsm_sdk.wire.subjects import Subjects

log = logging.getLogger("drsm_sdk")

SYNC_INTERVAL = 2.0  # seconds between two syncs of the agent
STALE_AFTER = 3 * SYNC_INTERVAL
SETTLE = 0.5  # how long events may trail the sync that counts them
SNAPSHOT_TIMEOUT = 5.0
RETRY_FIRST, RETRY_MOST = 0.1, 3.0
STAMPEDE = 0.5  # seconds over which consumers spread when all need a snapshot at once
BUFFER_MAX = 10_000  # events kept while a snapshot is under way; what falls out is a gap like any other

Hearing = tuple[EventHead, EventBody]


class Follower:
    """Follows one pool's events.

    `heard` gets each event of a leader that has not fallen, as soon as it comes, also those the mirror
    has already or cannot apply yet; `applied` each event once, after the mirror has it; `reloaded` is
    called after each snapshot but the first. `loaded` is set with the first snapshot; `settled` also when
    the agent refuses to give one, which `trouble` then tells.
    """

    def __init__(
        self,
        rpc: Rpc,
        subjects: Subjects,
        pool: str,
        *,
        clock: Clock,
        chance: Chance,
        heard: Callable[[EventHead, EventBody], None] = lambda head, body: None,
        applied: Callable[[EventHead, EventBody], None] = lambda head, body: None,
        reloaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.mirror = Mirror()
        self.loaded, self.settled = asyncio.Event(), asyncio.Event()
        self.trouble: DrsmError | None = None
        self._rpc, self._subjects, self._pool = rpc, subjects, pool
        self._clock, self._chance = clock, chance
        self._heard, self._applied, self._reloaded = heard, applied, reloaded
        self._subscription: Subscription | None = None
        self._pending: deque[Hearing] = deque(maxlen=BUFFER_MAX)
        self._needed = asyncio.Event()
        self._needed.set()
        self._doubt: tuple[EventHead, Sync] | None = None
        self._doubted = asyncio.Event()
        self._confirmed_at = float("-inf")

    @property
    def staleness(self) -> float:
        """Seconds since the table was known to be right: loaded, or confirmed by a sync. Infinite before."""
        return self._clock() - self._confirmed_at

    @property
    def synced(self) -> bool:
        """Whether the table is complete and was confirmed within the last three sync intervals."""
        return not self._needed.is_set() and self.staleness <= STALE_AFTER

    async def subscribe(self) -> None:
        """Begin to listen. Call it once, before `run`."""
        self._subscription = await self._rpc.transport.subscribe(
            self._subjects.events(self._pool), self._receive
        )

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.stop()

    async def run(self) -> None:
        """Take a snapshot whenever one is needed; never returns."""
        backoff = Backoff(self._chance, RETRY_FIRST, RETRY_MOST)
        while True:
            await self._needed.wait()
            if self.loaded.is_set():  # then others may need one for the same reason
                await asyncio.sleep(self._chance.below(STAMPEDE))
            try:
                asked = self._clock()
                self._load(await self._fetch(), asked)
            except DrsmError as error:
                if str(error) != str(self.trouble):
                    log.warning("pool %s: no snapshot: %s", self._pool, error)
                self.trouble = error
                if isinstance(error, BadRequest):
                    self.settled.set()
            if self._needed.is_set():
                await asyncio.sleep(backoff.delay())
            else:
                backoff.reset()
                self.trouble = None

    async def watch(self) -> None:
        """Give events time to catch up with a sync that says more; never returns."""
        while True:
            await self._doubted.wait()
            await asyncio.sleep(SETTLE)
            self._doubted.clear()
            if self._doubt is None:
                continue
            head, sync = self._doubt
            if self.mirror.contradicts(head, sync):
                self._need("a sync says something else")

    # --- events ---------------------------------------------------------------------------------

    def _receive(self, message: Message) -> None:
        kind = EVENT_KINDS.get(self._subjects.event_verb(message.subject))
        if kind is None:
            return  # of a newer agent
        try:
            fields = codec.decode(message.data)
            head = codec.from_map(EventHead, fields)
            body: EventBody = codec.from_map(kind, fields)
        except codec.DecodeError as error:
            log.warning("unreadable event on %s: %s", message.subject, error)
            return
        if head.pool != self._pool or self.mirror.fallen(head.term, head.history):
            return
        self._rpc.saw(head.term)
        self._heard(head, body)
        self._take_in(head, body)

    def _take_in(self, head: EventHead, body: EventBody) -> None:
        match self.mirror.apply(head, body):
            case Verdict.APPLIED:
                self._applied(head, body)
            case Verdict.CONFIRMED:
                self._confirmed_at = self._clock()
                self._doubt = None
            case Verdict.DOUBT if isinstance(body, Sync):
                self._doubt = head, body
                self._doubted.set()
            case Verdict.GAP:
                if not isinstance(body, Sync | Reset):
                    self._pending.append((head, body))
                self._need(f"a gap before version {head.version}")

    def _need(self, why: str) -> None:
        if not self._needed.is_set():
            log.info("pool %s: taking a snapshot again: %s", self._pool, why)
            self._needed.set()

    # --- snapshots ------------------------------------------------------------------------------

    async def _fetch(self) -> Snapshot:
        """One complete snapshot. Raises DrsmError."""
        pages = Pages()
        found: list[Snapshot] = []

        def done(reply: Message) -> bool:
            snapshot = self._page(pages, reply)
            if snapshot is not None:
                found.append(snapshot)
            return snapshot is not None

        subject = self._subjects.pool(self._pool, "snapshot")
        request: dict[str, Any] = {}
        try:
            await self._rpc.transport.request_many(subject, codec.encode(request), SNAPSHOT_TIMEOUT, done)
        except TransportError as error:
            raise AgentUnavailable(str(error)) from None
        except Refused as refused:
            raise refused.error from None
        return found[0]

    def _page(self, pages: Pages, reply: Message) -> Snapshot | None:
        """The snapshot that this reply completes; what cannot be used counts as not received."""
        if not reply.data and not reply.headers:
            return None  # the end of one agent's answer
        try:
            answer = self._rpc.read(reply, SnapshotPage, pool=self._pool)
        except Unusable:
            return None
        return pages.add(answer.stamp, answer.body)

    def _load(self, snapshot: Snapshot, asked: float) -> None:
        again = self.loaded.is_set()
        self._needed.clear()
        if not self.mirror.load(snapshot):
            log.debug("pool %s: snapshot %s is older than the table", self._pool, snapshot.version)
            # What asked for it may still be unheard: the next sync, or event, asks again.
        else:
            self._confirmed_at = max(self._confirmed_at, asked)
            if again:
                self._reloaded()
        self.loaded.set()
        self.settled.set()
        pending, self._pending = self._pending, deque(maxlen=BUFFER_MAX)
        for head, body in pending:
            self._take_in(head, body)
