"""How long nothing is granted after documents were dropped under an agent, on virtual time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from drsm_agent.core import writes
from drsm_agent.service import Agent
from tests.simulation.loop import run
from tests.simulation.standing import Standing

POOLS = [{"name": name, "bits": 18, "usage_lag_ms": 1000} for name in ("one", "two")]
LEASES = {"liveness_ttl": 2.5, "allocation_ttl": 8.0, "leader_ttl": 1.0}
WAIT = 9.0
"""`A + W`, in seconds."""
SOON = 2.0
"""Seconds for a table to be read anew, and for a chunk to be granted that nothing stands in the way of."""
OUTAGE = 4.0
"""Seconds without MongoDB, more than a lead lasts."""


@asynccontextmanager
async def dropped() -> AsyncIterator[tuple[Standing, Agent]]:
    """An agent that leads again after a pool's collection was dropped."""
    world = Standing(1, POOLS, **LEASES)
    try:
        agent = await world.start("agent")
        await agent.leader.leading.wait()
        world.database.drop("two")
        await asyncio.sleep(SOON)
        assert agent.leader.leading.is_set()  # a table read anew does not take the lead away
        yield world, agent
    finally:
        await world.end()


async def lead_again(world: Standing, agent: Agent) -> None:
    """The lead is lost and won again; the table goes on."""
    world.database.elect(OUTAGE)
    await asyncio.sleep(OUTAGE - SOON)
    assert not agent.leader.leading.is_set()
    await agent.leader.leading.wait()


async def granted_after(world: Standing, pod: str) -> float:
    """Seconds until a new pod gets a chunk."""
    began = world.loop.time()
    async with world.pod(pod) as drsm:
        await drsm.join("one")
        return world.loop.time() - began


def test_once_a_lead_has_waited_out_a_loss_later_ones_of_its_agent_grant_at_once() -> None:
    async def live() -> None:
        async with dropped() as (world, agent):
            assert WAIT - SOON <= await granted_after(world, "first") <= WAIT + SOON
            await lead_again(world, agent)
            assert await granted_after(world, "second") < SOON

    run(live())


def test_a_lead_that_ends_before_it_has_waited_out_a_loss_leaves_that_to_the_next() -> None:
    async def live() -> None:
        async with dropped() as (world, agent):
            await lead_again(world, agent)
            assert await granted_after(world, "pod") >= WAIT - SOON

    run(live())


def test_a_table_read_anew_before_a_loss_was_waited_out_has_it_waited_out_anew() -> None:
    async def live() -> None:
        async with dropped() as (world, _):
            await asyncio.sleep(WAIT / 2)
            await world.database.apply([writes.stand_by()])
            world.database.forget()
            await asyncio.sleep(SOON)
            assert WAIT - 2 * SOON <= await granted_after(world, "pod") <= WAIT

    run(live())


def test_another_loss_is_waited_out_as_well() -> None:
    async def live() -> None:
        async with dropped() as (world, _):
            await granted_after(world, "first")
            world.database.drop("two")
            await asyncio.sleep(SOON)
            assert await granted_after(world, "second") >= WAIT - 2 * SOON

    run(live())


def test_a_loss_that_comes_as_the_one_before_was_just_waited_out_is_not_forgotten_with_it() -> None:
    async def live() -> None:
        async with dropped() as (world, agent):
            before = agent.feed.current
            assert before is not None
            world.database.drop("two")
            await before.lost.wait()
            agent.feed.waited_out(before)
            assert (await agent.feed.loaded()).after_loss

    run(live())
