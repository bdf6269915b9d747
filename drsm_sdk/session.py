"""One pod's session with the agent: opened, renewed, lost, opened again, closed.

Each session is a `Life`: it ends once, at once and for good, and everything that was asked in its name
is void then. Ending comes first, before anyone is told: the leases are revoked and the stocks emptied
without waiting for anything (guarantee G1).
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from drsm_sdk.ambient import Backoff, Chance, Clock
from drsm_sdk.errors import AgentUnavailable, BadRequest, DrsmError, Failed, SessionLost
from drsm_sdk.lease import Leases
from drsm_sdk.pods import Pod
from drsm_sdk.rpc import Answer, Refused, Rpc, Unusable
from drsm_sdk.tasks import Tasks
from drsm_sdk.transport import TransportError
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects

log = logging.getLogger("drsm_sdk")

M = TypeVar("M")
State = Literal["live", "suspect", "lapsed", "lost"]
Listed = tuple[int, str, int | None]
"""A chunk as `session.chunks` lists it: number, grant, hold in milliseconds (None: unmarked)."""

OPEN_TIMEOUT = 2.0
RENEW_TIMEOUT = 10.0
RENEWALS_MAX = 20  # outstanding ones; a late answer still counts, from its own time of sending
REOPEN_FIRST, REOPEN_MOST = 0.2, 5.0
SUPERSEDED_FIRST, SUPERSEDED_MOST = 1.0, 60.0
SETTLED_AFTER = 60.0  # a session that lived so long was not in a fight over its name
RENEW_SHORTEST, RENEW_LONGEST = 0.02, 60.0  # whatever an answer says: no busy loop, and never none
STRIKES = 2  # renewals in a row whose `held` differs before the agent is asked what it sees
RECONCILE_FIRST, RECONCILE_MOST = 0.5, 60.0
CHUNKS_TIMEOUT = 5.0
REPORT_TIMEOUT = 30.0  # the agent waits until those are dead that may hold the same, `L` or a little more
REPORT_CHUNKS_MAX = 500  # about 25 KiB
CLOSE_TIMEOUT = 1.0
JOIN_TIMEOUT = 5.0
REJOIN_FIRST, REJOIN_MOST = 0.5, 30.0  # of a pool that is not there now, and may come back
WITHOUT_POOLS = frozenset({"unknown_pool", "too_large"})  # refusals that a pool alone may not meet


class Member(Protocol):
    """A pool, as its session sees it."""

    def begin(self, life: "Life", definition: Definition) -> None:
        """A session is open: build up a stock under it."""

    def end(self, reason: str) -> None:
        """It is over: issue nothing more, from this moment on. Must not wait, must not fail."""

    def refuse(self, error: BadRequest) -> None:
        """There is a session, but the agent does not let it join this pool; it will be asked again."""

    def resume(self) -> None:
        """A lease that had run out was renewed: who waits for ids may find some again."""

    def held(self) -> tuple[int, int]: ...

    def use(self) -> wire.Use: ...

    def holdings(self) -> list[tuple[int, str, bool]]:
        """(number, grant, marked) of every chunk."""

    def follow(self, listed: Sequence[Listed], version: wire.Version, said: wire.Stamp) -> None:
        """The agent says what this pod holds in the pool."""

    def give_back(self, count: int) -> None:
        """The agent asks for empty chunks back."""


@dataclass(slots=True, eq=False)
class Life:
    """One incarnation of this pod, from open to its end.

    Answers to what was sent before `counts_from` extend no lease. `reporting`: the agent does not know this
    session, perhaps only because of a restore, and is being told of it; nothing is issued. `missing` are the
    pod's pools that the session has not joined; `unlisted` those that it has, but the agent does not know any
    more, with the term in which it said so. `strikes` counts renewals in a row whose `held` differed;
    `unsettled` and `reported` wake who asks the agent, or tells it, which chunks there are.
    """

    incarnation: int
    leases: Leases
    history: str
    renew_period: float
    opened_at: float
    ended: bool = False
    counts_from: float = float("-inf")
    reporting: bool = False
    strikes: int = 0
    outstanding: int = 0
    missing: set[str] = field(default_factory=set)
    unlisted: dict[str, int] = field(default_factory=dict)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    unsettled: asyncio.Event = field(default_factory=asyncio.Event)


class Session:
    """Keeps one session open; `life` is the present one, None while there is none."""

    def __init__(
        self,
        rpc: Rpc,
        subjects: Subjects,
        pod: Pod,
        tasks: Tasks,
        *,
        clock: Clock,
        chance: Chance,
        stop_when_suspect: bool,
    ) -> None:
        self.pod, self.subjects = pod, subjects
        self.clock, self.chance = clock, chance
        self.tasks = tasks
        self.life: Life | None = None
        self.lost_reason = "not opened yet"
        self.closing = False
        self.alarms = 0
        self.members: dict[str, Member] = {}
        self._rpc = rpc
        self._stop_when_suspect = stop_when_suspect
        self._opened = asyncio.Event()
        self._wake = asyncio.Event()
        self._refused: BadRequest | None = None
        self._last_state: State = "lost"
        rpc.transport.on_reconnect(self._wake.set)

    # --- what others ask ------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """`live`, `suspect`, `lapsed`, or `lost` while there is no session."""
        return self.life.leases.state(self.clock()) if self.life is not None else "lost"

    def refusal(self) -> DrsmError:
        """Why nothing may be issued just now."""
        if self.tasks.failure is not None:
            failed = Failed()
            failed.__cause__ = self.tasks.failure
            return failed
        if self.life is None:
            return SessionLost(self.lost_reason)
        lease = "allocation" if self.state == "lapsed" else "liveness"
        return AgentUnavailable(f"the {lease} lease has run out; no renewal was answered in time")

    async def ask(
        self, life: Life, subject: str, request: Any, kind: type[M], timeout: float, *, pool: str = ""
    ) -> Answer[M]:
        """A request in the name of `life`. Raises DrsmError; a verdict ends the life first. Of one that is
        over nothing is asked."""
        if life is not self.life:
            raise SessionLost(self.lost_reason)
        asked = self.clock()
        try:
            answer = await self._rpc.call(subject, request, kind, timeout, pool=pool)
        except Refused as refused:
            if isinstance(refused.error, SessionLost):
                await self._verdict(life, refused.error, refused.stamp, asked)
            raise refused.error from None
        if life is not self.life:
            raise SessionLost(self.lost_reason)
        self._see_history(life, answer.stamp.history)
        return answer

    def owner(self, life: Life) -> wire.OwnerRef:
        """This pod's incarnation, as owner of chunks."""
        return wire.OwnerRef(self.pod.name, self.pod.ip, self.pod.instance, life.incarnation)

    async def join(self, life: Life, pool: str, timeout: float = JOIN_TIMEOUT) -> Definition:
        """Take part in a pool; idempotent. Raises DrsmError."""
        request = wire.Join(self.pod.name, life.incarnation, (pool,))
        answer = await self.ask(life, self.subjects.session("join"), request, wire.Joined, timeout, pool=pool)
        for definition in answer.body.definitions:
            if definition.name == pool:
                return definition
        raise AgentUnavailable(f"the answer to joining pool {pool} has no definition of it")

    async def opened(self) -> Life:
        """Wait for a session. Raises BadRequest when the agent refuses to open one for this pod."""
        while self.life is None:
            if self.tasks.failure is not None:
                raise self.refusal()
            if self._refused is not None:
                raise self._refused
            await self._opened.wait()
        return self.life

    def fail(self) -> None:
        """A background task broke: issue nothing more, and tell whoever waits."""
        if self.life is not None:
            self.end(self.life, "failed")
        else:
            for member in self.members.values():
                member.end("failed")
        self._opened.set()

    def end(self, life: Life, reason: str) -> None:
        """The life is over, whoever said so. Does nothing for one that has ended before."""
        if life is not self.life:
            return
        if reason == "expired":
            self._check_clocks(life)
        self.life, self.lost_reason = None, reason
        self._opened.clear()
        life.leases.revoke()
        life.ended = True
        life.unsettled.set()
        life.reported.set()
        for member in self.members.values():
            member.end(reason)
        self._wake.set()
        level = logging.INFO if self.closing else logging.WARNING
        log.log(level, "session %s of pod %s is over: %s", life.incarnation, self.pod.name, reason)

    def _check_clocks(self, life: Life) -> None:
        """Declared dead with time left on the lease: what the leases rest on does not hold."""
        left = life.leases.liveness_until - self.clock()
        if left > 0:
            self.alarms += 1
            log.error(
                "session %s of pod %s was declared dead %.3f s before its lease ended: clocks differ by more "
                "than 1 %%; check them, ids may be issued twice until they agree",
                life.incarnation,
                self.pod.name,
                left,
            )

    # --- its life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Open, renew until lost, and again, until this side closes."""
        superseded = Backoff(self.chance, SUPERSEDED_FIRST, SUPERSEDED_MOST)
        others = Backoff(self.chance, REOPEN_FIRST, REOPEN_MOST)
        while not self.closing:
            life = await self._open()
            watches = [
                self.tasks.start(self._reconcile(life), "reconcile"),
                self.tasks.start(self._report(life), "report"),
                self.tasks.start(self._join_missing(life), "rejoin"),
            ]
            try:
                await self._renew_until_over(life)
            finally:
                for watch in watches:
                    watch.cancel()
            if self.clock() - life.opened_at > SETTLED_AFTER:
                superseded.reset()
                others.reset()
            await asyncio.sleep((superseded if self.lost_reason == "superseded" else others).delay())

    async def close(self) -> None:
        """Stop issuing, then say so; final even if unanswered."""
        self.closing = True
        life = self.life
        if life is None:
            return
        self.end(life, "closed")
        if not self._rpc.transport.connected:
            return
        request = wire.SessionRef(self.pod.name, life.incarnation)
        try:
            await self._rpc.call(self.subjects.session("close"), request, wire.Empty, CLOSE_TIMEOUT)
        except (DrsmError, Refused) as error:
            log.info("closing the session was not answered: %s", error)

    async def _open(self) -> Life:
        """Ask until there is an answer; the same request again while it may have been heard. If there is a
        pool among the pod's that the agent does not know (any more), or too many definitions for one answer,
        without any: they are then joined one by one, and none keeps the pod out of the others."""
        backoff = Backoff(self.chance, REOPEN_FIRST, REOPEN_MOST)
        pools = tuple(self.members)
        request = self._open_request(pools)
        while True:
            try:
                answer = await self._rpc.call(
                    self.subjects.session("open"), request, wire.Opened, OPEN_TIMEOUT
                )
            except Refused as refused:
                if pools and isinstance(refused.error, BadRequest) and refused.error.error in WITHOUT_POOLS:
                    pools = ()
                else:
                    self._note_refusal(refused.error)
                request = self._open_request(pools)
            except DrsmError as error:
                self._note_refusal(error)
            else:
                return self._begin(answer)
            await asyncio.sleep(backoff.delay())

    def _open_request(self, pools: tuple[str, ...]) -> wire.Open:
        return wire.Open(self.pod.ref, pools, self.chance.token())

    def _begin(self, answer: Answer[wire.Opened]) -> Life:
        opened = answer.body
        leases = Leases(stop_when_suspect=self._stop_when_suspect)
        leases.granted(answer.sent, opened.liveness_ms, opened.allocation_ms)
        life = Life(
            opened.incarnation, leases, answer.stamp.history, _period(opened.renew_ms), opened_at=self.clock()
        )
        self.life, self._refused = life, None
        self._opened.set()
        log.info("session %s of pod %s is open", life.incarnation, self.pod.name)
        definitions = {definition.name: definition for definition in opened.definitions}
        for name, member in self.members.items():
            if name in definitions:
                member.begin(life, definitions[name])
        life.missing = self.members.keys() - definitions.keys()
        return life

    async def _join_missing(self, life: Life) -> None:
        """Join each of the pod's pools that the session was opened without, until it is there."""
        backoff = Backoff(self.chance, REJOIN_FIRST, REJOIN_MOST)
        refused: set[str] = set()
        while life.missing and not life.ended:
            for name in sorted(life.missing):
                try:
                    definition = await self.join(life, name)
                except BadRequest as error:
                    if name not in refused:
                        log.warning("pool %s cannot be joined again: %s", name, error)
                    refused.add(name)
                    self.members[name].refuse(error)
                except DrsmError as error:
                    log.info("joining pool %s again was not answered: %s", name, error)
                else:
                    life.missing.remove(name)
                    self.members[name].begin(life, definition)
            if life.missing:
                await asyncio.sleep(backoff.delay())

    def _note_refusal(self, error: DrsmError) -> None:
        if str(error) != self.lost_reason:
            log.warning("no session: %s", error)
        self.lost_reason = str(error)
        if isinstance(error, BadRequest):
            self._refused = error
            self._opened.set()

    # --- renewals -------------------------------------------------------------------------------

    async def _renew_until_over(self, life: Life) -> None:
        """Start renewals, whether or not earlier ones were answered: silence must not delay the next."""
        while not life.ended:
            self._note_state()
            if life.outstanding < RENEWALS_MAX and self._rpc.transport.connected:
                life.outstanding += 1
                self.tasks.start(self._renew(life), "renew")
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.chance.jitter(life.renew_period)):
                    await self._wake.wait()

    async def _renew(self, life: Life) -> None:
        if self.closing:  # since this task was begun: the close is the last that is sent
            return
        held = {name: member.held() for name, member in self.members.items()}
        use = {name: member.use() for name, member in self.members.items()}
        request = wire.Renew(self.pod.name, life.incarnation, held, use)
        subject, asked = self.subjects.session("renew"), self.clock()
        try:
            answer = await self._rpc.once(subject, request, wire.Renewed, RENEW_TIMEOUT)
        except Refused as refused:
            if isinstance(refused.error, SessionLost):
                await self._verdict(life, refused.error, refused.stamp, asked)
            else:
                log.debug("a renewal was refused: %s", refused.error)
        except (TransportError, Unusable, BadRequest) as error:
            log.debug("a renewal was not answered: %s", error)
        else:
            self._renewed(life, answer)
        finally:
            life.outstanding -= 1

    def _renewed(self, life: Life, answer: Answer[wire.Renewed]) -> None:
        if life is not self.life or answer.sent < life.counts_from:
            return
        said, before = answer.body, self.state
        life.leases.granted(answer.sent, said.liveness_ms, said.allocation_ms)
        life.renew_period = _period(said.renew_ms)
        self._note_state()
        if self.state != before:
            for member in self.members.values():
                member.resume()
        self._see_history(life, answer.stamp.history)
        self._compare(life, said.held, answer.stamp.term)
        for name, count in said.give_back.items():
            if name in self.members:
                self.members[name].give_back(count)

    def _note_state(self) -> None:
        """Log transitions, not states."""
        if self.state != self._last_state:
            log.info("pod %s is %s (was %s)", self.pod.name, self.state, self._last_state)
            self._last_state = self.state

    # --- disagreement ---------------------------------------------------------------------------

    def _compare(self, life: Life, said: dict[str, tuple[int, int]], term: int) -> None:
        """A pool that is not on the agent's list differs for ever; only the next leader has another list.
        What there is in one that is being joined is not taken up before it is."""
        differs = any(
            said.get(name, (0, 0)) != member.held()
            for name, member in self.members.items()
            if name not in life.missing and (name in said or life.unlisted.get(name) != term)
        )
        life.strikes = life.strikes + 1 if differs else 0
        if life.strikes >= STRIKES:
            life.unsettled.set()

    async def _reconcile(self, life: Life) -> None:
        """While the agent sees other chunks than this pod holds, ask which, and follow."""
        backoff = Backoff(self.chance, RECONCILE_FIRST, RECONCILE_MOST)
        while True:
            await life.unsettled.wait()
            if life.ended:
                return
            life.unsettled.clear()
            request = wire.SessionRef(self.pod.name, life.incarnation)
            subject = self.subjects.session("chunks")
            try:
                answer = await self.ask(life, subject, request, wire.SessionChunks, CHUNKS_TIMEOUT)
                await self._join_forgotten(life, answer)
            except DrsmError as error:
                log.info("the agent did not say which chunks this pod has: %s", error)
                life.unsettled.set()
                if isinstance(error, AgentUnavailable):  # it took its time; a refusal comes at once, again
                    backoff.reset()
            else:
                self._follow(answer.body, answer.stamp)
            await asyncio.sleep(backoff.delay())
            if not life.strikes:
                backoff.reset()

    async def _join_forgotten(self, life: Life, said: Answer[wire.SessionChunks]) -> None:
        """A restored database may not know that this session has joined a pool: then nothing is compared, and
        while a pod holds what its session may not, no allocation lease is renewed."""
        for name in sorted(self.members.keys() - said.body.version.keys() - life.missing):
            if life.unlisted.get(name) == said.stamp.term:
                continue
            try:
                await self.join(life, name)
            except BadRequest:  # it was taken off the list
                life.unlisted[name] = said.stamp.term

    def _follow(self, said: wire.SessionChunks, stamp: wire.Stamp) -> None:
        for name, member in self.members.items():
            if name in said.version:
                listed = [(n, grant, hold) for pool, n, grant, hold in said.chunks if pool == name]
                member.follow(listed, said.version[name], stamp)

    # --- a database that lost its history -------------------------------------------------------

    def _see_history(self, life: Life, history: str) -> None:
        """Another history: the database may have been restored. Say which chunks are in use here."""
        if history != life.history:
            life.history = history
            life.reported.set()

    async def _report(self, life: Life) -> None:
        while True:
            await life.reported.wait()
            if life.ended:
                return
            life.reported.clear()
            try:
                await self._report_all(life, REPORT_TIMEOUT)
            except Refused as refused:
                if isinstance(refused.error, SessionLost):
                    self.end(life, refused.error.reason)
                log.info("reporting this pod's chunks was refused: %s", refused.error)
            except DrsmError as error:
                log.warning("reporting this pod's chunks was not answered: %s", error)
                life.reported.set()
                await asyncio.sleep(self.chance.jitter(1.0))

    async def _report_all(self, life: Life, timeout: float) -> None:
        """All of them, unless the life ends meanwhile. Raises Refused and DrsmError."""
        chunks = [(name, *chunk) for name, member in self.members.items() for chunk in member.holdings()]
        for i in range(0, max(len(chunks), 1), REPORT_CHUNKS_MAX):
            if life.ended:
                return
            request = wire.Report(
                self.pod.name,
                life.incarnation,
                tuple(chunks[i : i + REPORT_CHUNKS_MAX]),
                total=len(chunks),
                ip=self.pod.ip,
                instance=self.pod.instance,
                pools=tuple(self.members),
            )
            await self._rpc.call(self.subjects.session("report"), request, wire.Reported, timeout)
        life.unsettled.set()

    async def _verdict(self, life: Life, lost: SessionLost, stamp: wire.Stamp | None, asked: float) -> None:
        """The agent says that the session is over. From a database with another history that may only
        mean that it was restored to before this session: then, and with nothing issued meanwhile, report
        first. What it said to requests from before the report was accepted is no verdict any more."""
        if life is not self.life or life.reporting or asked < life.counts_from:
            return
        if stamp is None or stamp.history == life.history:
            self.end(life, lost.reason)
            return
        life.history, life.reporting = stamp.history, True
        life.leases.revoke()
        life.counts_from = self.clock()
        try:
            await self._report_all(life, REPORT_TIMEOUT)
        except (DrsmError, Refused):
            self.end(life, lost.reason)
        else:
            life.counts_from = self.clock()
        finally:
            life.reporting = False


def _period(renew_ms: int) -> float:
    """Seconds between two renewals."""
    return min(max(renew_ms / 1000, RENEW_SHORTEST), RENEW_LONGEST)
