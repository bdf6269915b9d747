"""The leader's request to itself over NATS (rule R7): do not judge when you are sick.

A leader that cannot hear itself cannot hear the pods either; then nobody is expired, and when that lasts
for `T` it gives up the lead.
"""

import asyncio

import structlog

from drsm_agent.core.lease import Leases
from drsm_agent.errors import BusUnavailable, Unheard
from drsm_agent.ports import Bus, Chance, Clock
from drsm_sdk.wire import codec, messages
from drsm_sdk.wire.subjects import Subjects

PROBES_PER_LEASE = 6
"""Probes within one `L`, so that one lost probe does not stop the judging."""
PROBES_PER_LEAD = 3
"""Probes within one `T` at least, so that one lost probe does not end the lead."""
BLIND_SHARE = 0.25
"""Of `L`: after being unhealthy for so long there may be leases that only ran out as nobody was heard."""

SHOWN_MAX = 60
"""Bytes of a stranger's answer in the log."""

log = structlog.get_logger("drsm_agent.probe")


class Probe:
    """Asks itself every `period` seconds; `healthy` while an answer came to what was sent within half of `L`.

    An answer counts for when its request was sent, however late it comes. `run` raises Unheard when none at
    all has come for `T`. Where they come, but late, as in a flood of requests, see `late`.
    """

    def __init__(
        self, *, bus: Bus, subjects: Subjects, agent: str, leases: Leases, clock: Clock, chance: Chance
    ) -> None:
        self._bus, self._subject, self._agent = bus, subjects.probe, agent
        self._enough, self._patience = leases.liveness / 2, leases.leader
        self._blind = leases.liveness * BLIND_SHARE
        self.period = min(leases.liveness / PROBES_PER_LEASE, leases.leader / PROBES_PER_LEAD)
        self._clock, self._chance = clock, chance
        self._sent = float("-inf")
        """When the youngest request was sent that this agent has answered."""
        self._carried = clock()
        """When the last answer came, whoever sent it: NATS carries."""
        self._well_until = float("inf")
        """Since when no answer was young enough, if that lies in the past."""
        self._was_healthy = self._recovered = self._failing = False
        self._error: Exception | None = None
        self._strangers = False
        self.answered = asyncio.Event()

    def healthy(self, now: float) -> bool:
        return now - self._sent < self._enough

    def late(self, now: float) -> float:
        """Seconds since it was healthy; 0 for one that never was, as then others may not be, either."""
        return max(now - self._well_until, 0.0) if self._was_healthy else 0.0

    def recovered(self) -> bool:
        """Whether it became healthy again after a while without answers; true once per recovery."""
        recovered, self._recovered = self._recovered, False
        return recovered

    async def run(self) -> None:
        began = self._carried = self._clock()
        async with asyncio.TaskGroup() as requests:  # at most T / period of them, as none waits longer
            while True:
                requests.create_task(self._ask())
                await asyncio.sleep(self.period)
                now = self._clock()
                if now - max(self._sent, began) > 2 * self.period and not self._failing:
                    self._failing = True  # said once
                    log.warning("probe_unanswered", error=str(self._error or "no answer yet"))
                if (silent := now - self._carried) >= self._patience:
                    raise Unheard(f"no request to myself came back for {silent:.1f} s: {self._error}")

    async def _ask(self) -> None:
        sent, nonce = self._clock(), self._chance.token()
        request = codec.encode(codec.to_map(messages.Probe(nonce)))

        def mine(answer: bytes) -> bool:
            """Somebody else's answer is no sign of health, but NATS carries messages."""
            self._carried = self._clock()
            return self._is_mine(answer, nonce)

        try:
            await self._bus.request(self._subject, request, self._patience, mine)
        except BusUnavailable as error:
            self._error = error
        else:
            self._heard(sent, self._carried)

    def _is_mine(self, answer: bytes, nonce: str) -> bool:
        try:
            body = codec.decode(answer)
        except codec.DecodeError:
            body = {}
        if (body.get("agent"), body.get("nonce")) == (self._agent, nonce):
            return True
        if "agent" not in body and not self._strangers:
            self._strangers = True
            log.warning(
                "answered_by_others",
                answer=repr(answer[:SHOWN_MAX]),
                action="a JetStream stream that records drsm.> acknowledges requests to who asked: make it "
                "anew with --no-ack, or clients of other kinds take its answers for the agent's",
            )
        return False

    def _heard(self, sent: float, now: float) -> None:
        if not self.answered.is_set():
            self._well_until = now
        self.answered.set()
        self._sent = max(self._sent, sent)
        if not self.healthy(now):
            return
        self._recovered |= now - self._well_until >= self._blind
        self._well_until, self._was_healthy = self._sent + self._enough, True
        if self._failing:
            self._failing = False
            log.info("probe_answered_again")
