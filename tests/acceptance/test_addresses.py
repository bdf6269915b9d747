"""Pools of addresses on real servers: what is issued and never is, routes, exhaustion, recall, growth."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest

from drsm_agent.service import running
from drsm_sdk import BadRequest, Demux, Drsm, NotAllocated, NotOwner, Pod, Pool, PoolExhausted
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import shown
from tests.harness import ONE_LEAD, SEEN_SECONDS, UNHURRIED, Domain, eventually, requester, within
from tests.integration.test_start import refused
from tests.sdk.fake_agent import SkippingClock

UE = "ue"
POOL: dict[str, Any] = {
    "name": UE,
    "kind": "ipv4",
    "ranges": ["10.45.0.0/27", "10.60.0.0/28"],
    "block_bits": 3,
    "excluded": ["10.45.0.8/29", "10.45.0.20"],
    "usage_lag_ms": 0,
}
NEVER = {
    *map(IPv4Address, ["10.45.0.0", "10.45.0.1", "10.45.0.31", "10.60.0.0", "10.60.0.1", "10.60.0.15"]),
    *IPv4Network("10.45.0.8/29"),
    IPv4Address("10.45.0.20"),
}
ISSUED = {address for text in POOL["ranges"] for address in IPv4Network(text)} - NEVER


def drsm_of(domain: Domain, name: str, **options: Any) -> Drsm:
    pod = Pod(name, "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, **options)


@asynccontextmanager
async def joined(domain: Domain, *names: str, **options: Any) -> AsyncIterator[list[Pool]]:
    async with AsyncExitStack() as stack:
        pods = [await stack.enter_async_context(drsm_of(domain, name, **options)) for name in names]
        yield [await pod.join(UE) for pod in pods]


def demux_of(domain: Domain) -> Demux:
    return Demux.connect(domain.nats_url, UE, prefix=domain.prefix, timeout=SEEN_SECONDS)


async def drain(pools: list[Pool]) -> list[Any]:
    """Take in turns until each pod is told that the pool is exhausted."""
    taken: list[Any] = []
    left = list(pools)
    for pool in itertools.cycle(pools):
        if not left:
            return taken
        if pool in left:
            try:
                taken.append(await pool.allocate(timeout=SEEN_SECONDS))
            except PoolExhausted:
                left.remove(pool)
    return taken


async def test_every_address_is_issued_once_and_none_that_never_is(domain: Domain) -> None:
    """To the last one, by three pods; then the error comes at once and says how full the pool is. What is
    released is issued again in the order of release."""
    async with domain.agent(pools=[POOL]), joined(domain, "smf-1", "smf-2", "smf-3") as pools:
        taken = await drain(pools)
        assert len(taken) == len(set(taken)) == 33
        assert set(taken) == ISSUED
        assert {type(address) for address in taken} == {IPv4Address}
        began = asyncio.get_running_loop().time()
        with pytest.raises(PoolExhausted, match=r"not one chunk of pool ue is free: 5 of 5 owned, 0 of them"):
            await pools[0].allocate(timeout=2 * SEEN_SECONDS)
        assert asyncio.get_running_loop().time() - began < SEEN_SECONDS
        mine = [address for address in taken if pools[0].valid(address)]
        for address in mine[::-1]:
            pools[0].release(address)
        again = [pools[0].allocate_nowait() for _ in mine]
        for block in {int(address) >> 3 for address in mine}:
            assert [a for a in again if int(a) >> 3 == block] == [
                a for a in mine[::-1] if int(a) >> 3 == block
            ]


async def test_an_address_is_looked_up_as_an_object_or_as_text_and_its_chunk_is_a_prefix(
    domain: Domain,
) -> None:
    async with (
        requester(domain.nats_url, domain.prefix, UE) as asking,
        domain.agent(pools=[POOL]),
        demux_of(domain) as demux,
        joined(domain, "smf-1") as (pool,),
    ):
        address = await pool.allocate()
        assert address == IPv4Address("10.45.0.2")
        await eventually(lambda: demux.owner(address))
        owner = demux.owner(address)
        assert owner is not None
        assert owner.name == "smf-1"
        assert demux.owner("10.45.0.7") == pool.owner("10.45.0.7") == pool.owner(address) == owner
        assert demux.owner("10.44.255.255") is demux.owner("10.60.0.9") is None
        for wrong in (5, "10.45.0.300", "2001:db8::1", IPv4Network("10.45.0.0/28")):
            with pytest.raises(BadRequest, match="pool ue: expected an ipv4 address"):
                demux.owner(wrong)
            with pytest.raises(BadRequest, match="pool ue: expected an ipv4 address"):
                pool.release(wrong)
        for elsewhere, error in (
            ("10.60.0.9", NotOwner),
            ("10.45.0.1", NotOwner),
            ("10.45.0.3", NotAllocated),
        ):
            with pytest.raises(error):
                pool.release(elsewhere)
        event = next(event for event in asking.of(m.ChunkAllocated) if 0 in event.chunks)
        assert demux.definition.prefixes([0, 2]) == {UE: ("10.45.0.0/29", "10.45.0.16/29")}
        assert event.prefixes == {UE: tuple(demux.definition.prefixes(event.chunks)[UE])}
        assert event.prefixes[UE][0] == "10.45.0.0/29"
        by_address, by_prefix, chunks, defined, never = [
            (await shown(domain, *words)).out
            for words in (
                ("owner", UE, "10.45.0.3"),
                ("owner", UE, "10.45.0.3/32"),
                ("chunks", UE),
                ("pools", "show", UE),
                ("owner", UE, "10.45.0.1"),
            )
        ]
        assert "smf-1" in by_address
        assert by_prefix.splitlines()[1:] == by_address.splitlines()[1:]
        assert "never: 0, reserved, excluded" in never
        assert "10.45.0.0/29" in chunks
        fields = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in defined.splitlines()}
        assert fields["ranges"] == "10.45.0.0/27, 10.60.0.0/28"
        assert fields["excluded"] == "10.45.0.8/29, 10.45.0.20"


async def test_each_ue_gets_a_prefix_of_its_own(domain: Domain) -> None:
    """IPv6: one /64 out of a /48, given back as it came; any address of it tells the owner."""
    prefixes = {"name": UE, "kind": "ipv6", "ranges": ["2001:db8:5::/48"], "prefix": 64}
    async with (
        domain.agent(pools=[prefixes | {"excluded": ["2001:db8:5:1::/64"], "usage_lag_ms": 0}]),
        demux_of(domain) as demux,
        joined(domain, "smf-1", "smf-2") as (one, two),
    ):
        mine, others = await one.allocate(), await two.allocate()
        assert mine == IPv6Network("2001:db8:5::/64")
        assert others.prefixlen == 64
        assert others.supernet(new_prefix=56) != mine.supernet(new_prefix=56)  # which is a chunk
        assert others.subnet_of(IPv6Network("2001:db8:5::/48"))
        assert await one.allocate() == IPv6Network("2001:db8:5:2::/64")
        await eventually(lambda: demux.owner(others))
        owners = [demux.owner(id_) for id_ in (mine, mine[77], str(mine[1 << 63]), others[5])]
        assert [owner and owner.name for owner in owners] == ["smf-1", "smf-1", "smf-1", "smf-2"]
        one.release(mine)
        with pytest.raises(NotAllocated):
            one.release(mine)
        assert "2001:db8:5::/56" in (await shown(domain, "chunks", UE)).out


async def test_a_released_address_is_not_issued_before_its_quarantine(domain: Domain) -> None:
    """Not even when it is the last one. The pod's clock goes on as the test says: no test takes so long."""
    small = POOL | {"ranges": ["10.45.0.0/29"], "excluded": [], "quarantine_ms": 100_000}
    clock = SkippingClock()
    async with domain.agent(pools=[small]), joined(domain, "smf-1", clock=clock) as (pool,):
        taken = await drain([pool])
        assert len(taken) == 5
        pool.release(taken[2])
        for _ in range(2):
            with pytest.raises(PoolExhausted):
                await pool.allocate(timeout=SEEN_SECONDS)
            assert pool.stats.resting == 1
            clock.skipped += 50.0
        assert await allocated(pool) == taken[2]


async def allocated(pool: Pool) -> Any:
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            try:
                return await pool.allocate(timeout=SEEN_SECONDS)
            except PoolExhausted:
                await asyncio.sleep(0.05)


async def test_a_pod_with_empty_chunks_gives_them_back_when_the_pool_runs_out(domain: Domain) -> None:
    """After seconds and not a minute; another pod gets them, and none goes back and forth."""
    wide = POOL | {"ranges": ["10.45.0.0/24"], "excluded": []}
    async with (
        requester(domain.nats_url, domain.prefix, UE) as asking,
        domain.agent(pools=[wide], **ONE_LEAD),
        joined(domain, "smf-1", "smf-2") as (hoarder, needy),
    ):
        held = [await hoarder.allocate(timeout=SEEN_SECONDS) for _ in range(200)]
        await eventually(lambda: hoarder.stats.wanted > 100)  # at this pace it would like to have them all
        for address in held:
            hoarder.release(address)
        taken = {await allocated(needy) for _ in range(30)}
        assert len(taken) == 30
        assert not any(hoarder.valid(address) for address in taken)
        told = len(asking.of(m.Sync)) + 2
        await asking.seen(lambda: len(asking.of(m.Sync)) >= told)
        back = [event for _, event in asking.events if isinstance(event, m.ChunkReleased | m.ChunkAllocated)]
        first = next(i for i, event in enumerate(back) if isinstance(event, m.ChunkReleased))
        after = back[first:]
        assert {event.previous.name for event in after if isinstance(event, m.ChunkReleased)} == {"smf-1"}
        assert {event.owner.name for event in after if isinstance(event, m.ChunkAllocated)} == {"smf-2"}
        assert hoarder.allocate_nowait() not in taken  # it has kept one chunk


async def test_a_pool_grows_while_everything_runs(domain: Domain) -> None:
    """Agents are restarted one by one with a further range, more exclusions and a higher revision. Pods and
    demuxes learn of it by themselves: what is new is issued and looked up, what is excluded is not issued."""
    grown = POOL | {
        "ranges": [*POOL["ranges"], "10.61.0.0/28"],
        "excluded": [*POOL["excluded"], "10.45.0.16/30", "10.60.0.2"],
        "revision": 2,
    }
    async with AsyncExitStack() as stack:
        async with domain.agent(pools=[POOL]):
            demux = await stack.enter_async_context(demux_of(domain))
            pools = await stack.enter_async_context(joined(domain, "smf-1", "smf-2"))
            taken = await drain(pools)
            owner_of = {address: pool for address in taken for pool in pools if pool.valid(address)}
            out = IPv4Address("10.45.0.17")
            owner_of[out].release(out)  # free, and excluded from now on
            standby = await stack.enter_async_context(running(domain.settings(pools=[grown])))
        await within(standby.leader.leading.wait())
        await eventually(lambda: all(pool.definition.revision == 2 for pool in pools))
        await eventually(lambda: demux.definition.revision == 2)
        more: list[Any] = []
        while len(more) < 13:
            more += await drain(pools)
        assert set(more) == set(list(IPv4Network("10.61.0.0/28"))[2:-1])
        for address in more:
            await eventually(lambda: demux.owner(address))  # noqa: B023
            owner = demux.owner(address)
            assert owner is not None
            assert owner.name == ("smf-1" if pools[0].valid(address) else "smf-2")
        excluded = [IPv4Address("10.60.0.2"), IPv4Address("10.45.0.18")]
        for address in excluded:
            assert owner_of[address].valid(address)  # who has it keeps it
            owner_of[address].release(address)
        assert set(await drain(pools)) == set()
        assert all(
            pool.valid(address) for address, pool in owner_of.items() if address not in {out, *excluded}
        )
    assert "revision" in await refused(domain, DRSM_POOLS=json.dumps([POOL]))


async def test_a_shrink_is_refused_and_names_what_stands_in_its_way(domain: Domain) -> None:
    """Exit code 2, and the chunks by number and pod."""
    less = POOL | {"ranges": POOL["ranges"][:1], "revision": 2}
    async with domain.agent(pools=[POOL]), joined(domain, "smf-1") as pools:
        await drain(pools)
    said = await refused(domain, DRSM_POOLS=json.dumps([less]))
    assert "pool:ue: these would not stay where they are: chunk 4 of smf-1, chunk 5 of smf-1" in said
    assert "have them given back first" in said


async def test_a_small_network_serves_more_than_one_pod(domain: Domain) -> None:
    """A /24 has chunks for several pods, and the process that serves it says for how many."""
    pools = [{"name": "ue", "kind": "ipv4", "ranges": ["10.45.0.0/24"]}]
    async with AsyncExitStack() as life:
        await life.enter_async_context(domain.agent(pools=pools, **UNHURRIED))
        addresses = []
        for i in range(4):
            pod = Pod(f"smf-{i}", "10.0.0.1", "i")
            drsm = await life.enter_async_context(
                Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS)
            )
            pool = await drsm.join("ue", in_use=lambda first, last: [])
            addresses.append(await pool.allocate(timeout=SEEN_SECONDS))
        assert len(set(addresses)) == 4
