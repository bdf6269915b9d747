"""What every benchmark runs in: the real servers, and a domain of its own with an agent process."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import nats
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from drsm_agent.embedded import Process, Stack
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects
from tests.harness import TRY_SECONDS, Domain, Requester

START_SECONDS = 60.0
"""How long an agent, a pod or a demux may take to begin; it is not measured."""
RUN_AGENT = (sys.executable, "-c", "from drsm_agent.cli import main; main()", "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    turns, rounds   calls per sample, and samples, of what is local
    requests        samples of what goes over NATS
    fleet, starts   (processes, pods in each) that start at once, and how often
    kills, chunks   pods killed one after the other, and chunks that each owns
    idle            numbers of idle pods; each is a whole number of fleets' processes
    windows, window samples of the idle load, and how many seconds each takes
    settle          seconds before the idle load is measured
    """

    turns: int
    rounds: int
    requests: int
    fleet: tuple[int, int]
    starts: int
    kills: int
    chunks: int
    idle: tuple[int, ...]
    windows: int
    window: float
    settle: float


FULL = Scale(
    turns=10_000,
    rounds=60,
    requests=300,
    fleet=(4, 50),
    starts=3,
    kills=7,
    chunks=1000,
    idle=(0, 10, 200),
    windows=6,
    window=2.5,
    settle=7.0,
)
QUICK = Scale(
    turns=2000,
    rounds=15,
    requests=50,
    fleet=(2, 10),
    starts=1,
    kills=1,
    chunks=1000,
    idle=(0, 10),
    windows=2,
    window=1.0,
    settle=1.0,
)
TINY = Scale(
    turns=10,
    rounds=2,
    requests=2,
    fleet=(1, 2),
    starts=1,
    kills=1,
    chunks=20,
    idle=(1,),
    windows=1,
    window=0.2,
    settle=0.0,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """The servers, and how much to measure on them."""

    stack: Stack
    scale: Scale

    def domain(self) -> Domain:
        """A domain that nobody else uses; no agent runs in it yet."""
        name = f"bench{uuid4().hex[:8]}"
        return Domain(self.stack.mongo_url, self.stack.nats_url, name, name)


@dataclass(frozen=True, slots=True)
class Served:
    """A domain whose agent leads. `asking` hears no events: nothing but the answers costs it time."""

    domain: Domain
    agent: Process
    asking: Requester


@asynccontextmanager
async def served(setting: Setting) -> AsyncIterator[Served]:
    """A domain with an agent as a process of its own: it shares no event loop with what measures it."""
    domain = setting.domain()
    agent = Process(setting.stack.scratch, "agent", RUN_AGENT, domain.environment)
    client = await nats.connect(domain.nats_url)
    try:
        await agent.start()
        asking = Requester(client, Subjects(domain.prefix))
        await _leads(asking, agent)
        yield Served(domain, agent, asking)
    finally:
        await client.close()
        await agent.stop()


async def _leads(asking: Requester, agent: Process) -> None:
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                await asking.ask(asking.subjects.pools, m.Empty(), m.Pools, timeout=TRY_SECONDS)
            except (NoRespondersError, NatsTimeout):
                if agent.returncode is not None:
                    raise RuntimeError(f"the agent ended:\n{agent.log_tail()}") from None
                await asyncio.sleep(0.05)
            else:
                return


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
