"""How long nobody serves when a leader ends, to the letter: real agents on virtual time, where nothing else
takes time but the network.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from drsm_agent import settings
from drsm_agent.service import Agent, stored_settings
from drsm_agent.store.stored import ensure_stored
from tests.harness import POOL
from tests.simulation.database import Database, View
from tests.simulation.loop import Node, VirtualLoop, run
from tests.simulation.network import CALM, AgentBus, Network
from tests.simulation.world import AgentChance

AFTER_A_CRASH = 1.0
"""Seconds beyond `T` until another agent serves."""
AFTER_SIGTERM = 0.5
MOMENTS = 20
"""The leader ends at so many moments of its lease, each in a world of its own."""


class Standing:
    """Two or more agents of one domain, each a process of its own."""

    def __init__(self, seed: int, leader_ttl: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop, self.chance = loop, random.Random(seed)
        environment = Node(loop, "world")
        self.network = Network(environment, self.chance, CALM)
        self.database = Database([POOL], environment, self.chance)
        self.network.calm = self.database.calm = True
        self.settings = settings.load(
            nats_url="nats://simulated:4222",
            mongo_url="mongodb://simulated/?replicaSet=rs0",
            mongo_database="simulated",
            pools=[{"name": POOL}],
            leader_ttl=leader_ttl,
            liveness_ttl=max(3.0, leader_ttl),
        )
        self.agents: dict[str, tuple[Node, Agent, asyncio.Task[None]]] = {}

    async def start(self, name: str) -> Agent:
        node = Node(self.loop, name)
        bus, view = AgentBus(self.network, node), View(self.database, node)
        bus.connection.open()
        await node.start(ensure_stored(view, stored_settings(self.settings)))
        chance = AgentChance(random.Random(self.chance.getrandbits(64)))
        agent = Agent(
            self.settings, view, bus, clock=self.loop.time, wall_clock=self.loop.time, chance=chance
        )
        agent.name = name
        self.agents[name] = (node, agent, node.start(agent.run()))
        return agent

    async def end(self) -> None:
        for node, _, _ in self.agents.values():
            await node.bury()


@contextmanager
def timed(loop: VirtualLoop, most: float) -> Iterator[None]:
    began = loop.time()
    yield
    assert loop.time() - began <= most


async def _ends(seed: int, leader_ttl: float, *, crash: bool) -> None:
    standing = Standing(seed, leader_ttl)
    try:
        first = await standing.start("first")
        await first.leader.leading.wait()
        second = await standing.start("second")
        await asyncio.sleep(1 + leader_ttl * seed / MOMENTS)
        assert not second.leader.leading.is_set()
        node, _, task = standing.agents["first"]
        with timed(standing.loop, leader_ttl + AFTER_A_CRASH if crash else AFTER_SIGTERM):
            if crash:
                node.kill()
            else:
                task.cancel()
            await second.leader.leading.wait()
    finally:
        await standing.end()


@pytest.mark.parametrize("leader_ttl", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("crash", [True, False], ids=["crash", "SIGTERM"])
def test_whenever_a_leader_ends_another_serves_in_time(leader_ttl: float, crash: bool) -> None:
    """Within `T` and a second after a crash, within half a second after SIGTERM."""
    for seed in range(MOMENTS):
        run(_ends(seed, leader_ttl, crash=crash))
