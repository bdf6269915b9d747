"""The end of a restore, and what stays of it, on virtual time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner, chunk_key
from drsm_agent.restored import announce_restored
from drsm_sdk import Drsm
from tests.simulation.database import View
from tests.simulation.loop import run
from tests.simulation.standing import Standing

POOLS = [{"name": name, "bits": 18, "usage_lag_ms": 1000} for name in ("one", "two")]
LEASES = {"liveness_ttl": 2.5, "allocation_ttl": 8.0, "leader_ttl": 1.0}
WAIT = 9.0
"""`A + W`, in seconds."""
LATER = 5.0
"""Seconds in which whoever may do something has done it."""
LEFT_OVER = 50
"""A chunk that the restored database gives to a pod which does not hold it."""


@asynccontextmanager
async def standing() -> AsyncIterator[Standing]:
    world = Standing(1, POOLS, **LEASES)
    try:
        agent = await world.start("before")
        await agent.leader.leading.wait()
        yield world
    finally:
        await world.end()


async def restore(world: Standing, drsm: Drsm) -> None:
    """The agents are stopped, and what there is was restored: a chunk that a pod gave back is its own again.
    One agent starts."""
    await world.stop("before")
    owner = Owner(drsm.pod.name, drsm.pod.ip, drsm.pod.instance, incarnation(drsm))
    await world.database.apply([writes.allocate("one", LEFT_OVER, owner, "0" * 16, "r")])
    await announce_restored(View(world.database, world.node), LEASES["leader_ttl"], 8000)
    await (await world.start("after")).leader.leading.wait()


def incarnation(drsm: Drsm) -> int:
    assert drsm.incarnation is not None
    return drsm.incarnation


def chunks(world: Standing, pool: str) -> dict[int, Any]:
    """Of each chunk in the database who owns it, under which grant, and whether it is marked."""
    found = [document for document in world.database.documents(pool) if document["type"] == "chunk"]
    return {int(document["_id"].removeprefix("chunkid-")): document["drsm"] for document in found}


def open_document(world: Standing) -> bool:
    document = world.database.document(writes.SETTINGS, "restored")
    assert document is not None
    return bool(document["open"])


def test_while_the_end_of_a_restore_is_written_nothing_is_granted() -> None:
    """Else a pod that has reported gets a chunk, and loses it again as one that it does not hold."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod:
            await pod.join("one")
            await restore(world, pod)
            bar = world.bar("one", chunk_key(LEFT_OVER))
            joining = asyncio.ensure_future(pod.join("two"))
            await bar.reached.wait()
            await asyncio.sleep(LATER)
            assert chunks(world, "two") == {}
            bar.open.set()
            pool = await joining
            id_ = await pool.allocate(timeout=WAIT)
            assert not open_document(world)
            assert [drsm["marked"] for drsm in chunks(world, "two").values()] == [False]
            assert pool.valid(id_)

    run(live())


def test_while_the_end_of_a_restore_is_written_nothing_is_claimed() -> None:
    """Else who claims a chunk loses it again as one that it does not hold."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod, world.pod("gone") as gone:
            for drsm in (pod, gone):
                await drsm.join("two")
                await drsm.join("one")
            await restore(world, pod)
            bar = world.bar("one", chunk_key(LEFT_OVER))
            await bar.reached.wait()
            world.cut_off("gone")
            before = chunks(world, "two")
            await asyncio.sleep(LATER)
            assert chunks(world, "two") == before
            bar.open.set()
            await asyncio.sleep(LATER)
            assert not open_document(world)
            assert {drsm["pod"] for drsm in chunks(world, "two").values()} == {"pod"}

    run(live())
