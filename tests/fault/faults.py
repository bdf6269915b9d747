"""The faults, each a coroutine that breaks a world and mends it again, within seconds.

Nothing can be awaited of what stands still, so how long a fault lasts is slept.
"""

import asyncio
import signal
from collections.abc import Callable, Iterable

from drsm_agent.embedded import NatsServer, Process
from tests.fault.link import Link
from tests.fault.world import CUTTABLE, A, Fault, L, Strike, World

SHORT = 3.0
"""Longer than `T` and `L`: what is cut off is taken over, and could be declared dead."""
LONG = 6.0
"""Twice `L`, and longer than a driver's or a request's time-out of 5 s."""
HALF_OPEN = 8.0
"""Longer than nats-py takes to notice (2 pings of 2 s, and a half)."""
LATE = 0.2
LAME_DUCK = 5.0
assert HALF_OPEN < A / 2
assert L < SHORT

KILLED, TERMINATED = -signal.SIGKILL, 0
"""How an agent ends that was sent SIGKILL, and one that was sent SIGTERM."""


async def _paused(processes: Iterable[Process], seconds: float) -> None:
    stopped = list(processes)
    for process in stopped:
        process.pause()
    try:
        await asyncio.sleep(seconds)
    finally:
        for process in stopped:
            process.resume()


async def _down(process: Process, seconds: float) -> None:
    await process.kill()
    await asyncio.sleep(seconds)
    await process.start()


# --- MongoDB --------------------------------------------------------------------------------------


async def mongo_primary_killed(w: World) -> None:
    await _down(await w.primary(), SHORT)


async def mongo_secondary_killed(w: World) -> None:
    await _down(await w.secondary(), SHORT)


async def mongo_primary_steps_down(w: World) -> None:
    await w.client.admin.command("replSetStepDown", 5, secondaryCatchUpPeriodSecs=2)


async def mongo_primary_paused(w: World) -> None:
    await _paused([await w.primary()], LONG)


async def mongo_majority_gone(w: World) -> None:
    primary = await w.primary()
    await _paused([member for member in w.mongo.members if member is not primary], LONG)


async def mongo_all_paused(w: World) -> None:
    await _paused(w.mongo.members, HALF_OPEN)


async def mongo_all_killed(w: World) -> None:
    await asyncio.gather(*[member.kill() for member in w.mongo.members])
    await asyncio.sleep(SHORT)
    await asyncio.gather(*[member.start() for member in w.mongo.members])


# --- NATS -----------------------------------------------------------------------------------------


async def nats_all_killed(w: World) -> None:
    await asyncio.gather(*[_down(server, 1.0) for server in w.nats])


async def nats_all_paused(w: World) -> None:
    await _paused(w.nats, HALF_OPEN)


async def nats_one_of_three_killed(w: World) -> None:
    await _down(w.busiest_nats(), SHORT)


async def nats_one_of_three_paused(w: World) -> None:
    """Its pods find out by their pings, which takes longer than `L`: some may be declared dead."""
    server = w.busiest_nats()
    w.record.may_lose = w.pods_on(server)
    assert w.record.may_lose
    await _paused([server], HALF_OPEN)


async def nats_lame_duck(w: World) -> None:
    server: NatsServer = w.nats[1]
    server._signal(signal.SIGUSR2)
    await asyncio.sleep(LAME_DUCK)
    await server.restart()


# --- agents ---------------------------------------------------------------------------------------


async def leader_killed(w: World) -> None:
    (await w.leader()).process._signal(signal.SIGKILL)


async def leader_terminated(w: World) -> None:
    (await w.leader()).process._signal(signal.SIGTERM)


async def leader_paused(w: World) -> None:
    await _paused([(await w.leader()).process], LONG)


async def standby_paused(w: World) -> None:
    leader = await w.leader()
    await _paused([agent.process for agent in w.agents if agent is not leader], LONG)


async def all_agents_killed(w: World) -> None:
    for agent in w.agents:
        agent.kept_down = True
        agent.process._signal(signal.SIGKILL)
    await asyncio.sleep(SHORT)
    for agent in w.agents:
        agent.kept_down = False


async def rolling_update(w: World) -> None:
    """As a Deployment does it: the next one goes when the last one's successor is ready. When one goes, pods
    have nothing in stock, but those that had very much."""
    for agent in w.agents:
        lives = len(agent.exits)
        w.record.bursts += 1
        agent.process._signal(signal.SIGTERM)
        while len(agent.exits) == lives or await agent.ready():
            await asyncio.sleep(0.05)


# --- partitions -----------------------------------------------------------------------------------

MONGO, NATS, BOTH = "mongo", "nats", "both"


def leader_cut(what: str, do: Callable[[Link], None]) -> Strike:
    """The leader's links to MongoDB, NATS or both."""

    async def strike(w: World) -> None:
        agent = await w.leader()
        links = {MONGO: agent.mongo, NATS: agent.nats, BOTH: agent.links}[what]
        await _broken(links, do, LONG)

    return strike


async def pods_cut(w: World) -> None:
    await _broken(w.pod_links, Link.cut, LONG)


async def pods_reset(w: World) -> None:
    """Shorter than `L`: nobody is declared dead."""
    await _broken(w.pod_links, Link.reset, 0.5)


async def _broken(links: list[Link], do: Callable[[Link], None], seconds: float) -> None:
    for link in links:
        do(link)
    try:
        await asyncio.sleep(seconds)
    finally:
        for link in links:
            link.heal()


def requests_lost(link: Link) -> None:
    link.cut(back=False)


def answers_lost(link: Link) -> None:
    link.cut(there=False)


def late(link: Link) -> None:
    link.delay = LATE


FAULTS: dict[str, Fault] = {
    "MongoDB primary killed": Fault(mongo_primary_killed),
    "MongoDB primary steps down": Fault(mongo_primary_steps_down),
    "MongoDB primary paused": Fault(mongo_primary_paused, may_starve=True),
    "MongoDB secondary killed": Fault(mongo_secondary_killed),
    "MongoDB majority paused": Fault(mongo_majority_gone, may_starve=True),
    "MongoDB all paused": Fault(mongo_all_paused, may_starve=True),
    "MongoDB all killed": Fault(mongo_all_killed, may_starve=True),
    "NATS all killed": Fault(nats_all_killed),
    "NATS all paused (half-open)": Fault(nats_all_paused, may_starve=True),
    "NATS one of three killed": Fault(nats_one_of_three_killed),
    "NATS one of three paused": Fault(nats_one_of_three_paused, may_starve=True),
    "NATS lame duck": Fault(nats_lame_duck),
    "leader killed": Fault(leader_killed, exits=(KILLED,)),
    "leader terminated": Fault(leader_terminated, exits=(TERMINATED,)),
    "leader paused and back": Fault(leader_paused),
    "standby paused and back": Fault(standby_paused),
    "all agents killed": Fault(all_agents_killed, exits=(KILLED, KILLED), may_starve=True),
    "rolling update": Fault(rolling_update, exits=(TERMINATED, TERMINATED)),
    "leader cut from MongoDB": Fault(leader_cut(MONGO, Link.cut)),
    "leader cut from NATS": Fault(leader_cut(NATS, Link.cut)),
    "leader cut from both": Fault(leader_cut(BOTH, Link.cut)),
    "leader does not hear MongoDB": Fault(leader_cut(MONGO, answers_lost)),
    "leader is not heard by MongoDB": Fault(leader_cut(MONGO, requests_lost)),
    "leader does not hear NATS": Fault(leader_cut(NATS, answers_lost)),
    "leader is not heard by NATS": Fault(leader_cut(NATS, requests_lost)),
    "leader far from both (0.2 s)": Fault(leader_cut(BOTH, late)),
    "leader's connections to MongoDB reset": Fault(leader_cut(MONGO, Link.reset)),
    "leader's connections to NATS reset": Fault(leader_cut(NATS, Link.reset)),
    "two pods cut from NATS": Fault(pods_cut, may_lose=frozenset(f"amf-{i}" for i in range(CUTTABLE))),
    "two pods' connections reset": Fault(pods_reset),
}
