"""Keeping a mirror true: subscribe first, take a snapshot, apply events, heal gaps, watch the syncs."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from drsm_sdk import fetch
from drsm_sdk.ambient import Backoff, Chance, Clock
from drsm_sdk.errors import BadRequest, DrsmError
from drsm_sdk.mirror import Mirror, Verdict
from drsm_sdk.rpc import Rpc
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.transport import Message, Subscription
from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import EVENT_KINDS, EventBody, EventHead, Reset, Sync
from drsm_sdk.wire.subjects import Subjects

log = logging.getLogger("drsm_sdk")

SYNC_INTERVAL = 2.0  # seconds between two syncs of the agent
STALE_AFTER = 3 * SYNC_INTERVAL
SETTLE = 0.5  # how long events may trail the sync that counts them
SNAPSHOT_TIMEOUT = 5.0
RETRY_FIRST, RETRY_MOST = 0.1, 3.0
STAMPEDE = 0.5  # seconds over which consumers spread when all need a snapshot at once
EVENT_BYTES_MAX = 128 * 1024  # one of a thousand claimed chunks has 40 KiB
BUFFER_BYTES_MAX = 4 * 1024 * 1024  # events kept during a snapshot; what falls out is a gap like any other
DISPUTED_MAX = 30.0  # how long syncs may say something else before the table is taken for a forger's work
DISPUTE_GAP_MAX = 2 * SYNC_INTERVAL  # syncs that are further apart are no lasting dispute
COMPLAINT_INTERVAL = 60.0


@dataclass(frozen=True, slots=True)
class Hearing:
    """An event, when it came (seconds of the pod's clock), and its size in bytes."""

    head: EventHead
    body: EventBody
    at: float
    size: int


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
        self._pending: deque[Hearing] = deque()
        self._pending_bytes = 0
        self._needed = asyncio.Event()
        self._needed.set()
        self._doubt: tuple[EventHead, Sync] | None = None
        self._doubted = asyncio.Event()
        self._confirmed_at = self._asked_at = self._complained_at = float("-inf")
        self._disputed_since: float | None = None
        self._disputed_at = self._distrusted_at = float("-inf")

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
                found = await fetch.snapshot(self._rpc, self._subjects, self._pool, SNAPSHOT_TIMEOUT)
                self._load(found, asked)
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
            if len(message.data) > EVENT_BYTES_MAX:
                raise codec.DecodeError(
                    f"expected at most {EVENT_BYTES_MAX} bytes, found {len(message.data)}"
                )
            fields = codec.decode(message.data)
            head = codec.from_map(EventHead, fields)
            body: EventBody = codec.from_map(kind, fields)
        except codec.DecodeError as error:
            self._complain(f"unreadable event on {message.subject}: {error}")
            return
        if head.pool != self._pool:
            return
        if not self.mirror.fallen(head.term, head.history):
            self._rpc.saw(head.term)
            self._heard(head, body)
            self._take_in(Hearing(head, body, self._clock(), len(message.data)))
        elif isinstance(body, Sync):
            self._dispute()

    def _take_in(self, hearing: Hearing) -> None:
        head, body = hearing.head, hearing.body
        match self.mirror.apply(head, body):
            case Verdict.APPLIED:
                self._applied(head, body)
            case Verdict.CONFIRMED:
                self._confirmed_at = self._clock()
                self._doubt = self._disputed_since = None
            case Verdict.DOUBT if isinstance(body, Sync):
                self._doubt = head, body
                self._doubted.set()
                self._dispute()
            case Verdict.GAP:
                if not isinstance(body, Sync | Reset):
                    if hearing.at < self._asked_at:
                        return  # the snapshot was asked for later and does not lead up to it
                    self._keep(hearing)
                self._need(f"a gap before version {head.version}")

    def _keep(self, hearing: Hearing) -> None:
        self._pending.append(hearing)
        self._pending_bytes += hearing.size
        while self._pending_bytes > BUFFER_BYTES_MAX:
            self._pending_bytes -= self._pending.popleft().size

    def _dispute(self) -> None:
        """A sync says something else, which a snapshot should have put right: not if a forged event came
        from so far in the future that everything true is older."""
        now = self._clock()
        lately, self._disputed_at = now - self._disputed_at <= DISPUTE_GAP_MAX, now
        if self._disputed_since is None or not lately:
            self._disputed_since = now
        elif now - self._disputed_since > DISPUTED_MAX:
            self._disputed_since, self._distrusted_at = None, now
            self.mirror.distrust()
            self._need("syncs go on saying something else")

    def _complain(self, text: str) -> None:
        """Anybody can send nonsense: now and then a line about it is enough."""
        now = self._clock()
        if now - self._complained_at >= COMPLAINT_INTERVAL:
            self._complained_at = now
            log.warning("%s (more of it is not logged for %g s)", text, COMPLAINT_INTERVAL)

    def _need(self, why: str) -> None:
        if not self._needed.is_set():
            log.info("pool %s: taking a snapshot again: %s", self._pool, why)
            self._needed.set()

    def _load(self, snapshot: Snapshot, asked: float) -> None:
        if asked < self._distrusted_at:
            return  # it was asked for before the table was found to be wrong
        again = self.loaded.is_set()
        self._needed.clear()
        if not self.mirror.load(snapshot):
            log.debug("pool %s: snapshot %s is older than the table", self._pool, snapshot.version)
            # What asked for it may still be unheard: the next sync, or event, asks again.
        else:
            self._confirmed_at = max(self._confirmed_at, asked)
            self._asked_at, self._disputed_since = asked, None
            if again:
                self._reloaded()
        self.loaded.set()
        self.settled.set()
        pending, self._pending, self._pending_bytes = self._pending, deque(), 0
        for hearing in pending:
            self._take_in(hearing)
