"""Gain, keep and lose the lead; whatever only a leader does lives inside the lead's scope.

    campaign -> won -> log published -> stamp -> table has passed the stamp, and that was published
             -> probe answered -> every session a full lease -> serve ... until lost or given up

An agent that lost the lead drops all leader work before anything else (rule R8): the scope is one
task group, and the task that keeps the lead ends it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

import structlog

from drsm_agent import cancellation
from drsm_agent.alarms import Alarms
from drsm_agent.core import writes
from drsm_agent.core.documents import Document
from drsm_agent.core.election import Election
from drsm_agent.core.events import Version
from drsm_agent.core.lease import Leases
from drsm_agent.core.restore import Restored, announce, read_restored
from drsm_agent.core.session import LivenessLeases, full_leases
from drsm_agent.core.settings import former_liveness, pools_of
from drsm_agent.core.table import Table
from drsm_agent.endpoints import Endpoints
from drsm_agent.errors import (
    BusUnavailable,
    Forbidden,
    LeadLost,
    PositionLost,
    StoreUnavailable,
    Unheard,
    leaf,
)
from drsm_agent.feed import Entry, Feed, Position, State
from drsm_agent.lead import Lead
from drsm_agent.metrics import Metrics
from drsm_agent.mirrors import Mirrors
from drsm_agent.patience import Patience
from drsm_agent.ports import Bus, Chance, Clock, Store, Subscription, WallClock
from drsm_agent.probe import Probe
from drsm_agent.reaper import Reaper
from drsm_agent.reign import Grants, Hearing, Reign
from drsm_agent.relay import Relay, position_document
from drsm_agent.requests import Requests
from drsm_agent.restorer import Restorer
from drsm_agent.store.stored import check_current, ensure_singletons
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects

RETRY_DELAY = 0.2
UNHEARD_SHARE = 0.75
"""Of `L`, without a word of any pod: nobody has been expired by then."""
HEARD_LOOKS_PER_LEASE = 6
LOOK_MAX = 0.25
"""Seconds between two looks of a standby at the leader's record: one that gives up is followed at once."""
STANDBY_SHARE = 0.5
"""Of `T`, between two signs of a standby: at least one comes while a leader waits for it."""

log = structlog.get_logger("drsm_agent.leader")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an agent is made of, for the tasks of a lead."""

    store: Store
    bus: Bus
    feed: Feed
    subjects: Subjects
    leases: Leases
    definitions: Mapping[str, Definition]
    clock: Clock
    wall_clock: WallClock
    chance: Chance
    metrics: Metrics


class Leader:
    """One agent's part in the election. `leading` is set while it serves."""

    def __init__(self, agent: str, parts: Parts) -> None:
        self._parts = parts
        self._election = Election(agent, parts.leases.leader)
        self._highest = 0
        self._led_at = parts.clock()
        self._following = ("", 0)
        self._restored_unread = True
        self._former_liveness = 0.0
        self._waits_shown = float("-inf")
        self.leading = asyncio.Event()

    @property
    def seen(self) -> writes.LeaderRecord | None:
        """The leader's record as last read: who leads when this agent does not."""
        return self._election.seen

    def leaderless(self) -> float:
        """Seconds since anybody was seen to lead; 0 while this agent serves."""
        return 0.0 if self.leading.is_set() else self._parts.clock() - self._led_at

    async def run(self) -> None:
        while True:
            await self._campaign()
            began, unheard = self._parts.clock(), False
            try:
                await cancellation.isolated(self._lead())
            except* LeadLost as lost:
                unheard = lost.subgroup(Unheard) is not None
                log.warning("lead_lost", reason=str(leaf(lost)))
            finally:
                self._stop_serving()
                self._parts.metrics.lead_over()
                mine = self._election.mine
                self._election.lost()
                if mine:
                    await self._give_up(mine)
            if unheard or self._parts.clock() - began < self._parts.leases.leader:  # a standby comes first;
                await asyncio.sleep(self._parts.chance.jitter(self._parts.leases.leader))  # not in a loop

    # --- The lease ------------------------------------------------------------------------------

    async def _campaign(self) -> None:
        """Return once the lead is won. Meanwhile the table is kept warm and the log short."""
        log.info("standing_by")
        patience = Patience(self._parts.clock, self._parts.chance)
        while True:
            try:
                if self._restored_unread:
                    restored = read_restored(await self._parts.store.read(writes.SETTINGS))
                    self._highest = max(self._highest, restored.term if restored else 0)
                    self._restored_unread = False
                if await self._try_to_win():
                    return
                await self._skip_published()
                await self._show_that_it_waits()
                patience.restore()
            except StoreUnavailable as error:
                log.warning("cannot_campaign", error=str(error))
                patience.count(error)
            await asyncio.sleep(self._parts.chance.jitter(min(LOOK_MAX, self._election.period)))

    async def _try_to_win(self) -> bool:
        record = writes.read_leader(_first(await self._parts.store.read(writes.LEADER)))
        sent = self._parts.clock()
        if record and record.holder and record != self._election.seen:
            self._led_at = sent
            if (record.holder, record.term) != self._following:
                self._following = (record.holder, record.term)
                log.info("following", leader=record.holder, term=record.term)
        taken = self._election.observed(record, sent, self._highest_term())
        if taken is None or not await self._is_heard():
            return False
        sent = self._parts.clock()
        if not (await self._parts.store.write([taken])).changed:
            return False
        mine = self._election.won(taken, sent)
        self._highest = max(self._highest, mine.term)
        log.info("lead_won", term=mine.term, agent=mine.holder, after=record.holder if record else "")
        return True

    async def _show_that_it_waits(self) -> None:
        """So that a leader that no pod is heard by knows to whom to hand over."""
        now = self._parts.clock()
        if now - self._waits_shown >= self._parts.leases.leader * STANDBY_SHARE and await self._is_heard():
            self._waits_shown = now
            await self._parts.store.write([writes.stand_by()])

    async def _is_heard(self) -> bool:
        """Whether NATS takes messages of this agent; else it would only lead to give up again (rule R7)."""
        try:
            await self._parts.bus.flush()
        except BusUnavailable as error:
            log.warning("not_standing", error=str(error), action="trying again once NATS answers")
            return False
        return True

    def _highest_term(self) -> int:
        """Of what was ever seen here: a database that lost its documents must not make terms go back."""
        state = self._parts.feed.current
        stored = max((s.term for s in state.table.sessions.values()), default=0) if state else 0
        seen = self._election.seen
        self._highest = max(self._highest, stored, seen.term if seen else 0)
        return self._highest

    async def _skip_published(self) -> None:
        state = self._parts.feed.current
        position = _first(await self._parts.store.read(writes.POSITION))
        if state and position and _continues(position, state.table):
            self._parts.feed.skip_published(state, _versions(position, state.table))

    async def _keep(self, lead: Lead) -> None:
        """Renew the lead; ends with LeadLost the moment that it does not hold any more."""
        while True:
            await asyncio.sleep(self._election.period)
            lead.check()
            sent = self._parts.clock()
            renewal = self._election.renewal()
            try:
                async with asyncio.timeout(self._parts.leases.leader):
                    outcome = await self._parts.store.write([renewal] if renewal else [])
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("lead_not_renewed", error=str(error) or "time-out")
                continue
            if not outcome.changed:
                self._check_clocks()
                self._election.lost()
                raise LeadLost("another agent has taken the lead")
            self._election.renewed(sent)

    def _check_clocks(self) -> None:
        """Somebody has taken the lead: with time left on it, what the lease rests on does not hold."""
        if self._election.held(self._parts.clock()):
            self._parts.metrics.contradictions.inc()
            log.error(
                "lead_taken_early",
                action="check the machines' clocks: they differ by more than 1 %, unless somebody wrote it",
            )

    async def _give_up(self, mine: writes.LeaderRecord) -> None:
        """Let a standby take over at once. Guarded by holder and term, so harmless when already lost."""
        try:
            async with asyncio.timeout(1.0):
                await self._parts.store.write([writes.give_up_lead(mine)])
            log.info("lead_given_up", term=mine.term)
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("lead_not_given_up", error=str(error) or "time-out")

    # --- The scope ------------------------------------------------------------------------------

    async def _lead(self) -> None:
        lead = Lead(self._election, self._parts.clock, self._parts.chance)
        self._parts.metrics.term.set(lead.term)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep(lead), name="keep-lead")
            tasks.create_task(self._watch(lead), name="watch-lead")
            tasks.create_task(self._serve_each_table(lead), name="serve")

    async def _watch(self, lead: Lead) -> None:
        """Ends the scope when the lead lapses while a renewal is still under way."""
        while True:
            lead.check()
            await asyncio.sleep(self._election.period / 4)

    async def _serve_each_table(self, lead: Lead) -> None:
        while True:
            state = await self._parts.feed.loaded()
            try:
                await cancellation.isolated(self._serve_table(lead, state))
            except* PositionLost:
                self._stop_serving()

    def _stop_serving(self) -> None:
        if self.leading.is_set():
            self._led_at = self._parts.clock()
        self.leading.clear()
        self._parts.metrics.leading.set(0)

    async def _serve_table(self, lead: Lead, state: State) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_until_lost(state), name="watch-table")
            tasks.create_task(self._serve(lead, state, tasks), name="serve-table")

    async def _serve(self, lead: Lead, state: State, tasks: asyncio.TaskGroup) -> None:
        parts = self._parts
        await _retrying(lambda: ensure_singletons(parts.store))  # somebody may have dropped them
        settings = await _retrying(lambda: parts.store.read(writes.SETTINGS))
        check_current(settings, parts.definitions)
        self._former_liveness = former_liveness(settings)
        restored = read_restored(settings)
        if restored and (anew := restored.resumed(lead.term, parts.definitions)):
            restored = await self._resume_restore(lead, restored, anew)
        if restored and lead.term <= restored.term:
            self._highest = restored.term
            raise LeadLost(f"a restore was announced: terms go on above {restored.term}")
        relay = await self._take_up_history(lead, state, restored, tasks)
        tasks.create_task(relay.run(), name="relay")
        await _retrying(lambda: self._stamp(lead, relay))
        endpoints = Endpoints(
            tasks=tasks,
            bus=parts.bus,
            subjects=parts.subjects,
            lead=lead,
            history=relay.history,
            definitions=parts.definitions,
            metrics=parts.metrics,
        )
        # Until it serves, clients shall hear "no responders" at once, so only the probe is subscribed to.
        async with AsyncExitStack() as subscriptions:
            probed = await self._subscribed(parts.subjects.probe, endpoints)
            subscriptions.push_async_callback(probed.stop)
            restore = restored, pools_of(settings)
            await self._answer_and_judge(lead, state, restore, relay, endpoints=endpoints, tasks=tasks)
            serving = await self._subscribed(parts.subjects.all_requests, endpoints)
            subscriptions.push_async_callback(serving.stop)
            await probed.stop()
            self.leading.set()
            parts.metrics.leading.set(1)
            log.info("serving", term=lead.term, history=relay.history)
            try:
                await asyncio.Event().wait()
            finally:
                parts.feed.on_change = None

    async def _resume_restore(self, lead: Lead, before: Restored, anew: Restored) -> Restored:
        """The next lead takes reports: its sessions are told by their terms from those who report."""

        async def write() -> None:
            lead.check()
            await self._parts.store.write([announce(before, anew)])

        await _retrying(write)
        log.warning("restore_resumed", pools=sorted({*before.unsettled} & self._parts.definitions.keys()))
        return anew

    async def _subscribed(self, subject: str, endpoints: Endpoints) -> Subscription:
        """Raises Unheard where NATS does not allow it: another agent may have the permission."""
        try:
            return await _retrying(lambda: self._parts.bus.subscribe(subject, endpoints.receive))
        except Forbidden as error:
            raise Unheard(str(error)) from error

    async def _answer_and_judge(
        self,
        lead: Lead,
        state: State,
        restore: tuple[Restored | None, Collection[str]],
        relay: Relay,
        *,
        endpoints: Endpoints,
        tasks: asyncio.TaskGroup,
    ) -> None:
        parts = self._parts
        probe = Probe(
            bus=parts.bus,
            subjects=parts.subjects,
            agent=lead.agent,
            leases=parts.leases,
            clock=parts.clock,
            chance=parts.chance,
        )
        tasks.create_task(probe.run(), name="probe")
        await probe.answered.wait()
        hearing, grants = Hearing(parts.clock), self._grants(state, restore[0])
        reign = Reign(
            lead=lead,
            table=state.table,
            relay=relay,
            liveness=self._full_leases(state.table),
            grants=grants,
            use={},
            hearing=hearing,
            leases=parts.leases,
            definitions=parts.definitions,
            clock=parts.clock,
            wall_clock=parts.wall_clock,
            chance=parts.chance,
            metrics=parts.metrics,
        )
        restorer = Restorer(reign, *restore)
        requests, reaper, mirrors = (
            Requests(reign, restorer, tasks),
            Reaper(reign, probe, parts.feed.stands_still),
            Mirrors(reign),
        )

        def note(entry: Entry) -> None:
            requests.note(entry)
            reaper.note(entry)
            restorer.note(entry)

        parts.feed.on_change = note
        endpoints.open(requests)
        tasks.create_task(reaper.run(), name="reaper")
        tasks.create_task(Alarms(reign).run(), name="alarms")
        tasks.create_task(mirrors.run(), name="mirrors")
        tasks.create_task(restorer.run(), name="restorer")
        if state.after_loss:
            tasks.create_task(self._wait_out(lead, state, grants), name="wait-out")
        tasks.create_task(self._hand_over_deaf(lead, state.table, hearing, probe), name="hand-over")

    async def _hand_over_deaf(self, lead: Lead, table: Table, hearing: Hearing, probe: Probe) -> None:
        """Hearing no pod while sessions live, hand over once, if a standby waits: NATS may be torn, and the
        pods on its side (rule R7). The record says so, and the next leader does not repeat it until it has
        heard a pod. Likewise when this leader has heard itself too late to judge for `T`, but did better."""
        parts, period = self._parts, self._parts.leases.liveness / HEARD_LOOKS_PER_LEASE
        signs, waited_at, read_at = None, float("-inf"), float("-inf")
        while True:
            await asyncio.sleep(period)
            now = parts.clock()
            try:
                if now - read_at >= parts.leases.leader:
                    record, read_at = await self._leader_document(), now
                    shown = record.get("standbys", 0)
                    if signs is not None and shown != signs:
                        waited_at = now
                    signs = shown
                    if record.get("handed_over") and hearing.any.is_set():
                        await self._note_hand_over(lead, handed_over=False)
                enough = UNHEARD_SHARE * parts.leases.effective_liveness(len(table.sessions))
                silent, late = hearing.silence(), probe.late(now)
                if silent >= enough and table.alive():
                    why = f"no pod was heard for {silent:.1f} s"
                elif late >= parts.leases.leader:
                    why = f"requests to myself come back too late since {late:.1f} s"
                else:
                    continue
                if now - waited_at > 2 * parts.leases.leader:
                    continue
                if not (await self._leader_document()).get("handed_over"):
                    await self._note_hand_over(lead, handed_over=True)
                    raise Unheard(f"{why}, and a standby waits")
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))

    async def _note_hand_over(self, lead: Lead, *, handed_over: bool) -> None:
        lead.check()
        if mine := self._election.mine:
            await self._parts.store.write([writes.note_hand_over(mine, handed_over=handed_over)])

    async def _leader_document(self) -> Document:
        return _first(await self._parts.store.read(writes.LEADER)) or {}

    async def _stamp(self, lead: Lead, relay: Relay) -> None:
        """Stamp the term on all sessions, and wait until the table has passed that and everything up to
        it was published (rules R5, R6)."""
        lead.check()
        await self._parts.store.write([writes.stamp_sessions(lead.term)])
        await relay.barrier()

    async def _take_up_history(
        self, lead: Lead, state: State, restored: Restored | None, tasks: asyncio.TaskGroup
    ) -> Relay:
        """Go on where the last leader's published events end, or begin a new history with a `reset`. Every
        leader that takes reports after a restore begins one, as a new history is what makes pods report."""
        stored = _first(await _retrying(lambda: self._parts.store.read(writes.POSITION))) or {}
        taking_reports = restored is not None and restored.open
        continues = _continues(stored, state.table) and not taking_reports
        history = stored["history"] if continues else self._parts.chance.token()
        relay = Relay(
            tasks=tasks,
            state=state,
            feed=self._parts.feed,
            store=self._parts.store,
            bus=self._parts.bus,
            lead=lead,
            subjects=self._parts.subjects,
            metrics=self._parts.metrics,
            wall_clock=self._parts.wall_clock,
            definitions=self._parts.definitions,
            history=history,
        )
        if continues:
            held = _versions(stored, state.table)
            state.table.resume(held)
            await relay.publish_log(above=held)
            return relay
        versions = {name: pool.version for name, pool in state.table.pools.items()}
        started = position_document(Position("", 0, versions), history)
        await _retrying(lambda: self._parts.store.write([writes.save_position(lead.term, started)]))
        reason = "the database was restored" if taking_reports else "the table was read anew"
        log.info("new_history", history=history, reason=reason)
        await relay.publish_log()
        await relay.send_resets(reason)
        return relay

    def _grants(self, state: State, restored: Restored | None) -> Grants:
        """When this leader may grant and claim. After documents were dropped under it, or a restore, not
        before every pod that may still issue from what was lost has certainly stopped, `A + W`: those chunks
        look free now."""
        lag = max(pool.usage_lag_ms for pool in self._parts.definitions.values()) / 1000
        allocation_ms, wait = round(self._parts.leases.allocation * 1000), 0.0
        if state.after_loss:
            wait = allocation_ms / 1000 + lag
            log.error("documents_dropped", action=f"nothing is granted or claimed for {wait:g} s")
        if restored and restored.open:
            longest = restored.longest(allocation_ms, state.table.sessions.values())
            wait = max(wait, longest / 1000 + lag)
        return Grants(self._parts.clock, wait)

    async def _wait_out(self, lead: Lead, state: State, grants: Grants) -> None:
        """Later leads of this process need not wait for the same loss again."""
        while True:
            await asyncio.sleep(grants.left())
            lead.check()
            if grants.left() <= 0:
                return self._parts.feed.waited_out(state)

    def _full_leases(self, table: Table) -> LivenessLeases:
        return full_leases(table, self._parts.leases, self._parts.clock(), self._former_liveness)


async def _until_lost(state: State) -> None:
    await state.lost.wait()
    raise PositionLost("the table is being read anew")


async def _retrying(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until it works; the lead's scope ends it when the lead lapses meanwhile."""
    while True:
        try:
            return await attempt()
        except Forbidden:
            raise
        except (StoreUnavailable, BusUnavailable) as error:
            log.warning("trying_again", error=str(error))
            await asyncio.sleep(RETRY_DELAY)


def _first(documents: list[Document]) -> Document | None:
    return documents[0] if documents else None


def _continues(position: Document, table: Table) -> bool:
    """Whether everything after a stored position is in the log of a table that began before it."""
    return bool(position.get("history")) and int(position["at"]) >= table.started


def _versions(position: Document, table: Table) -> dict[str, Version]:
    """Each pool's last version at a stored position; a pool it does not know was never published."""
    stored = position.get("versions", {})
    return {pool: (int(v[0]), int(v[1])) if (v := stored.get(pool)) else (0, 0) for pool in table.pools}
