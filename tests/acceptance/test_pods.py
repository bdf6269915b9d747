"""A pod's life with the real agent: stock, silence, restart of the agent, loss of the session."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from drsm_agent.demo.contexts import Contexts
from drsm_agent.service import running
from drsm_sdk import AgentUnavailable, Demux, Drsm, NotAllocated, NotOwner, Pod, Pool, PoolExhausted
from drsm_sdk.changes import Gained, Scanned
from tests.acceptance.test_original_list import demux_of, event, pod, pod_process
from tests.harness import POOL, SEEN_SECONDS, Domain, eventually, requester, within


async def test_a_double_release_is_an_error_and_a_foreign_id_is_not_owned(domain: Domain) -> None:
    """What is in use is known; nothing changes by a wrong release."""
    async with domain.agent(), pod(domain, "amf-1") as one, pod(domain, "amf-2") as two:
        id_ = await one.allocate()
        with pytest.raises(NotOwner):
            two.release(id_)
        one.release(id_)
        with pytest.raises(NotAllocated):
            one.release(id_)
        with pytest.raises((NotOwner, NotAllocated)):
            one.release(0)


async def test_a_released_id_is_issued_again_last(domain: Domain) -> None:
    """FIFO: all others of the chunk come before it."""
    pools = [{"name": POOL, "bits": 10, "block_bits": 5, "slots": 30}]
    async with domain.agent(pools=pools), pod(domain, "amf-1") as pool:
        first = await pool.allocate()
        pool.release(first)
        issued = [await pool.allocate() for _ in range(29)]
        assert first not in issued[:28]


async def test_joining_twice_at_once_gives_one_pool_that_is_ready(domain: Domain) -> None:
    """Nobody gets a pool that another call is still building up, or may yet give up."""
    async with domain.agent(), drsm_of(domain, "amf-1") as drsm:
        one, two = await asyncio.gather(drsm.join(POOL), drsm.join(POOL))
        assert one is two
        assert one.allocate_nowait()


async def test_a_join_that_was_given_up_goes_on_and_is_adopted_by_the_next(domain: Domain) -> None:
    """The agent may have heard it and counts on the pod; what it gives must not lie in a black hole."""
    contexts: list[tuple[int, int]] = []

    def in_use(first: int, last: int) -> list[int]:
        contexts.append((first, last))
        return []

    short = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "usage_lag_ms": 0}]}
    async with domain.agent(**short), drsm_of(domain, "amf-1") as drsm, pod(domain, "amf-2") as other:
        with pytest.raises(AgentUnavailable):
            await drsm.join(POOL, in_use, timeout=0.0)
        await eventually(lambda: "amf-1" in {owner.name for owner in other.pods()})
        async with drsm_of(domain, "amf-3") as leaving:
            left = await (await leaving.join(POOL)).allocate()
        await eventually(lambda: (owner := other.owner(left)) and owner.name in {"amf-1", "amf-2"})
        pool = await drsm.join(POOL, in_use)
        assert pool.allocate_nowait()
        await eventually(lambda: contexts or ((owner := other.owner(left)) and owner.name == "amf-2"))


async def test_stock_is_kept_ahead_so_that_a_burst_of_a_chunk_never_waits(domain: Domain) -> None:
    """At least one chunk ahead: as many ids as a chunk has can be taken without any wait."""
    async with domain.agent(), pod(domain, "amf-1") as pool:
        await pool.allocate()
        await eventually(lambda: pool.stats.free >= 1000)
        assert len({pool.allocate_nowait() for _ in range(1000)}) == 1000


async def test_exhaustion_is_an_error_at_once_and_release_makes_room(domain: Domain) -> None:
    """Two pods share a pool of 127 ids: each is issued once, then both are told."""
    pools = [{"name": POOL, "bits": 10, "block_bits": 5, "slots": 4}]
    async with domain.agent(pools=pools), pod(domain, "amf-1") as one, pod(domain, "amf-2") as two:
        ids: list[int] = []
        for pool in (one, two):
            with pytest.raises(PoolExhausted):
                await take_all(pool, ids)
        assert len(ids) == len(set(ids)) == 32 * 4 - 1
        one.release(next(id_ for id_ in ids if one.owner(id_) == one.owner(ids[0])))
        assert await one.allocate()


async def test_an_exhausted_pool_is_widened_while_everything_runs(domain: Domain) -> None:
    """By an agent with a higher revision that takes over: every id there was is issued and stays so, then
    those above are."""
    narrow = {"name": POOL, "bits": 12, "block_bits": 8, "slots": 256}
    wide = narrow | {"bits": 13, "revision": 2}
    async with AsyncExitStack() as stack:
        async with domain.agent(pools=[narrow]):
            demux = await stack.enter_async_context(demux_of(domain))
            pool = await stack.enter_async_context(pod(domain, "amf-1"))
            ids: list[int] = []
            with pytest.raises(PoolExhausted):
                await take_all(pool, ids)
            assert sorted(ids) == list(range(1, 2**12))
            widened = await stack.enter_async_context(running(domain.settings(pools=[wide])))
        await within(widened.leader.leading.wait())
        await eventually(lambda: pool.definition.bits == 13)
        async with asyncio.timeout(SEEN_SECONDS):
            while (
                len(ids) < 2**13 - 1
            ):  # a chunk granted before the definition came is taken up a little later
                with pytest.raises(PoolExhausted):
                    await take_all(pool, ids)
        assert sorted(ids) == list(range(1, 2**13))
        assert all(pool.valid(id_) for id_ in ids)
        await eventually(lambda: {demux.owner(id_) for id_ in ids} == {pool.owner(1)})


def drsm_of(domain: Domain, name: str) -> Drsm:
    return Drsm.connect(domain.nats_url, Pod(name, "10.0.0.1", "nf"), prefix=domain.prefix)


async def take_all(pool: Pool, ids: list[int]) -> None:
    while True:
        ids.append(await pool.allocate(timeout=5))


async def test_allocation_goes_on_from_stock_while_the_agent_is_away_and_owners_stay_known(
    domain: Domain,
) -> None:
    """G6: no agent for a while; ids are issued, routed, and nobody is lost when it is back in time."""
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent():
            drsm = Drsm.connect(domain.nats_url, Pod("amf-1", "10.0.0.1", "nf"), prefix=domain.prefix)
            await drsm.__aenter__()
            pool = await drsm.join(POOL)
            demux = Demux.connect(domain.nats_url, POOL, prefix=domain.prefix)
            await demux.__aenter__()
            incarnation = drsm.incarnation
        try:
            ids = [pool.allocate_nowait() for _ in range(500)]
            assert {owner.name for id_ in ids if (owner := demux.owner(id_))} == {"amf-1"}
            async with domain.agent():
                resets = [r for r in asking.raw if r.subject.endswith("reset")]
                assert len(resets) == 2
                ids += [await pool.allocate(timeout=10) for _ in range(2000)]
                assert len(ids) == len(set(ids))
                assert drsm.incarnation == incarnation
                await eventually(lambda: demux.synced and all(demux.owner(id_) for id_ in ids))
        finally:
            await demux.__aexit__(None, None, None)
            await drsm.__aexit__(None, None, None)


async def test_without_renewals_a_pod_becomes_suspect_and_then_stops_issuing(domain: Domain) -> None:
    """Suspect after `L`, which stops nothing; after `A` nothing is issued any more."""
    short = {"allocation_ttl": 4.0, "liveness_ttl": 2.5, "pools": [{"name": POOL, "usage_lag_ms": 0}]}
    identity = Pod("amf-1", "10.0.0.1", "nf")
    async with domain.agent(**short) as agent:
        async with Drsm.connect(domain.nats_url, identity, prefix=domain.prefix) as drsm:
            pool = await drsm.join(POOL)
            assert drsm.state == "live"
            assert agent.task is not None
            agent.task.cancel()  # the agent is gone without a word to the pod
            await asyncio.wait([agent.task])
            await eventually(lambda: drsm.state == "suspect")
            assert pool.allocate_nowait()
            await eventually(lambda: drsm.state == "lapsed")
            with pytest.raises(AgentUnavailable):
                pool.allocate_nowait()


async def test_a_claimed_chunk_is_held_then_scanned_then_used(domain: Domain, tmp_path: Path) -> None:
    """Nothing is issued from it before the hold; what the scan reports stays issued, the rest is free."""
    short = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "bits": 11, "usage_lag_ms": 0}]}
    contexts = Contexts(tmp_path / "contexts.sqlite")
    identity = Pod("amf-2", "10.0.0.2", "nf")
    async with domain.agent(**short), demux_of(domain) as demux:
        async with pod_process(domain, "amf-1", tmp_path) as victim:
            await victim.ask("allocate 700", "allocated")
            used = contexts.of("amf-1")
            async with Drsm.connect(domain.nats_url, identity, prefix=domain.prefix) as drsm:
                pool = await drsm.join(POOL, in_use=contexts.in_use, timeout=5)
                changes = pool.changes()
                victim.kill()
                gained = await event(changes, Gained)
                held_at = asyncio.get_running_loop().time()
                assert gained.marked
                assert gained.hold >= 3.5
                in_use = 0
                while in_use < 700:
                    in_use += (await event(changes, Scanned)).in_use
                assert asyncio.get_running_loop().time() - held_at >= 3.4
                assert in_use == 700
                fresh = [await pool.allocate(timeout=5) for _ in range(2000 - 1 - 700)]
                assert not set(fresh) & set(used)
                assert {owner.name for id_ in used if (owner := demux.owner(id_))} == {"amf-2"}
                pool.release(used[0])
