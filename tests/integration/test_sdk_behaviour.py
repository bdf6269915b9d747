"""What applications may rely on, whoever answers: each test runs on the real agent with MongoDB and NATS, and
on the stand-in of `drsm_sdk.testing`. They use the SDK's public surface only, so what passes here is what an
application's own tests on the stand-in prove about it in production.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Address, IPv6Network
from typing import Any, Protocol

import pytest

from drsm_agent.settings import PoolSettings
from drsm_sdk import (
    AgentUnavailable,
    BadRequest,
    Demux,
    Drsm,
    NotAllocated,
    NotOwner,
    Pod,
    Pool,
    PoolEmpty,
    PoolExhausted,
    SessionLost,
    changes,
    testing,
)
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.wire import messages as wire
from tests import harness
from tests.harness import POOL, SEEN_SECONDS, eventually
from tests.sdk.fake_agent import DEADLINE, SkippingClock

TINY = "tiny"
"""Two chunks: four ids and, as id 0 is never issued, three."""
SMALL = "small"
"""Four chunks: enough ids for a pod to find that it has too many of them."""
UE, PREFIX, SESSION = "ue", "prefix", "session"
"""IPv4 addresses of two ranges, with a block that has none; IPv6 prefixes; three ids for each session."""
POOLS: list[dict[str, Any]] = [
    {"name": POOL, "bits": 12, "block_bits": 4, "slots": 10, "usage_lag_ms": 0},
    {"name": TINY, "bits": 10, "block_bits": 9, "slots": 4, "usage_lag_ms": 0},
    {"name": SMALL, "bits": 10, "block_bits": 8, "slots": 4, "usage_lag_ms": 0},
    {
        "name": UE,
        "kind": "ipv4",
        "ranges": ["10.45.0.0/28", "10.60.0.0/29"],
        "excluded": ["10.45.0.8/29"],
        "block_bits": 3,
        "usage_lag_ms": 0,
    },
    {
        "name": PREFIX,
        "kind": "ipv6",
        "ranges": ["2001:db8::/60"],
        "prefix": 64,
        "block_bits": 2,
        "usage_lag_ms": 0,
    },
    {
        "name": SESSION,
        "usage_lag_ms": 0,
        "spaces": [
            {"name": "seid", "bits": 64, "block_bits": 3},
            {"name": "ue_ip", "kind": "ipv4", "ranges": ["10.61.0.0/27"], "block_bits": 3},
            {"name": "tmsi", "bits": 32, "block_bits": 6, "order": "spread"},
        ],
    },
]
LIVENESS, ALLOCATION = 2.5, 4.0
"""Seconds; the liveness lease is the shortest that the real agent takes. A hold is `A + W`, here 4 s."""
STAND_IN_LIVENESS, STAND_IN_HOLD = 0.5, 0.3
PATIENT: dict[str, Any] = {"timeout": SEEN_SECONDS}

AMF_1, AMF_2, AMF_3 = (Pod(f"amf-{i}", f"10.0.0.{i}", f"i{i}") for i in (1, 2, 3))


class Backend(Protocol):
    """Who answers, and what may happen to the pods."""

    hold: float

    def agent(self) -> AbstractAsyncContextManager[None]:
        """There is an agent inside of this block, and none outside."""

    def drsm(self, pod: Pod, **options: Any) -> Drsm: ...

    def demux(self, pool: str = POOL, **options: Any) -> Demux: ...

    async def kill(self, pod: Pod) -> None:
        """The pod falls silent for ever, without a word: as by SIGKILL."""


class Real:
    """The agent on MongoDB and NATS. A killed pod is one whose connection was closed under it."""

    hold = ALLOCATION

    def __init__(self, domain: harness.Domain) -> None:
        self._domain = domain
        self._transports: dict[str, list[NatsTransport]] = defaultdict(list)

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        async with self._domain.agent(pools=POOLS, liveness_ttl=LIVENESS, allocation_ttl=ALLOCATION):
            yield

    def drsm(self, pod: Pod, **options: Any) -> Drsm:
        url, prefix = self._domain.nats_url, self._domain.prefix
        transport = NatsTransport(url)
        self._transports[pod.name].append(transport)
        return Drsm.connect(url, pod, prefix=prefix, transport=transport, **PATIENT | options)

    def demux(self, pool: str = POOL, **options: Any) -> Demux:
        url, prefix = self._domain.nats_url, self._domain.prefix
        return Demux.connect(url, pool, prefix=prefix, **PATIENT | options)

    async def kill(self, pod: Pod) -> None:
        for transport in self._transports.pop(pod.name):
            await transport.close()


class StandIn:
    """The stand-in that the SDK ships."""

    hold = STAND_IN_HOLD

    def __init__(self, domain: testing.Domain) -> None:
        self._domain = domain

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        self._domain.start()
        yield
        self._domain.stop()

    def drsm(self, pod: Pod, **options: Any) -> Drsm:
        return self._domain.drsm(pod, **PATIENT | options)

    def demux(self, pool: str = POOL, **options: Any) -> Demux:
        return self._domain.demux(pool, **PATIENT | options)

    async def kill(self, pod: Pod) -> None:
        self._domain.cut(pod.name)  # and not `kill`, which spares tests the wait until it is declared dead


@pytest.fixture(params=["real", "stand-in"])
async def backend(request: pytest.FixtureRequest, domain: harness.Domain) -> AsyncIterator[Backend]:
    if request.param == "real":
        yield Real(domain)
        return
    definitions = [PoolSettings(**pool).definition for pool in POOLS]
    async with testing.Domain(
        *definitions, hold=STAND_IN_HOLD, liveness=STAND_IN_LIVENESS, allocation=ALLOCATION
    ) as in_memory:
        in_memory.stop()
        yield StandIn(in_memory)


class Contexts:
    """What an application keeps of its sessions: the ids in use."""

    def __init__(self) -> None:
        self.ids: set[int] = set()

    def in_use(self, first: int, last: int) -> list[int]:
        return [id_ for id_ in self.ids if first <= id_ <= last]


async def next_of(reader: Any, found: Callable[[Any], object]) -> Any:
    """The next item that is wanted."""
    async with asyncio.timeout(SEEN_SECONDS):
        while not found(item := await anext(reader)):
            pass
    return item


async def taken(pool: Pool, count: int) -> list[Any]:
    return [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(count)]


def chunks(ids: list[int]) -> set[int]:
    """The chunks that ids of the larger pool lie in."""
    return {id_ >> 4 for id_ in ids}


def owners(demux: Demux, ids: list[Any]) -> set[tuple[str, str] | None]:
    return {(owner.name, owner.state) if (owner := demux.owner(id_)) else None for id_ in ids}


# --- issuing ----------------------------------------------------------------------------------------


async def test_ids_are_unique_over_pods_and_everybody_knows_whose_they_are(backend: Backend) -> None:
    async with (
        backend.agent(),
        backend.demux() as demux,
        backend.drsm(AMF_1) as one,
        backend.drsm(AMF_2) as two,
    ):
        pool, other = await one.join(POOL), await two.join(POOL)
        mine, others = await taken(pool, 55), await taken(other, 55)
        assert len({*mine, *others}) == 110
        assert 0 not in {*mine, *others}
        assert all(id_ & 15 < 10 for id_ in mine)  # the slots of the definition, no more
        assert all(pool.valid(id_) and not other.valid(id_) for id_ in mine)
        assert len({pool.grant(id_) for id_ in mine}) == len(chunks(mine)) >= 6
        await eventually(lambda: owners(demux, mine) == {("amf-1", "live")})
        await eventually(lambda: owners(demux, others) == {("amf-2", "live")})
        await eventually(lambda: other.owner(mine[0]) == pool.owner(mine[0]) == demux.owner(mine[0]))
        owner = demux.owner(mine[0])
        assert owner is not None
        assert (owner.ip, owner.instance, owner.incarnation) == ("10.0.0.1", "i1", one.incarnation)
        for table in (pool, demux):
            await eventually(lambda: [pod.name for pod in table.pods()] == ["amf-1", "amf-2"])  # noqa: B023
        assert demux.synced
        assert demux.owner(4095) is None


async def test_released_ids_are_issued_again_last_and_in_order(backend: Backend) -> None:
    async with backend.agent(), backend.drsm(AMF_1) as drsm:
        pool = await drsm.join(TINY)
        ids = await taken(pool, 7)
        assert sorted(ids) == [1, 2, 3, 512, 513, 514, 515]
        for id_ in (514, 512, 515):
            pool.release(id_)
        assert await taken(pool, 3) == [514, 512, 515]


async def test_a_wrong_release_is_an_error_that_changes_nothing(backend: Backend) -> None:
    async with backend.agent(), backend.drsm(AMF_1) as one, backend.drsm(AMF_2) as two:
        pool, other = await one.join(POOL), await two.join(POOL)
        (id_,), (foreign,) = await taken(pool, 1), await taken(other, 1)
        before = pool.stats.issued
        for wrong, error in ((foreign, NotOwner), (4000, NotOwner), (0, NotOwner), (id_ + 1, NotAllocated)):
            with pytest.raises(error):
                pool.release(wrong)
        with pytest.raises(NotOwner):
            pool.grant(foreign)
        assert pool.stats.issued == before
        assert other.valid(foreign)
        pool.release(id_)
        assert not pool.valid(id_)
        with pytest.raises(NotAllocated):
            pool.release(id_)


async def test_an_unknown_pool_is_a_bad_request(backend: Backend) -> None:
    async with backend.agent(), backend.drsm(AMF_1) as drsm:
        with pytest.raises(BadRequest) as refused:
            await drsm.join("nosuch")
        assert refused.value.error == "unknown_pool"
        with pytest.raises(BadRequest) as refused:
            async with backend.demux("nosuch"):
                pass
        assert refused.value.error == "unknown_pool"
        assert await taken(await drsm.join(POOL), 1)  # no harm was done


async def test_an_exhausted_pool_says_so_and_serves_again_what_others_give_back(backend: Backend) -> None:
    """Chunks that stayed empty for a minute go back by themselves; who waits for them is served."""
    clock = SkippingClock()
    async with backend.agent(), backend.demux(SMALL) as demux:
        events = demux.events()
        async with backend.drsm(AMF_1, clock=clock) as one, backend.drsm(AMF_2) as two:
            pool = await one.join(SMALL)
            reader = pool.changes()
            ids = await taken(pool, 15)
            with pytest.raises(PoolExhausted):
                await pool.allocate(timeout=SEEN_SECONDS)
            other = await two.join(SMALL)
            with pytest.raises(PoolEmpty):
                other.allocate_nowait()
            with pytest.raises(PoolExhausted):
                await other.allocate(timeout=SEEN_SECONDS)
            for id_ in ids:
                pool.release(id_)
            gave = await given_back(reader, clock)
            released = await next_of(events, lambda event: isinstance(event, wire.ChunkReleased))
            assert released.previous.name == "amf-1"
            assert set(released.chunks) <= set(gave.chunks)
            assert await harness.within(allocated(other)) >> 8 in gave.chunks


async def given_back(reader: Any, clock: SkippingClock) -> changes.GivenBack:
    """Let minutes pass until a chunk goes back; the allocation lease runs out each time and is renewed."""
    waiting = asyncio.ensure_future(next_of(reader, lambda change: isinstance(change, changes.GivenBack)))
    while not waiting.done():
        clock.skipped += 120.0
        await asyncio.wait([waiting], timeout=1.5)
    found: changes.GivenBack = waiting.result()
    return found


async def allocated(pool: Pool) -> Any:
    while True:
        try:
            return await pool.allocate(timeout=SEEN_SECONDS)
        except PoolExhausted:
            continue


# --- addresses, and several ids of one session ------------------------------------------------------


async def test_addresses_are_issued_looked_up_and_announced_as_prefixes(backend: Backend) -> None:
    """Never the network's, the gateway's, the broadcast's or an excluded one; to the last of them."""
    async with backend.agent(), backend.demux(UE) as demux, backend.drsm(AMF_1) as drsm:
        events = demux.events()
        pool = await drsm.join(UE)
        ids = await taken(pool, 11)
        assert sorted(map(str, ids)) == sorted(
            [f"10.45.0.{i}" for i in range(2, 8)] + [f"10.60.0.{i}" for i in range(2, 7)]
        )
        with pytest.raises(PoolExhausted, match="2 of 2 owned"):
            await pool.allocate(timeout=SEEN_SECONDS)
        await eventually(lambda: owners(demux, ids) == {("amf-1", "live")})
        assert demux.owner("10.60.0.3") == demux.owner(IPv4Address("10.60.0.3")) == pool.owner("10.60.0.3")
        assert demux.owner("10.45.0.9") is None
        prefixes: list[str] = []
        while len(prefixes) < 2:
            event = await next_of(events, lambda event: isinstance(event, wire.ChunkAllocated))
            assert event.prefixes == demux.definition.prefixes(event.chunks)
            prefixes += event.prefixes[UE]
        assert sorted(prefixes) == ["10.45.0.0/29", "10.60.0.0/29"]
        for wrong in (3, "10.45.0", "::1"):
            with pytest.raises(BadRequest, match="pool ue: expected an ipv4 address, found"):
                demux.owner(wrong)
        with pytest.raises(NotOwner):
            pool.release("10.45.0.9")


async def test_an_id_may_be_a_prefix_and_any_address_of_it_tells_the_owner(backend: Backend) -> None:
    async with backend.agent(), backend.demux(PREFIX) as demux, backend.drsm(AMF_1) as drsm:
        pool = await drsm.join(PREFIX)
        ids = await taken(pool, 16)
        assert sorted(ids) == list(IPv6Network("2001:db8::/60").subnets(new_prefix=64))
        await eventually(lambda: owners(demux, ids) == {("amf-1", "live")})
        inside = [ids[5], str(ids[5]), ids[5][99], str(ids[5][99])]
        assert owners(demux, inside) == {("amf-1", "live")}
        pool.release(ids[5])
        assert await taken(pool, 1) == [ids[5]]


async def test_ids_of_a_session_are_of_one_chunk_and_move_together(backend: Backend) -> None:
    """Asked for at once, or one beside another; the scan is asked for each space."""
    asked: list[tuple[Any, Any, str]] = []

    def in_use(first: Any, last: Any, space: str) -> list[Any]:
        asked.append((first, last, space))
        return [session[space] for session in kept if first <= session[space] <= last]

    async with backend.agent(), backend.demux(SESSION) as demux, backend.drsm(AMF_1) as dying:
        pool = await dying.join(SESSION)
        sessions = [await pool.allocate_set(timeout=SEEN_SECONDS) for _ in range(3)]
        sessions.append({"tmsi": await pool.allocate(timeout=SEEN_SECONDS, space="tmsi")})
        for space in ("ue_ip", "seid"):
            beside = ("tmsi", sessions[-1]["tmsi"])
            sessions[-1][space] = pool.allocate_nowait(space=space, beside=beside)
        for session in sessions:
            assert set(session) == {"seid", "ue_ip", "tmsi"}
            assert len({demux.definition.chunk_of(id_, space) for space, id_ in session.items()}) == 1
        kept = sessions[1:]
        for space, id_ in sessions[0].items():
            pool.release(id_, space=space)
        async with backend.drsm(AMF_2) as survivor:
            heir = await survivor.join(SESSION, in_use=in_use)
            reader = heir.changes()
            await backend.kill(AMF_1)
            await eventually(lambda: of_sessions(demux, kept) == {"amf-2"})
            await eventually(
                lambda: (
                    (heir.stats.chunks, heir.stats.closed) == (owned_by(demux, "amf-2"), 0)
                    and not owned_by(demux, "amf-1")
                )
            )
            done = [change for change in await so_far(reader) if isinstance(change, changes.Scanned)]
            assert sum(scan.in_use for scan in done) == 9
            assert {space for _, _, space in asked} == {"seid", "ue_ip", "tmsi"}
            assert (IPv4Address("10.61.0.0"), IPv4Address("10.61.0.7"), "ue_ip") in asked
            new = await every_set(heir)
            everything = kept + new
            for space in ("seid", "ue_ip", "tmsi"):
                assert len({session[space] for session in everything}) == len(everything)
            assert all(heir.valid(id_, space=space) for session in kept for space, id_ in session.items())
            assert {str(session["ue_ip"]) for session in everything} == {f"10.61.0.{i}" for i in range(2, 31)}


async def every_set(pool: Pool) -> list[dict[str, Any]]:
    """To the last one."""
    sets: list[dict[str, Any]] = []
    while True:
        try:
            sets.append(await pool.allocate_set(timeout=SEEN_SECONDS))
        except PoolExhausted:
            return sets


def of_sessions(demux: Demux, sessions: list[dict[str, Any]]) -> set[str | None]:
    found = [demux.owner(id_, space=space) for session in sessions for space, id_ in session.items()]
    return {owner.name if owner else None for owner in found}


async def test_which_space_is_meant_must_be_said(backend: Backend) -> None:
    """Of a pool with several; the error names them."""
    says = "pool session: space: expected one of seid, ue_ip, tmsi, found"
    async with backend.agent(), backend.demux(SESSION) as demux, backend.drsm(AMF_1) as drsm:
        pool = await drsm.join(SESSION)
        id_ = await pool.allocate(timeout=SEEN_SECONDS, space="seid")
        calls: list[Callable[[], Any]] = [
            pool.allocate_nowait,
            lambda: pool.allocate_nowait(space="imsi"),
            lambda: pool.allocate_set_nowait("seid", "imsi"),
            lambda: pool.allocate_nowait(space="seid", beside=("imsi", id_)),
            lambda: pool.release(id_),
            lambda: pool.valid(id_),
            lambda: pool.grant(id_),
            lambda: pool.owner(id_),
            lambda: demux.owner(id_),
            lambda: demux.owner(id_, space="imsi"),
        ]
        for call in calls:
            with pytest.raises(BadRequest, match=says):
                call()
        with pytest.raises(BadRequest, match="pool session: expected an id as int, found IPv4Address"):
            demux.owner(IPv4Address("10.61.0.2"), space="seid")
        assert pool.stats.issued == 1


# --- death and claims -------------------------------------------------------------------------------


async def test_a_killed_pods_chunks_go_to_exactly_one_survivor_each_and_every_demux_hears_it(
    backend: Backend,
) -> None:
    async with backend.agent(), backend.demux() as demux, backend.drsm(AMF_1) as dying:
        async with backend.drsm(AMF_2) as two, backend.drsm(AMF_3) as three:
            pools = [await two.join(POOL), await three.join(POOL)]
            ids = await taken(await dying.join(POOL), 45)
            await eventually(lambda: owners(demux, ids) == {("amf-1", "live")})
            readers, events = [pool.changes() for pool in pools], demux.events()
            lost = owned_by(demux, "amf-1")
            await backend.kill(AMF_1)
            down = await next_of(events, lambda e: isinstance(e, wire.PodDown | wire.ChunkClaimed))
            assert isinstance(down, wire.PodDown)  # consumers hear of a death before its claims
            assert (down.pod.name, down.pod.incarnation, down.reason) == (
                "amf-1",
                dying.incarnation,
                "expired",
            )
            owner = demux.owner(ids[0])
            assert owner is None or owner.name != "amf-1" or owner.state == "down"
            await eventually(lambda: sum(pool.stats.closed for pool in pools) >= lost)
            gains = [list(filter(is_marked_gain, await so_far(reader))) for reader in readers]
            gained = [[n for gain in own for n in gain.chunks] for own in gains]
            assert not set(gained[0]) & set(gained[1])  # each by one
            assert {*gained[0], *gained[1]} >= chunks(ids)  # and each by somebody
            assert all(gain.hold == pytest.approx(backend.hold) for own in gains for gain in own)
            await eventually(lambda: owners(demux, ids) == {("amf-2", "live"), ("amf-3", "live")})
            assert abs(len(gained[0]) - len(gained[1])) <= 1
            claims = [event for event in await so_far(events) if isinstance(event, wire.ChunkClaimed)]
            assert {claim.owner.name for claim in claims} == {"amf-2", "amf-3"}
            assert {claim.previous for claim in claims} == {down.pod}
            await eventually(lambda: [pod.name for pod in demux.pods()] == ["amf-2", "amf-3"])


def owned_by(demux: Demux, name: str) -> int:
    """How many chunks a pod has. (Their claim may come in two parts, as the change stream sees it.)"""
    return sum(owner.name == name for owner in demux.chunks().values())


def is_marked_gain(change: Any) -> bool:
    return isinstance(change, changes.Gained) and change.marked


async def so_far(events: Any) -> list[Any]:
    """The events up to the first that does not come within a moment."""
    found = []
    while True:
        try:
            async with asyncio.timeout(0.2):
                found.append(await anext(events))
        except TimeoutError:
            return found


async def test_a_claimed_chunk_is_held_then_scanned_and_only_its_free_ids_are_issued(
    backend: Backend,
) -> None:
    contexts = Contexts()
    async with backend.agent(), backend.demux(TINY) as demux, backend.drsm(AMF_1) as dying:
        ids = await taken(await dying.join(TINY), 7)
        contexts.ids = {2, 513, 514}
        async with backend.drsm(AMF_2) as survivor:
            pool = await survivor.join(TINY, in_use=contexts.in_use)
            reader, events = pool.changes(), demux.events()
            await backend.kill(AMF_1)
            await next_of(reader, is_marked_gain)
            heard = asyncio.get_running_loop().time()
            await eventually(lambda: pool.stats.closed == 2)
            assert all(pool.valid(id_) for id_ in ids)  # its to serve from now on
            with pytest.raises(PoolEmpty):
                pool.allocate_nowait()
            done = [await next_of(reader, lambda c: isinstance(c, changes.Scanned)) for _ in range(2)]
            assert asyncio.get_running_loop().time() - heard >= backend.hold - 0.1
            assert sorted((one.chunk, one.in_use, one.freed) for one in done) == [(0, 1, 2), (1, 2, 2)]
            assert sorted(await taken(pool, 4)) == [1, 3, 512, 515]
            with pytest.raises(PoolExhausted):
                await pool.allocate(timeout=SEEN_SECONDS)
            pool.release(513)
            assert await taken(pool, 1) == [513]
            cleared: set[int] = set()
            while cleared != {0, 1}:
                event = await next_of(events, lambda e: isinstance(e, wire.ChunkScanned))
                assert event.owner.name == "amf-2"
                cleared |= set(event.chunks)


async def test_without_a_scan_a_claimed_chunk_is_served_but_never_issued_from(backend: Backend) -> None:
    async with backend.agent(), backend.drsm(AMF_1) as dying:
        ids = await taken(await dying.join(TINY), 7)
        async with backend.drsm(AMF_2) as survivor:
            pool = await survivor.join(TINY)
            reader = pool.changes()
            await backend.kill(AMF_1)
            await next_of(reader, is_marked_gain)
            await asyncio.sleep(backend.hold + 0.3)
            assert (pool.stats.closed, pool.stats.free) == (2, 0)
            assert pool.valid(ids[0])
            owner = pool.owner(ids[0])
            assert owner is not None
            assert owner.name == "amf-2"
            with pytest.raises(PoolExhausted):
                await pool.allocate(timeout=SEEN_SECONDS)


async def test_orphans_wait_for_a_pod_to_appear(backend: Backend) -> None:
    """Nobody lives when the pod dies; also its chunks end with an owner."""
    contexts = Contexts()
    async with backend.agent(), backend.demux() as demux, backend.drsm(AMF_1) as dying:
        ids = await taken(await dying.join(POOL), 15)
        await backend.kill(AMF_1)
        await eventually(lambda: owners(demux, ids) == {("amf-1", "down")})
        async with backend.drsm(AMF_2) as newcomer:
            pool = await newcomer.join(POOL, in_use=contexts.in_use)
            await eventually(lambda: owners(demux, ids) == {("amf-2", "live")})
            await eventually(lambda: pool.valid(ids[0]))


async def test_a_restarted_pod_is_a_higher_incarnation_with_fresh_chunks_and_gets_its_old_ones(
    backend: Backend,
) -> None:
    """Even though another pod has fewer chunks."""
    async with backend.agent(), backend.demux() as demux, backend.drsm(AMF_2) as other:
        await other.join(POOL)
        async with backend.drsm(AMF_1) as first:
            old = await taken(await first.join(POOL), 25)
            before = first.incarnation
            await backend.kill(AMF_1)
            async with backend.drsm(AMF_1) as second:
                pool = await second.join(POOL, in_use=lambda first, last: range(first, last + 1))
                assert before is not None
                assert second.incarnation is not None
                assert second.incarnation > before
                new = await taken(pool, 5)
                assert not set(new) & set(old)
                await eventually(lambda: {demux.owner(id_) for id_ in old} == {demux.owner(new[0])})
                owner = demux.owner(old[0])
                assert owner is not None
                assert owner.incarnation == second.incarnation


async def test_a_pod_that_leaves_in_good_order_hands_its_chunks_over_at_once(backend: Backend) -> None:
    """Its hold is the usage lag alone, here 0 s."""
    contexts = Contexts()
    async with backend.agent(), backend.demux() as demux, backend.drsm(AMF_2) as survivor:
        pool = await survivor.join(POOL, in_use=contexts.in_use)
        reader, events = pool.changes(), demux.events()
        async with backend.drsm(AMF_1) as leaving:
            left = await leaving.join(POOL)
            ids = await taken(left, 15)
        down = await next_of(events, lambda event: isinstance(event, wire.PodDown))
        assert (down.pod.name, down.reason) == ("amf-1", "closed")
        gained = await next_of(reader, is_marked_gain)
        assert gained.hold == 0.0
        scanned = await next_of(reader, lambda change: isinstance(change, changes.Scanned))
        assert (scanned.in_use, scanned.freed >= 9) == (0, True)
        await eventually(lambda: owners(demux, ids) == {("amf-2", "live")})
        with pytest.raises(SessionLost, match="closed"):
            left.allocate_nowait()


# --- the session ------------------------------------------------------------------------------------


async def test_of_two_pods_with_one_name_the_older_is_told_that_it_lost_its_session(
    backend: Backend,
) -> None:
    """It stops at once, says which ids it had issued, and comes back with a new session and other ids."""
    async with backend.agent(), backend.drsm(AMF_1) as older:
        pool = await older.join(POOL)
        reader = pool.changes()
        ids, incarnation = await taken(pool, 5), older.incarnation
        async with backend.drsm(AMF_1) as newer:
            await newer.join(POOL)
            lost = await next_of(reader, lambda change: isinstance(change, changes.SessionLost))
            assert (lost.reason, lost.issued) == ("superseded", changes.ranges(ids))
            assert older.state == "lost"
            assert not pool.valid(ids[0])
            with pytest.raises(SessionLost, match="superseded"):
                pool.allocate_nowait()
        renewed = await next_of(reader, lambda change: isinstance(change, changes.SessionRenewed))
        assert incarnation is not None
        assert renewed.incarnation == older.incarnation
        assert renewed.incarnation > incarnation
        gained = await next_of(
            reader, lambda change: isinstance(change, changes.Gained) and not change.marked
        )
        assert not set(gained.chunks) & chunks(ids)
        assert not set(await taken(pool, 1)) & set(ids)


async def test_without_an_agent_pods_go_on_from_stock_and_demuxes_go_on_routing(backend: Backend) -> None:
    """For the allocation lease; then the pod waits until one answers, and is what it was."""
    async with AsyncExitStack() as stack:
        async with backend.agent():
            drsm = await stack.enter_async_context(backend.drsm(AMF_1))
            demux = await stack.enter_async_context(backend.demux())
            pool = await drsm.join(POOL)
            incarnation = drsm.incarnation
            await eventually(lambda: pool.stats.free >= 10)
        stock = pool.stats.free
        ids = [pool.allocate_nowait() for _ in range(stock)]
        assert owners(demux, ids) == {("amf-1", "live")}
        with pytest.raises((AgentUnavailable, PoolEmpty)):
            await pool.allocate(timeout=0.5)
        latecomers = backend.drsm(AMF_2, timeout=DEADLINE), backend.demux(timeout=DEADLINE)
        await asyncio.gather(*[hears_no_agent(latecomer) for latecomer in latecomers])
        await eventually(lambda: drsm.state == "lapsed")
        assert not pool.valid(ids[0])
        with pytest.raises(AgentUnavailable, match="allocation"):
            pool.allocate_nowait()
        async with backend.agent():
            assert not set(await taken(pool, 1)) & set(ids)
            assert drsm.incarnation == incarnation
            assert all(pool.valid(id_) for id_ in ids)
            await eventually(lambda: demux.synced)
            await stack.aclose()


async def hears_no_agent(latecomer: AbstractAsyncContextManager[Any]) -> None:
    with pytest.raises(AgentUnavailable, match="no responders"):
        async with latecomer:
            pass


async def test_a_demux_that_comes_late_has_the_whole_table_at_once(backend: Backend) -> None:
    """And two pools of one pod do not mix."""
    async with backend.agent(), backend.drsm(AMF_1) as drsm:
        ids = await taken(await drsm.join(POOL), 35)
        tiny = await taken(await drsm.join(TINY), 2)
        async with backend.demux() as demux, backend.demux(TINY) as other:
            assert owners(demux, ids) == owners(other, tiny) == {("amf-1", "live")}
            assert chunks(ids) <= set(demux.chunks())
            assert set(other.chunks()) <= {0, 1}


async def test_a_change_of_agent_goes_unnoticed(backend: Backend) -> None:
    """What was issued stays valid, and what comes is other ids of other chunks."""
    async with AsyncExitStack() as stack:
        async with backend.agent():
            drsm = await stack.enter_async_context(backend.drsm(AMF_1))
            pool = await drsm.join(POOL)
            reader = pool.changes()
            ids = await taken(pool, 25)
            incarnation = drsm.incarnation
        async with backend.agent():
            ids += await taken(pool, 40)
            assert len(set(ids)) == 65
            assert drsm.incarnation == incarnation
            assert all(pool.valid(id_) for id_ in ids)
            await stack.aclose()
        assert not [
            change async for change in reader if isinstance(change, changes.SessionLost | changes.Lost)
        ]
