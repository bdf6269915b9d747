"""Standing by: follow whoever leads, keep the table warm and the log short, take the lead when it is free.

When that is, `core/election.py` says (rule R8). `Leader` runs this until the lead is won, and again after it
was lost or given up.
"""

import asyncio

import structlog

from drsm_agent.core import writes
from drsm_agent.core.election import Election
from drsm_agent.core.position import read_published
from drsm_agent.core.restore import read_restored
from drsm_agent.errors import BusUnavailable, StoreUnavailable
from drsm_agent.parts import Parts
from drsm_agent.patience import Patience

LOOK_MAX = 0.25
"""Seconds between two looks of a standby at the leader's record: one that gives up is followed at once."""
STANDBY_SHARE = 0.5
"""Of `T`, between two signs of a standby: at least one comes while a leader waits for it."""

log = structlog.get_logger("drsm_agent.campaign")


class Campaign:
    """How one agent comes to lead. `led_at` is when anybody was last seen to lead, this agent or another."""

    def __init__(self, parts: Parts, election: Election) -> None:
        self._parts, self._election = parts, election
        self.led_at = parts.clock()
        self._highest = 0
        self._following = ("", 0)
        self._restored_unread = True
        self._signed_at = float("-inf")

    def go_on_above(self, term: int) -> None:
        """Whatever is won from now on has a higher term."""
        self._highest = max(self._highest, term)

    async def run(self) -> None:
        """Return once the lead is won."""
        log.info("standing_by")
        patience = Patience(self._parts.clock, self._parts.chance)
        while True:
            try:
                if self._restored_unread:
                    restored = read_restored(await self._parts.store.read(writes.SETTINGS))
                    self.go_on_above(restored.term if restored else 0)
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
        documents = await self._parts.store.read(writes.LEADER)
        record, sent = writes.read_leader(documents), self._parts.clock()
        if record and record.holder and record != self._election.seen:
            if writes.is_served(documents, record):
                self.led_at = sent
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
        self.go_on_above(mine.term)
        log.info("lead_won", term=mine.term, agent=mine.holder, after=record.holder if record else "")
        return True

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
        self.go_on_above(max(stored, seen.term if seen else 0))
        return self._highest

    async def _skip_published(self) -> None:
        """What the leader has published is not to be kept for the next one."""
        state = self._parts.feed.current
        published = read_published(await self._parts.store.read(writes.POSITION))
        if state and published and published.is_continued_by(state.table):
            self._parts.feed.skip_published(state, published.versions_of(state.table))

    async def _show_that_it_waits(self) -> None:
        """So that a leader that no pod is heard by knows to whom to hand over."""
        now = self._parts.clock()
        if now - self._signed_at >= self._parts.leases.leader * STANDBY_SHARE and await self._is_heard():
            self._signed_at = now
            await self._parts.store.write([writes.stand_by()])
