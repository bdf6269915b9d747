"""The leader's request to itself (rule R7), on virtual time: answers come, or come late, or do not."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from drsm_agent.core.lease import Leases
from drsm_agent.errors import Unheard
from drsm_agent.ports import Incoming
from drsm_agent.probe import Probe
from drsm_sdk.wire import codec
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.loop import Node, VirtualLoop, run
from tests.simulation.network import AgentBus, Network, Weather
from tests.simulation.world import AgentChance

L, T = 3.0, 3.0
AGENT = "agent-1"


class Stage:
    """A leader whose requests to itself are answered `delay` seconds later, or never."""

    def __init__(self, liveness: float = L, leader: float = T) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.clock, self.delay = loop.time, 0.0
        self.silent = False
        self._node = Node(loop, "agent")
        network = Network(self._node, random.Random(1), Weather())
        network.calm = True
        self._bus, self._subjects = AgentBus(network, self._node), Subjects("drsm")
        self._bus.connection.open()
        chance = AgentChance(random.Random(2))
        self.probe = Probe(
            bus=self._bus,
            subjects=self._subjects,
            agent=AGENT,
            leases=Leases(liveness=liveness, allocation=300.0, leader=leader),
            clock=self.clock,
            chance=chance,
        )
        self.seen: list[bool] = []
        """Whether it was healthy, ten times a second."""

    async def _answer(self, incoming: Incoming) -> None:
        if self.silent:
            return
        answer = codec.encode(codec.decode(incoming.data) | {"agent": AGENT})
        await asyncio.sleep(self.delay)
        await self._bus.publish(incoming.reply, answer)

    async def lives(self, *what: Callable[[], Awaitable[None]]) -> None:
        """Probe while this and that happens, one after the other. Raises Unheard."""
        await self._bus.subscribe(self._subjects.probe, self._answer)
        probing = asyncio.ensure_future(self.probe.run())
        happening = asyncio.ensure_future(self._all(what))
        await asyncio.wait([probing, happening], return_when=asyncio.FIRST_COMPLETED)
        over = probing.done()
        for task in (probing, happening):
            task.cancel()
        await asyncio.wait([probing, happening])
        await self._node.bury()
        if over:
            probing.result()

    async def _all(self, what: tuple[Callable[[], Awaitable[None]], ...]) -> None:
        for one in what:
            await one()

    def answers(self, delay: float, seconds: float) -> Callable[[], Awaitable[None]]:
        """For so many seconds answers come after `delay`."""

        async def pass_by() -> None:
            self.silent, self.delay, self.seen = False, delay, []
            for _ in range(round(seconds * 10)):
                await asyncio.sleep(0.1)
                self.seen.append(self.probe.healthy(self.clock()))

        return pass_by

    def no_answers(self, seconds: float) -> Callable[[], Awaitable[None]]:
        async def pass_by() -> None:
            self.silent = True
            await asyncio.sleep(seconds)

        return pass_by


def _unheard(error: BaseExceptionGroup) -> bool:
    return error.subgroup(Unheard) is not None


@pytest.mark.parametrize(("liveness", "leader"), [(3.0, 3.0), (20.0, 3.0), (60.0, 1.0), (2.5, 1.0)])
def test_a_leader_that_hears_itself_keeps_its_lead_whatever_the_leases_are(
    liveness: float, leader: float
) -> None:
    async def live() -> None:
        stage = Stage(liveness, leader)
        await stage.lives(stage.answers(0.01, 200.0))
        assert all(stage.seen[1:])

    run(live())


def test_silence_for_t_ends_the_lead() -> None:
    async def live() -> None:
        stage = Stage()
        with pytest.raises(BaseExceptionGroup, check=_unheard):
            await stage.lives(stage.answers(0.01, 5.0), stage.no_answers(60.0))
        assert 5.0 + T - 2 * stage.probe.period < stage.clock() <= 5.0 + T + 2 * stage.probe.period

    run(live())


def test_answers_that_come_too_late_to_judge_by_end_no_lead_but_are_told() -> None:
    """A standby may be better off; where there is none, nobody is helped by giving up."""

    async def live() -> None:
        stage = Stage()
        await stage.lives(stage.answers(0.01, 5.0), stage.answers(2.0, 20.0))
        assert not any(stage.seen[30:])
        assert stage.probe.late(stage.clock()) == pytest.approx(20.0 - L / 2, abs=1.0)

    run(live())


def test_who_never_heard_itself_in_time_does_not_hope_that_others_do() -> None:
    """Else the lead would go round and round in a domain that is slow as a whole."""

    async def live() -> None:
        stage = Stage()
        await stage.lives(stage.answers(2.0, 20.0))
        assert stage.probe.answered.is_set()
        assert stage.probe.late(stage.clock()) == 0

    run(live())


def test_everyone_is_spared_once_after_a_while_without_answers() -> None:
    async def live() -> None:
        stage = Stage()
        await stage.lives(stage.answers(0.01, 5.0), stage.no_answers(2.5), stage.answers(0.01, 5.0))
        assert stage.probe.recovered()
        assert not stage.probe.recovered()

    run(live())


def test_answers_at_the_border_of_too_late_spare_nobody() -> None:
    """Its health comes and goes with each answer; else nobody would be declared dead any more."""

    async def live() -> None:
        stage = Stage()
        await stage.lives(stage.answers(0.01, 5.0), stage.answers(1.2, 20.0))
        assert {True, False} <= set(stage.seen[30:])
        assert not stage.probe.recovered()

    run(live())
