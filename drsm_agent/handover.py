"""A leader that leads to no end gives the lead to a standby that may do better (rule R7).

NATS may be torn, and the pods on the other side: then no pod is heard. (A single pod that was heard before is
more likely gone: its session expires after `L`, as any other.) Or this leader has heard itself too
late to judge for `T`. The leader's record says that it was handed over, and the next leader does not repeat
that before it has heard a pod.
"""

import asyncio

import structlog

from drsm_agent.core import writes
from drsm_agent.core.documents import Document
from drsm_agent.errors import StoreUnavailable, Unheard
from drsm_agent.ports import Store
from drsm_agent.probe import Probe
from drsm_agent.reign import Reign

UNHEARD_SHARE = 0.75
"""Of `L`, without a word of any pod: nobody has been expired by then."""
SIGNS_MIN = 2
"""Sessions of pods that were heard in this lead and are not any more: that NATS is torn, and not that one pod
is gone, shows only where several are silent at once."""
LOOKS_PER_LEASE = 6
"""So often within `L` is it looked whether the lead is of any use."""

log = structlog.get_logger("drsm_agent.handover")


class HandOver:
    """Ends a lead that is of no use, where another agent's may be of some."""

    def __init__(self, reign: Reign, probe: Probe, store: Store) -> None:
        self._lead, self._table, self._hearing = reign.lead, reign.table, reign.hearing
        self._clock, self._leases = reign.clock, reign.leases
        self._probe, self._store = probe, store
        self._signs: int | None = None
        """How many signs standbys had given when the record was read last."""
        self._waited_at = self._read_at = float("-inf")
        """When a standby was last seen to have given one; when the record was read last."""

    async def run(self) -> None:
        """Raises Unheard to hand over."""
        while True:
            await asyncio.sleep(self._leases.liveness / LOOKS_PER_LEASE)
            now = self._clock()
            try:
                if now - self._read_at >= self._leases.leader:
                    await self._look_for_standbys(now)
                why = self._reason(now)
                if not why or now - self._waited_at > 2 * self._leases.leader:
                    continue
                if not (await self._record()).get("handed_over"):
                    await self._note(handed_over=True)
                    raise Unheard(f"{why}, and a standby waits")
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))

    async def _look_for_standbys(self, now: float) -> None:
        record, self._read_at = await self._record(), now
        shown = record.get("standbys", 0)
        if self._signs is not None and shown != self._signs:
            self._waited_at = now
        self._signs = shown
        if record.get("handed_over") and self._hearing.any.is_set():
            await self._note(handed_over=False)

    def _reason(self, now: float) -> str:
        """Why this lead is of no use; empty while it is of some."""
        enough = UNHEARD_SHARE * self._leases.effective_liveness(len(self._table.sessions))
        silent, late = self._hearing.silence(), self._probe.late(now)
        alive = len(self._table.alive())
        torn = alive >= SIGNS_MIN or (alive and not self._hearing.any.is_set())
        if silent >= enough and torn:
            return f"no pod was heard for {silent:.1f} s"
        if late >= self._leases.leader:
            return f"requests to myself come back too late since {late:.1f} s"
        return ""

    async def _record(self) -> Document:
        documents = await self._store.read(writes.LEADER)
        return documents[0] if documents else {}

    async def _note(self, *, handed_over: bool) -> None:
        self._lead.check()
        if record := self._lead.record:
            await self._store.write([writes.note_hand_over(record, handed_over=handed_over)])
