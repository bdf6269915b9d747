"""The leader's request to itself over NATS (rule R7): do not judge when you are sick.

A leader that cannot hear itself cannot hear the pods either; then nobody is expired, and when that lasts
for `T` it gives up the lead.
"""

import asyncio

import structlog

from drsm_agent.core.lease import Leases
from drsm_agent.errors import BusUnavailable, Unheard
from drsm_agent.lead import Lead
from drsm_agent.ports import Bus, Chance, Clock
from drsm_sdk.wire import codec, messages
from drsm_sdk.wire.subjects import Subjects

PROBES_PER_LEASE = 6
"""Probes within one `L`, so that one lost probe does not stop the judging."""

log = structlog.get_logger("drsm_agent.probe")


class _NotMine(Exception):
    """Somebody else answered: no sign of health, but NATS carries messages."""


class Probe:
    """Asks itself every `period` seconds; `healthy` while an answer came within half of `L`. `run` raises
    Unheard when no answer at all has come for `T`."""

    def __init__(
        self, *, bus: Bus, subjects: Subjects, lead: Lead, leases: Leases, clock: Clock, chance: Chance
    ) -> None:
        self._bus, self._subject, self._lead = bus, subjects.probe, lead
        self._liveness, self._patience = leases.liveness, leases.leader
        self._clock, self._chance = clock, chance
        self._sent_of_last_answer = float("-inf")
        self._recovered = self._failing = False
        self.answered = asyncio.Event()

    @property
    def period(self) -> float:
        return self._liveness / PROBES_PER_LEASE

    def healthy(self, now: float) -> bool:
        return now - self._sent_of_last_answer < self._liveness / 2

    def recovered(self) -> bool:
        """Whether an answer came after a while without; true once per recovery."""
        recovered, self._recovered = self._recovered, False
        return recovered

    async def run(self) -> None:
        carried = self._clock()
        while True:
            sent = self._clock()
            try:
                await self._ask()
                carried = sent
                if self.answered.is_set() and not self.healthy(sent):
                    self._recovered = True
                if self._failing:
                    log.info("probe_answered_again")
                self._sent_of_last_answer, self._failing = sent, False
                self.answered.set()
            except (_NotMine, codec.DecodeError) as error:
                carried = sent
                self._failed(error)
            except BusUnavailable as error:
                self._failed(error)
                if (silent := self._clock() - carried) >= self._patience:
                    raise Unheard(f"no request to myself came back for {silent:.1f} s: {error}") from error
            await asyncio.sleep(self.period)

    def _failed(self, error: Exception) -> None:
        if not self._failing:  # once; a metric and the readiness say how long
            log.warning("probe_unanswered", error=str(error))
        self._failing = True

    async def _ask(self) -> None:
        nonce = self._chance.token()
        answer = await self._bus.request(
            self._subject, codec.encode(codec.to_map(messages.Probe(nonce))), self.period
        )
        body = codec.decode(answer)
        if (body.get("agent"), body.get("nonce")) != (self._lead.agent, nonce):
            raise _NotMine("another agent answered")
