"""A small world in which nothing takes time but the network, and nothing happens but what a test does: real
agents and real pods on virtual time, each a process of its own.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from drsm_agent import settings
from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.core.writes import Outcome, Write
from drsm_agent.ports import Batch, Snapshot
from drsm_agent.service import Agent, stored_settings
from drsm_agent.store.stored import ensure_stored
from drsm_sdk import Drsm, Pod, ambient
from tests.simulation.database import Database, View
from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.network import CALM, AgentBus, Network, PodTransport
from tests.simulation.world import AgentChance

FOREVER = 1e9


@dataclass(frozen=True, slots=True)
class Barred:
    """Writes to one document: they wait until it is `open`."""

    space: str
    key: str
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)


class Listed(View):
    """The way to the database of an agent that follows only the pools on its list."""

    def __init__(self, database: Database, node: Node, pools: Sequence[str], bars: Sequence[Barred]) -> None:
        super().__init__(database, node)
        self._followed = {*pools, SESSIONS, STAMPS}
        self._bars = bars

    async def write(self, writes: Sequence[Write]) -> Outcome:
        for bar in self._bars:
            if any((write.space, write.key) == (bar.space, bar.key) for write in writes):
                bar.reached.set()
                await bar.open.wait()
        return await super().write(writes)

    async def snapshot(self) -> Snapshot:
        snapshot = await super().snapshot()
        spaces = {space: docs for space, docs in snapshot.spaces.items() if space in self._followed}
        return Snapshot(snapshot.at, spaces)

    async def changes(
        self, *, after: int | None = None, token: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        async with aclosing(super().changes(after=after, token=token)) as batches:
            async for batch in batches:
                yield replace(batch, changes=[c for c in batch.changes if c.space in self._followed])


class Standing:
    """The agents of one domain, its database and its pods."""

    def __init__(self, seed: int, pools: Sequence[dict[str, Any]], **leases: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop, self.chance = loop, random.Random(seed)
        self.node = Node(loop, "world")
        self.network = Network(self.node, self.chance, CALM)
        self.database = Database([pool["name"] for pool in pools], self.node, self.chance)
        self.network.calm = self.database.calm = True
        self._pools, self._leases = pools, leases
        self.agents: dict[str, tuple[Node, Agent, asyncio.Task[None]]] = {}
        self._bars: list[Barred] = []
        self._transports: dict[str, PodTransport] = {}

    async def start(self, name: str, **other: Any) -> Agent:
        """An agent; `other` are settings that only it has."""
        given: dict[str, Any] = {
            "nats_url": "nats://simulated:4222",
            "mongo_url": "mongodb://simulated/?replicaSet=rs0",
            "mongo_database": "simulated",
            "pools": self._pools,
        }
        configured = settings.load(**(given | self._leases | other))
        node = Node(self.loop, name)
        bus = AgentBus(self.network, node)
        view = Listed(self.database, node, list(configured.definitions), self._bars)
        bus.connection.open()
        await node.start(ensure_stored(view, stored_settings(configured)))
        chance = AgentChance(random.Random(self.chance.getrandbits(64)))
        agent = Agent(configured, view, bus, clock=self.loop.time, wall_clock=self.loop.time, chance=chance)
        agent.name = name
        self.agents[name] = (node, agent, node.start(agent.run()))
        return agent

    async def stop(self, name: str) -> None:
        """As by SIGTERM."""
        node, _, task = self.agents.pop(name)
        task.cancel()
        await asyncio.wait([task])
        await node.bury()

    def bar(self, space: str, key: str) -> Barred:
        """From now on writes to this document wait."""
        bar = Barred(space, key)
        self._bars.append(bar)
        return bar

    @asynccontextmanager
    async def pod(self, name: str, timeout: float = 30.0) -> AsyncIterator[Drsm]:
        transport = self._transports[name] = PodTransport(self.network, Node(self.loop, name))
        drsm = Drsm.connect(
            "nats://simulated",
            Pod(name, "10.0.0.1", "i"),
            transport=transport,
            clock=self.loop.time,
            chance=ambient.Chance(random.Random(self.chance.getrandbits(64))),
            timeout=timeout,
        )
        async with drsm:
            yield drsm

    def cut_off(self, name: str) -> None:
        """For good: for everybody else it is as if the pod were dead."""
        self._transports[name].connection.cut(out=True, back=True, seconds=FOREVER)

    def reach(self, name: str) -> None:
        """The network carries to and from a pod again."""
        self._transports[name].connection.mend()

    async def end(self) -> None:
        for node, _, _ in self.agents.values():
            await node.bury()
