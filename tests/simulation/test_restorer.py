"""The end of a restore, and what stays of it, on virtual time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner, chunk_key
from drsm_agent.restored import announce_restored
from drsm_sdk import AgentUnavailable, Drsm, DrsmError, Pool, ambient
from drsm_sdk.changes import Scanned
from drsm_sdk.rpc import Rpc
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.database import View
from tests.simulation.loop import run
from tests.simulation.network import PodTransport
from tests.simulation.standing import Standing

POOLS = [{"name": name, "bits": 18, "usage_lag_ms": 1000} for name in ("one", "two")]
LEASES = {"liveness_ttl": 2.5, "allocation_ttl": 8.0, "leader_ttl": 1.0}
FEWER = {"pools": POOLS[:1], "settings_revision": 2}
WAIT = 9.0
"""`A + W`, in seconds."""
LONG_LAG = 6.0
"""A `W` that leaves time after `A`."""
LATER = 5.0
"""Seconds in which whoever may do something has done it."""
LEFT_OVER = 50
"""A chunk that the restored database gives to a pod which does not hold it."""


@asynccontextmanager
async def standing(pools: Sequence[dict[str, Any]] = POOLS) -> AsyncIterator[Standing]:
    world = Standing(1, pools, **LEASES)
    try:
        agent = await world.start("before")
        await agent.leader.leading.wait()
        yield world
    finally:
        await world.end()


async def restore(world: Standing, drsm: Drsm, **other: Any) -> None:
    """The agents are stopped, and what there is was restored: a chunk that a pod gave back is its own again.
    One agent starts, with `other` settings."""
    await world.stop("before")
    owner = Owner(drsm.pod.name, drsm.pod.ip, drsm.pod.instance, incarnation(drsm))
    await world.database.apply([writes.allocate("one", LEFT_OVER, owner, "0" * 16, "r")])
    await announce_restored(View(world.database, world.node), LEASES["leader_ttl"], 8000)
    await (await world.start("after", **other)).leader.leading.wait()


def incarnation(drsm: Drsm) -> int:
    assert drsm.incarnation is not None
    return drsm.incarnation


async def issued_after_a_claim(world: Standing, pool: Pool, n: int) -> set[int]:
    """The pod `former` is cut off, `pool`'s pod claims and scans its chunk, and issues, five ids from it."""
    told = pool.changes()
    world.cut_off("former")
    while not isinstance(await anext(told), Scanned):
        pass
    issued = set[int]()
    while sum(id_ >> 10 == n for id_ in issued) < 5:
        id_ = await pool.allocate(timeout=LATER)
        assert isinstance(id_, int)
        issued.add(id_)
    return issued


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


def test_what_a_restore_takes_from_a_pod_is_held_with_the_margin_for_a_fast_clock() -> None:
    """As what is claimed."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod:
            await pod.join("one")
            await restore(world, pod)
            await asyncio.sleep(WAIT + LATER)
            drsm = chunks(world, "one")[LEFT_OVER]
            assert (drsm["marked"], drsm["hold_ms"]) == (True, 8000 + 1005)

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


def test_until_the_end_of_a_restore_nothing_is_issued_that_a_pod_may_yet_report() -> None:
    """The restored database gives a chunk to the pod from which another has claimed it in the lost time. That
    one is cut off until all leases have run out, but not until the end."""

    async def live() -> None:
        pools = [{"name": "one", "bits": 18, "slots": 10, "usage_lag_ms": LONG_LAG * 1000}]
        async with standing(pools) as world, world.pod("former") as former:
            old = await former.join("one")
            n = await old.allocate() >> 10
            backup = world.database.back_up()
            async with world.pod("claimer") as claimer:
                new = await claimer.join("one", in_use=lambda *_: [])
                theirs = await issued_after_a_claim(world, new, n)
                await world.stop("before")
                world.database.restore(backup)
                world.cut_off("claimer")
                world.reach("former")
                await announce_restored(View(world.database, world.node), LEASES["leader_ttl"], 8000)
                await (await world.start("after")).leader.leading.wait()
                back_at = world.loop.time() + LEASES["allocation_ttl"] + LONG_LAG - 1
                ours = set[int]()
                while len(ours) < 100:
                    await asyncio.sleep(0.1)
                    with contextlib.suppress(DrsmError):
                        ours.add(old.allocate_nowait())
                    if world.loop.time() > back_at:
                        world.reach("claimer")
                assert not open_document(world)
                assert not ours & theirs

    run(live())


def test_a_pool_taken_off_the_list_after_a_restore_keeps_no_pod_from_issuing_of_others() -> None:
    """No agent tells what a pod holds of such a pool, so pod and agent cannot agree about it any more."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod:
            one = await pod.join("one")
            await pod.join("two")
            await restore(world, pod)
            await asyncio.sleep(WAIT + LATER)
            assert not open_document(world)
            await world.stop("after")
            await (await world.start("fewer", **FEWER)).leader.leading.wait()
            await asyncio.sleep(2 * LEASES["allocation_ttl"])
            assert pod.state == "live"
            assert one.valid(one.allocate_nowait())

    run(live())


def test_a_pool_taken_off_the_list_together_with_a_restore_keeps_its_pods_from_issuing() -> None:
    """Nobody has put its chunks back: another pod may hold the same ones, claimed in the lost time."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod, world.pod("other") as other:
            await pod.join("one")
            two = await pod.join("two")
            await other.join("one")
            await restore(world, pod, **FEWER)
            await asyncio.sleep(WAIT + LATER)
            assert not open_document(world)
            assert (pod.state, other.state) == ("lapsed", "live")
            with pytest.raises(AgentUnavailable):
                two.allocate_nowait()

    run(live())


def test_what_a_pod_holds_of_a_pool_on_the_list_counts_whether_it_has_joined_that_or_not() -> None:
    """The restored database may not know that it had."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod:
            pool = await pod.join("one")
            await restore(world, pod)
            await asyncio.sleep(WAIT + LATER)
            held = {"one": pool.held()}
            assert await lease(world, pod, held) > 0
            assert await lease(world, pod, {**held, "unknown": (1, 1)}) > 0
            assert await lease(world, pod, {**held, "two": (1, 1)}) == 0
            assert await lease(world, pod, {}) == 0

    run(live())


def test_a_pool_taken_off_the_list_before_the_backup_keeps_no_pod_from_issuing_of_others() -> None:
    """Whoever holds some of it reports it all the same."""

    async def live() -> None:
        async with standing() as world, world.pod("pod") as pod:
            one = await pod.join("one")
            await pod.join("two")
            await world.stop("before")
            await (await world.start("before", **FEWER)).leader.leading.wait()
            await restore(world, pod, **FEWER)
            await asyncio.sleep(WAIT + LATER)
            assert not open_document(world)
            assert pod.state == "live"
            assert one.valid(one.allocate_nowait())

    run(live())


async def lease(world: Standing, drsm: Drsm, held: dict[str, tuple[int, int]]) -> int:
    """The allocation lease that a renewal gets which says so of its chunks."""
    transport = PodTransport(world.network, world.node)
    await transport.connect(LATER)
    request = wire.Renew(drsm.pod.name, incarnation(drsm), held, {})
    asking = Rpc(transport, world.loop.time, ambient.Chance(world.chance))
    answer = await asking.once(Subjects("drsm").session("renew"), request, wire.Renewed, LATER)
    return answer.body.allocation_ms


def test_a_pool_that_comes_back_on_the_list_without_its_chunks_put_back_begins_the_restore_anew() -> None:
    """It was taken off together with the restore. Else the pod that the restored database gives a chunk to
    would issue from it at once, while the one that has claimed it in the lost time has ids of it."""

    async def live() -> None:
        pools = [{"name": name, "bits": 18, "slots": 10, "usage_lag_ms": 1000} for name in ("one", "two")]
        fewer = {"pools": pools[:1], "settings_revision": 2}
        async with standing(pools) as world, world.pod("former") as former:
            await former.join("one")
            old = await former.join("two")
            n = await old.allocate() >> 10
            backup = world.database.back_up()
            async with world.pod("claimer") as claimer:
                await claimer.join("one")
                new = await claimer.join("two", in_use=lambda *_: [])
                theirs = await issued_after_a_claim(world, new, n)
                await world.stop("before")
                world.database.restore(backup)
                world.reach("former")
                await announce_restored(View(world.database, world.node), LEASES["leader_ttl"], 8000)
                await (await world.start("fewer", **fewer)).leader.leading.wait()
                await asyncio.sleep(WAIT + LATER)
                assert not open_document(world)
                assert (former.state, claimer.state) == ("lapsed", "lapsed")
                await world.stop("fewer")
                await (await world.start("all", settings_revision=3)).leader.leading.wait()
                ours = {await old.allocate(timeout=WAIT + LATER) for _ in range(20)}
                assert not ours & theirs
                assert await new.allocate(timeout=LATER) not in ours

    run(live())


def test_a_pool_that_only_pods_know_of_counts_as_one_that_was_taken_off() -> None:
    """It was put on the list in the lost time, and the agents go by the list of the backup."""

    async def live() -> None:
        world = Standing(1, POOLS, **LEASES)
        try:
            await (await world.start("fewer", pools=POOLS[:1])).leader.leading.wait()
            backup = world.database.back_up()
            await world.stop("fewer")
            await (await world.start("before", settings_revision=2)).leader.leading.wait()
            async with world.pod("pod") as pod:
                await pod.join("one")
                two = await pod.join("two")
                theirs = {await two.allocate() for _ in range(5)}
                await world.stop("before")
                world.database.restore(backup)
                await announce_restored(View(world.database, world.node), LEASES["leader_ttl"], 8000)
                await (await world.start("after", pools=POOLS[:1])).leader.leading.wait()
                await asyncio.sleep(WAIT + LATER)
                assert not open_document(world)
                assert pod.state == "lapsed"
                await world.stop("after")
                await (await world.start("all", settings_revision=2)).leader.leading.wait()
                async with world.pod("other") as other:
                    ours = {await (await other.join("two")).allocate(timeout=WAIT) for _ in range(5)}
                    assert all(two.valid(id_) for id_ in theirs)
                    assert not ours & theirs
        finally:
            await world.end()

    run(live())
