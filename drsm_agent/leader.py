"""Keep and lose the lead, once `Campaign` has won it; whatever only a leader does lives inside its scope.

    campaign -> won -> log published -> stamp -> table has passed the stamp, and that was published
             -> probe answered -> every session a full lease -> serve ... until lost or given up

An agent that lost the lead drops all leader work before anything else (rule R8): the scope is one
task group, and the task that keeps the lead ends it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import structlog

from drsm_agent import cancellation
from drsm_agent.alarms import Alarms
from drsm_agent.campaign import Campaign
from drsm_agent.core import writes
from drsm_agent.core.election import Election
from drsm_agent.core.position import Position, read_published
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
from drsm_agent.feed import Entry, State
from drsm_agent.go_pods import GoPods
from drsm_agent.handover import HandOver
from drsm_agent.lead import Lead
from drsm_agent.mirrors import Mirrors
from drsm_agent.parts import Parts
from drsm_agent.ports import Subscription
from drsm_agent.probe import Probe
from drsm_agent.reaper import Reaper
from drsm_agent.reign import Grants, Hearing, Reign
from drsm_agent.relay import Relay
from drsm_agent.requests import Requests
from drsm_agent.restorer import Restorer
from drsm_agent.store.stored import check_current, ensure_singletons

RETRY_DELAY = 0.2

log = structlog.get_logger("drsm_agent.leader")
T = TypeVar("T")


class Leader:
    """One agent's part in the election. `leading` is set while it serves."""

    def __init__(self, agent: str, parts: Parts) -> None:
        self._parts = parts
        self._election = Election(agent, parts.leases.leader)
        self._campaign = Campaign(parts, self._election)
        self._former_liveness = 0.0
        self.leading = asyncio.Event()

    @property
    def seen(self) -> writes.LeaderRecord | None:
        """The leader's record as last read: who leads when this agent does not."""
        return self._election.seen

    def leaderless(self) -> float:
        """Seconds since anybody was seen to lead; 0 while this agent serves."""
        return 0.0 if self.leading.is_set() else self._parts.clock() - self._campaign.led_at

    async def run(self) -> None:
        while True:
            await self._campaign.run()
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
            self._campaign.led_at = self._parts.clock()
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
            self._campaign.go_on_above(restored.term)
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
            probe = await self._heard_by_itself(lead, tasks)
            reign = self._reign(lead, state, relay, restored)
            endpoints.open(self._judge(reign, Restorer(reign, restored, pools_of(settings)), probe, tasks))
            if state.after_loss:
                tasks.create_task(self._wait_out(reign, state), name="wait-out")
            serving = await self._subscribed(parts.subjects.all_requests, endpoints)
            subscriptions.push_async_callback(serving.stop)
            await probed.stop()
            await _retrying(lambda: self._tell_standbys(lead))
            self.leading.set()
            parts.metrics.leading.set(1)
            log.info("serving", term=lead.term, history=relay.history)
            try:
                await asyncio.Event().wait()
            finally:
                parts.feed.on_change = None

    async def _tell_standbys(self, lead: Lead) -> None:
        """Whoever has won a lead and cannot serve, as NATS does not carry it, makes no standby ready."""
        lead.check()
        if mine := self._election.mine:
            await self._parts.store.write([writes.note_serving(mine)])

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

    async def _heard_by_itself(self, lead: Lead, tasks: asyncio.TaskGroup) -> Probe:
        """Its requests to itself, once one was answered."""
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
        return probe

    def _reign(self, lead: Lead, state: State, relay: Relay, restored: Restored | None) -> Reign:
        """From now on deaths are judged, and everybody has had no chance to be heard yet: a full lease."""
        parts = self._parts
        return Reign(
            lead=lead,
            table=state.table,
            relay=relay,
            liveness=self._full_leases(state.table),
            grants=self._grants(state, restored),
            use={},
            hearing=Hearing(parts.clock),
            leases=parts.leases,
            go=parts.go,
            definitions=parts.definitions,
            clock=parts.clock,
            chance=parts.chance,
            metrics=parts.metrics,
        )

    def _judge(self, reign: Reign, restorer: Restorer, probe: Probe, tasks: asyncio.TaskGroup) -> Requests:
        """Start whatever judges, claims and watches; returns what answers."""
        go_pods = GoPods(reign, probe, self._parts.feed.stands_still)
        mirrors = Mirrors(reign, go_pods)
        requests = Requests(reign, restorer, mirrors, tasks)
        reaper = Reaper(reign, probe, mirrors)

        def note(entry: Entry) -> None:
            for part in (go_pods, mirrors, requests, reaper, restorer):
                part.note(entry)

        self._parts.feed.on_change = note
        tasks.create_task(reaper.run(), name="reaper")
        tasks.create_task(Alarms(reign, self._parts.store).run(), name="alarms")
        tasks.create_task(mirrors.run(), name="mirrors")
        tasks.create_task(restorer.run(), name="restorer")
        tasks.create_task(HandOver(reign, probe, self._parts.store).run(), name="hand-over")
        return requests

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
        published = read_published(await _retrying(lambda: self._parts.store.read(writes.POSITION)))
        taking_reports = restored is not None and restored.open
        if taking_reports or (published and not published.is_continued_by(state.table)):
            published = None
        history = published.history if published else self._parts.chance.token()
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
        if published:
            held = published.versions_of(state.table)
            state.table.resume(held)
            await relay.publish_log(above=held)
            return relay
        versions = {name: pool.version for name, pool in state.table.pools.items()}
        started = Position("", 0, versions).document(history)
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

    async def _wait_out(self, reign: Reign, state: State) -> None:
        """Later leads of this process need not wait for the same loss again."""
        while True:
            await asyncio.sleep(reign.grants.left())
            reign.lead.check()
            if reign.grants.left() <= 0:
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
