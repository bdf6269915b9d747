"""A pod's life with the real agent: stock, silence, restart of the agent, loss of the session."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from drsm_agent.demo.contexts import Contexts
from drsm_agent.service import running
from drsm_sdk import AgentUnavailable, Drsm, NotAllocated, NotOwner, Pod, Pool, PoolExhausted
from drsm_sdk.changes import Gained, Scanned
from drsm_sdk.wire import messages as m
from tests.acceptance.test_original_list import demux_of, event, pod, pod_process
from tests.harness import POOL, SEEN_SECONDS, Domain, eventually, requester, within
from tests.sdk.fake_agent import SkippingClock


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
        assert await one.allocate(timeout=SEEN_SECONDS)


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


def drsm_of(domain: Domain, name: str, **options: Any) -> Drsm:
    pod = Pod(name, "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, **options)


async def take_all(pool: Pool, ids: list[int]) -> None:
    while True:
        ids.append(await pool.allocate(timeout=SEEN_SECONDS))


async def test_allocation_goes_on_from_stock_while_the_agent_is_away_and_owners_stay_known(
    domain: Domain,
) -> None:
    """G6: no agent for a while; ids are issued, routed, and nobody is lost when it is back in time."""
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent():
            drsm = drsm_of(domain, "amf-1")
            await drsm.__aenter__()
            pool = await drsm.join(POOL)
            demux = demux_of(domain)
            await demux.__aenter__()
            incarnation = drsm.incarnation
        try:
            ids = [pool.allocate_nowait() for _ in range(500)]
            await eventually(lambda: all(demux.owner(id_) for id_ in ids))
            assert {owner.name for id_ in ids if (owner := demux.owner(id_))} == {"amf-1"}
            async with domain.agent():
                await asking.seen(lambda: len(asking.of(m.Reset)) >= 2)
                ids += [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(2000)]
                assert len(ids) == len(set(ids))
                assert drsm.incarnation == incarnation
                await eventually(lambda: demux.synced and all(demux.owner(id_) for id_ in ids))
        finally:
            await demux.__aexit__(None, None, None)
            await drsm.__aexit__(None, None, None)


async def test_without_renewals_a_pod_becomes_suspect_and_then_stops_issuing(domain: Domain) -> None:
    """Suspect after `L`, which stops nothing; after `A` nothing is issued any more. (The pod's clock leaps,
    so that it cannot be both at once where the test stands still.)"""
    clock = SkippingClock()
    async with domain.agent(liveness_ttl=3.0, allocation_ttl=300.0) as agent:
        async with drsm_of(domain, "amf-1", clock=clock) as drsm:
            pool = await drsm.join(POOL)
            await eventually(lambda: drsm.state == "live")
            assert agent.task is not None
            agent.task.cancel()  # the agent is gone without a word to the pod
            await asyncio.wait([agent.task])
            assert pool.allocate_nowait()
            clock.skipped += 3.0
            await eventually(lambda: drsm.state == "suspect")
            assert pool.allocate_nowait()
            clock.skipped += 297.0
            await eventually(lambda: drsm.state == "lapsed")
            with pytest.raises(AgentUnavailable):
                pool.allocate_nowait()


async def test_a_claimed_chunk_is_held_then_scanned_then_used(domain: Domain, tmp_path: Path) -> None:
    """Nothing is issued from it before the hold; what the scan reports stays issued, the rest is free."""
    short = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "bits": 11, "usage_lag_ms": 0}]}
    contexts = Contexts(tmp_path / "contexts.sqlite")
    asked: list[float] = []

    def in_use(first: int, last: int) -> list[int]:
        asked.append(time.time())
        return contexts.in_use(first, last)

    async with domain.served(**short) as asking, demux_of(domain) as demux:
        async with pod_process(domain, "amf-1", tmp_path) as victim:
            await victim.ask("allocate 700", "allocated")
            used = contexts.of("amf-1")
            async with drsm_of(domain, "amf-2") as drsm:
                pool = await drsm.join(POOL, in_use=in_use)
                changes = pool.changes()
                victim.kill()
                while not (gained := await event(changes, Gained)).marked:
                    pass
                assert gained.hold >= 3.5
                found = 0
                while found < 700:
                    found += (await event(changes, Scanned)).in_use
                assert found == 700
                claimed = await asking.seen(
                    lambda: [h.at for h, e in asking.events if type(e) is m.ChunkClaimed]
                )
                assert min(asked) - min(claimed) / 1000 >= 3.4  # `at` is from before the pod heard of it
                fresh = [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(2000 - 1 - 700)]
                assert not set(fresh) & set(used)
                assert {owner.name for id_ in used if (owner := demux.owner(id_))} == {"amf-2"}
                pool.release(used[0])
