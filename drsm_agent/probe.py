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
    """Asks itself every `period` seconds; `healthy` while an answer came to what was sent within half of `L`.

    An answer that comes late counts for when its request was sent, so that a backlog of requests, which
    every other agent would have as well, ends no lead. `run` raises Unheard once the youngest request that
    was answered by anybody is `T` old.
    """

    def __init__(
        self, *, bus: Bus, subjects: Subjects, lead: Lead, leases: Leases, clock: Clock, chance: Chance
    ) -> None:
        self._bus, self._subject, self._lead = bus, subjects.probe, lead
        self._liveness, self._patience = leases.liveness, leases.leader
        self._clock, self._chance = clock, chance
        self._answered = self._carried = float("-inf")
        """When the youngest request was sent that I answered, and that anybody did."""
        self._recovered = self._failing = False
        self._error: Exception | None = None
        self.answered = asyncio.Event()

    @property
    def period(self) -> float:
        return self._liveness / PROBES_PER_LEASE

    def healthy(self, now: float) -> bool:
        return now - self._answered < self._liveness / 2

    def recovered(self) -> bool:
        """Whether it became healthy again after a while without answers; true once per recovery."""
        recovered, self._recovered = self._recovered, False
        return recovered

    async def run(self) -> None:
        self._carried = began = self._clock()
        async with asyncio.TaskGroup() as requests:  # at most T / period of them, as none waits longer
            while True:
                requests.create_task(self._ask())
                await asyncio.sleep(self.period)
                now = self._clock()
                if now - max(self._answered, began) > 2 * self.period and not self._failing:
                    self._failing = True  # said once; a metric and the readiness say how long
                    log.warning("probe_unanswered", error=str(self._error or "no answer yet"))
                if (silent := now - self._carried) >= self._patience:
                    raise Unheard(f"no request to myself came back for {silent:.1f} s: {self._error}")

    async def _ask(self) -> None:
        sent, nonce = self._clock(), self._chance.token()
        request = codec.encode(codec.to_map(messages.Probe(nonce)))
        try:
            body = codec.decode(await self._bus.request(self._subject, request, self._patience))
            if (body.get("agent"), body.get("nonce")) != (self._lead.agent, nonce):
                raise _NotMine("another agent answered")
        except BusUnavailable as error:
            self._error = error
        except (_NotMine, codec.DecodeError) as error:
            self._error, self._carried = error, max(self._carried, sent)
        else:
            self._carried = max(self._carried, sent)
            self._heard(sent)

    def _heard(self, sent: float) -> None:
        now = self._clock()
        before = self.healthy(now)
        self._answered = max(self._answered, sent)
        if self.answered.is_set() and self.healthy(now) and not before:
            self._recovered = True
        self.answered.set()
        if self._failing and self.healthy(now):
            self._failing = False
            log.info("probe_answered_again")
