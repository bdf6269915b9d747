"""Keeping one pool's stock supplied under one session: asking for chunks, taking up claimed ones and
having them scanned, giving empty ones back.

A supply lives as long as its session's `Life`. When that ends, `end` stops it at once; whatever is still
answered then reaches nobody.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from drsm_sdk import demand
from drsm_sdk.ambient import Backoff
from drsm_sdk.changes import Change, Gained, GivenBack, Lost, ScanFailed, Scanned, issued_ids
from drsm_sdk.errors import AgentUnavailable, BadRequest, DrsmError, PoolExhausted
from drsm_sdk.rpc import Answer
from drsm_sdk.scan import RETRY_FIRST, RETRY_MOST, Scanner, said
from drsm_sdk.session import Life, Listed, Session
from drsm_sdk.stock import Chunk, Stock
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition

log = logging.getLogger("drsm_sdk")

TICK = 1.0
ASK_TIMEOUT = 5.0
ASK_RETRY_FIRST, ASK_RETRY_MOST = 0.1, 5.0
IDLE = 60.0  # seconds that a chunk stays empty before it goes back
RECALL_IDLE = 5.0  # the same when the agent asks for it: no chunk goes back and forth
RECALL_SPARING = 60.0  # seconds after that in which no stock is built up
REVISION_BELIEVED = 30.0
"""Seconds after which a revision that nobody has repeated keeps no chunk out any more. An agent repeats its
own with every sync and every grant; but a forged one must not starve the pod for ever."""
PAIRS_MAX = 1000  # of one `release` or `scanned` request


class Supply:
    """`trouble` is the last error in asking for chunks, None after a success; `verdicts` counts how often
    the agent said that the pool is exhausted, and `verdict` is how it said so last.

    `first` is set once it is known whether there is stock at all: a first open chunk, or the verdict that
    there is none. `told` gets every change; `changed` is called when waiting callers should look again.
    """

    def __init__(
        self,
        session: Session,
        life: Life,
        definition: Definition,
        scanner: Scanner | None,
        *,
        told: Callable[[Change], None],
        changed: Callable[[], None],
    ) -> None:
        self.stock = Stock(definition, session.chance.number)
        self.life = life
        self.wanted = definition.ids_per_chunk
        self.trouble: DrsmError | None = None
        self.verdicts = 0
        self.verdict: PoolExhausted | None = None
        self.first = asyncio.Event()
        self._session, self._scanner = session, scanner
        self._told, self._changed = told, changed
        self._clock, self._chance = session.clock, session.chance
        self._rate = demand.Rate()
        self._wake_refill, self._urgent = asyncio.Event(), asyncio.Event()
        self._wake_returns = asyncio.Event()
        self._scans: dict[tuple[int, str], asyncio.Task[Any]] = {}
        self._acquired: wire.Version = (0, 0)
        self._listed: wire.Version = (0, 0)
        self._history, self._term = "", 0
        self._lacking = False
        self._asked_back = 0
        self._sparing_until = self._announced_at = float("-inf")
        self._revision = self._announced_term = 0
        self._tasks = [
            session.tasks.start(self._refill(), f"refill-{self.name}"),
            session.tasks.start(self._return(), f"return-{self.name}"),
            session.tasks.start(self._tick(), f"tick-{self.name}"),
        ]

    @property
    def name(self) -> str:
        return self.stock.definition.name

    @property
    def rate(self) -> float:
        """Ids per second that the stock lost of late: issued, less those that became free again."""
        return self._rate.value

    def wake(self) -> None:
        """There is less in stock than wanted."""
        self._wake_refill.set()

    def urge(self) -> None:
        """Somebody waits, or there is reason to hope: ask again even if the last answer was a refusal."""
        self._wake_refill.set()
        self._urgent.set()

    def lack(self) -> None:
        """There are free ids, but not one of each space in one chunk: another chunk is needed."""
        self._lacking = True
        self.wake()

    def announced(self, revision: int, term: int) -> None:
        """The agent of a term said which revision of the pool's definition it goes by. A leader of a later
        term counts, also with an older definition: such a change moves nothing."""
        now, before = self._clock(), self._outdated
        if term < self._announced_term and now - self._announced_at < REVISION_BELIEVED:
            return
        self._revision, self._announced_term, self._announced_at = revision, term, now
        if before and not self._outdated:
            self.life.unsettled.set()
            self.wake()

    @property
    def _outdated(self) -> bool:
        """Whether the agent goes by a later definition than this pod. Then a chunk's number does not tell
        which ids it has: none is taken up until the definition is here, and with it the list of chunks."""
        known = self.stock.definition.revision
        return self._revision > known and self._clock() - self._announced_at < REVISION_BELIEVED

    def redefine(self, definition: Definition) -> None:
        """The pool has changed. What is held stays where it is, or the agents do not count it as held: then
        its ids are others now."""
        before = self.stock.definition
        self._drop([chunk.n for chunk in self.stock if not definition.keeps(before, chunk.n)])
        self.stock.redefine(definition)
        self.life.unsettled.set()
        self.wake()

    def give_back(self, count: int) -> None:
        """The agent asks for up to `count` empty chunks back, as the pool runs out; for a while this pod then
        keeps no more in stock than it must."""
        self._asked_back = count
        self._sparing_until = self._clock() + RECALL_SPARING
        self.wanted = demand.sparing(self.stock.definition.ids_per_chunk)
        self._wake_returns.set()

    def end(self) -> None:
        """Stop at once. What a cancellation does not end, since the transport swallowed it, wakes and sees
        that its life has ended."""
        for task in (*self._tasks, *self._scans.values()):
            task.cancel()
        for wake in (self._wake_refill, self._urgent, self._wake_returns):
            wake.set()

    # --- taking up and dropping -----------------------------------------------------------------

    def claimed(
        self, chunks: Sequence[tuple[int, str]], hold_ms: int, head: wire.EventHead, *, anew: bool = False
    ) -> None:
        """The agent announced that this pod now owns chunks that were another's; or, `anew`, that were its
        own and are held again: the sessions in them stay this pod's."""
        if not self._compares(head) or head.version < self._listed:
            return
        self._acquired = max(self._acquired, head.version)
        self._take_up([(n, grant, hold_ms) for n, grant in chunks], anew=anew)

    def claimed_away(self, chunks: Sequence[int], by: str, head: wire.EventHead) -> None:
        """A Go pod took these chunks, while this pod's session lives: nothing is issued from them any
        more."""
        if not self._compares(head) or head.version < self._listed:
            return
        held = [n for n in chunks if n in self.stock]
        if len(held) < len(chunks):  # perhaps the answer that grants the others is still under way
            self._listed = max(self._listed, head.version)
        if held:
            log.error("pool %s: chunks %s of this pod, which lives, are Go pod %s's now", self.name, held, by)
            self._drop(held)
        self._wake_returns.set()

    def follow(self, listed: Sequence[Listed], version: wire.Version, said: wire.Stamp) -> None:
        """Make the stock what the agent lists, unless something newer was taken up: take up what is not
        known, drop what is not listed, and from then on drop answers that are older than this list."""
        if not self._compares(said) or version < self._acquired:
            return
        self._listed = max(self._listed, version)
        held = {(n, grant) for n, grant, _ in listed}
        self._drop([chunk.n for chunk in self.stock if (chunk.n, chunk.grant) not in held])
        for n, grant in self.stock.retired():
            if (n, grant) not in held:
                self.stock.settle(n, grant)
        for n, grant, hold_ms in listed:
            self.stock.set_mark(n, grant, marked=hold_ms is not None)
            if hold_ms is None:
                self.stock.retire_again(n, grant)
        self._take_up(listed)
        self._wake_returns.set()

    def _compares(self, said: wire.Stamp | wire.EventHead) -> bool:
        """Whether a version that comes with `said` can be compared with those known. In a new history the
        database's time may have gone back: then none is known, and the history before is over."""
        if said.history != self._history:
            if said.term < self._term:
                return False
            self._acquired = self._listed = (0, 0)
        self._history, self._term = said.history, max(self._term, said.term)
        return True

    def _take_up(self, chunks: Sequence[Listed], *, anew: bool = False) -> None:
        if self._outdated:
            return
        now = self._clock()
        added: dict[int | None, list[Chunk]] = {}
        for n, grant, hold_ms in chunks:
            if n >= self.stock.definition.capacity or self.stock.seen(n, grant):
                continue
            if n in self.stock:  # by another grant, which must be over then
                self._drop([n], tell=not anew)
            chunk = self.stock.add(n, grant, now, None if hold_ms is None else now + hold_ms / 1000)
            if chunk is not None:
                added.setdefault(hold_ms, []).append(chunk)
        for hold_ms, new in added.items():
            numbers = tuple(chunk.n for chunk in new)
            self._told(Gained(self.name, numbers, hold_ms is not None, (hold_ms or 0) / 1000))
            for chunk in new:
                self._expect_scan(chunk)
            if hold_ms is None:
                self.first.set()
                self._changed()

    def _drop(self, numbers: Sequence[int], *, tell: bool = True) -> None:
        if not numbers:
            return
        dropped, gone = [self.stock.drop(n) for n in numbers], set(numbers)
        issued = [[id_ for ids in own for id_ in ids] for own in zip(*dropped, strict=True)]
        for (n, _), task in list(self._scans.items()):
            if n in gone:
                task.cancel()
        if not tell:
            return
        log.warning("pool %s: chunks %s are no longer this pod's", self.name, numbers)
        self._told(Lost(self.name, tuple(numbers), issued_ids(self.stock.definition, issued)))

    # --- asking for chunks ----------------------------------------------------------------------

    async def _refill(self) -> None:
        """One request at a time, whenever there is less than wanted; repeated until it is answered."""
        backoff = Backoff(self._chance, ASK_RETRY_FIRST, ASK_RETRY_MOST)
        request: wire.Acquire | None = None
        while not self.life.ended:
            request = request or self._request()
            if request is None or self._outdated or self._session.state != "live":
                self._wake_refill.clear()
                await self._wake_refill.wait()
                continue
            try:
                answer = await self._ask("acquire", request, wire.Acquired)
            except AgentUnavailable as error:  # perhaps it was heard: the same request once more
                self._ask_failed(error)
                await asyncio.sleep(backoff.delay())
            except DrsmError as error:
                request = None
                self._ask_failed(error)
                await self._pause(backoff.delay())
            else:
                request = None
                if self._granted(answer):
                    self.trouble = None
                    backoff.reset()
                else:
                    self._ask_failed(AgentUnavailable("the pool was redefined; its definition is on its way"))
                    await asyncio.sleep(backoff.delay())

    def _request(self) -> wire.Acquire | None:
        count = demand.chunks_to_ask(self.stock.free, self.wanted, self.stock.definition.ids_per_chunk)
        count = max(count, int(self._lacking))
        return wire.Acquire(*self._who(), count, self._chance.token()) if count else None

    async def _pause(self, delay: float) -> None:
        """Do not ask again at once what was just refused, except when somebody needs it."""
        self._urgent.clear()
        await asyncio.sleep(self._chance.jitter(ASK_RETRY_FIRST))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._urgent.wait()

    def _granted(self, answer: Answer[wire.Acquired]) -> bool:
        """Take up what was granted. False for chunks granted by a later definition than the one in hand, or
        that this one does not reach to: with the next one, which the next sync announces, the agent is asked
        which chunks this pod holds."""
        version = answer.body.version
        self.announced(answer.body.revision, answer.stamp.term)
        if not self._compares(answer.stamp) or version < self._listed:
            return True  # the agent has since said which chunks this pod holds
        self._acquired = max(self._acquired, version)
        self._lacking = False
        self._take_up([(n, grant, None) for n, grant in answer.body.chunks])
        return not self._outdated and all(n < self.stock.definition.capacity for n, _ in answer.body.chunks)

    def _ask_failed(self, error: DrsmError) -> None:
        if self._session.life is not self.life:
            return  # the end of the session has been told
        if str(error) != str(self.trouble):
            log.warning("pool %s: no chunks: %s", self.name, error)
        self.trouble = error
        if isinstance(error, PoolExhausted):
            self.verdicts += 1
            self.verdict = error
            self._lacking = False
            self.first.set()
        self._changed()

    # --- giving back, and reporting scans -------------------------------------------------------

    async def _return(self) -> None:
        """Tell the agent which scans are finished and which chunks are given back, until it has answered."""
        backoff = Backoff(self._chance, ASK_RETRY_FIRST, ASK_RETRY_MOST)
        while not self.life.ended:
            await self._wake_returns.wait()
            self._wake_returns.clear()
            if self._session.state != "live":
                continue
            self._retire()
            try:
                await self._report_scanned()
                await self._release()
            except DrsmError as error:
                log.info("pool %s: returning chunks: %s", self.name, error)
                await asyncio.sleep(backoff.delay())
                self._wake_returns.set()
            else:
                backoff.reset()

    def _retire(self) -> None:
        """From here on nothing is issued from these chunks, whatever becomes of the request."""
        now = self._clock()
        least = demand.sparing(self.stock.definition.ids_per_chunk)
        numbers = self.stock.retire(now, idle=IDLE, keep=demand.ids_to_keep(self.wanted), most=PAIRS_MAX)
        if self._asked_back > len(numbers):
            numbers += self.stock.retire(
                now, idle=RECALL_IDLE, keep=least, most=self._asked_back - len(numbers)
            )
        self._asked_back = 0
        if numbers:
            self._told(GivenBack(self.name, tuple(numbers)))

    async def _release(self) -> None:
        pairs = self.stock.retired()[:PAIRS_MAX]
        if not pairs:
            return
        answer = await self._ask("release", wire.ChunkList(*self._who(), tuple(pairs)), wire.Released)
        for n, grant in pairs:
            if n in answer.body.released:
                self.stock.settle(n, grant)

    async def _report_scanned(self) -> None:
        pairs = [(chunk.n, chunk.grant) for chunk in self.stock.unreported()][:PAIRS_MAX]
        if not pairs:
            return
        answer = await self._ask("scanned", wire.ChunkList(*self._who(), tuple(pairs)), wire.Cleared)
        for n, grant in pairs:
            if n in answer.body.cleared:
                self.stock.set_mark(n, grant, marked=False)

    # --- scanning -------------------------------------------------------------------------------

    def _expect_scan(self, chunk: Chunk) -> None:
        free = self.stock.definition.unscanned == "free"
        if chunk.hold_until is None or (self._scanner is None and not free):
            return  # open already; or owned, routed, and never issued from
        key = (chunk.n, chunk.grant)
        task = self._session.tasks.start(self._scan(chunk, chunk.hold_until), f"scan-{self.name}")
        self._scans[key] = task
        task.add_done_callback(lambda _: self._scans.pop(key, None))

    async def _scan(self, chunk: Chunk, hold_until: float) -> None:
        left = hold_until - self._clock()
        while left > 0:  # the loop's clock and the pod's need not run alike
            await asyncio.sleep(left)
            left = hold_until - self._clock()
        in_use = await self._in_use(chunk)
        done = self.stock.finish_scan(chunk.n, chunk.grant, in_use, self._clock())
        if done is not None:
            self._told(Scanned(self.name, chunk.n, *done))
            self.first.set()
            self._changed()
            self._wake_returns.set()

    async def _in_use(self, chunk: Chunk) -> list[frozenset[int]]:
        """What the application says, asked until it gives an answer that can be one."""
        definition = self.stock.definition
        backoff = Backoff(self._chance, RETRY_FIRST, RETRY_MOST)
        attempt = 0
        while self._scanner is not None:
            attempt += 1
            try:
                return await self._scanner.scan(
                    definition, chunk.n, lambda: self.stock.begin_scan(chunk.n, chunk.grant)
                )
            except Exception as error:  # whatever the application's function raises
                text = said(error)
                log.warning("pool %s: scan %d of chunk %d failed: %s", self.name, attempt, chunk.n, text)
                self._told(ScanFailed(self.name, chunk.n, attempt, text))
            await asyncio.sleep(backoff.delay())
        return [frozenset() for _ in definition.parts]

    # --- the clock ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """What only time brings about: a new rate, ids out of quarantine, chunks that stayed empty."""
        while not self.life.ended:
            now = self._clock()
            self._rate.sample(now, self.stock.drawn)
            chunk = self.stock.definition.ids_per_chunk
            sparing = now < self._sparing_until
            self.wanted = demand.sparing(chunk) if sparing else demand.wanted(self._rate.value, chunk)
            if self.stock.thaw(now):
                self._changed()
            if self.stock.free < self.wanted:
                self._wake_refill.set()
            self._wake_returns.set()
            await asyncio.sleep(self._chance.jitter(TICK))

    # --- inside ---------------------------------------------------------------------------------

    def _who(self) -> tuple[str, int]:
        return self._session.pod.name, self.life.incarnation

    async def _ask(self, verb: str, request: Any, kind: type[Any]) -> Any:
        subject = self._session.subjects.pool(self.name, verb)
        try:
            answer = await self._session.ask(self.life, subject, request, kind, ASK_TIMEOUT, pool=self.name)
        except BadRequest as error:
            if error.error != "not_joined":
                raise
            await self._session.join(self.life, self.name)  # a restored database may not know it
            raise AgentUnavailable(str(error)) from None
        return answer
