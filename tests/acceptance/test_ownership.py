"""Who owns what when pods, agents or all of them die, pause, or are away: real servers and processes.

Claims are counted in MongoDB's change stream, not by the agent.
"""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from drsm_agent.demo.contexts import Contexts
from drsm_agent.demo.process import PodProcess
from drsm_sdk import Demux, Drsm, Pod, supply
from drsm_sdk.wire import messages as m
from tests.acceptance.test_original_list import demux_of, pod, pod_process
from tests.harness import (
    NONE_EXPIRES,
    ONE_LEAD,
    POOL,
    SEEN_SECONDS,
    Domain,
    Requester,
    demuxes_equal_mongodb,
    eventually,
    mongo_client,
    mongo_table,
    renewing,
    requester,
    within,
)

SMALL_CHUNKS = {"pools": [{"name": POOL, "slots": 10, "usage_lag_ms": 0}]}
SHORT = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "bits": 14, "usage_lag_ms": 0}]}
PODS_AT_ONCE_SECONDS = 60.0
TTL_SECONDS = 60.0
"""The embedded MongoDB's TTL monitor looks each second; keepalives expire after three `A` at the latest."""


class Claims:
    """How often each chunk changed its owner, as MongoDB tells it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.owners: dict[int, list[str]] = {}

    async def gather(self, numbers: set[int]) -> None:
        """Until every one of `numbers` was claimed."""
        while not numbers <= self.owners.keys():
            change = await self._stream.next()
            updated = change["updateDescription"]["updatedFields"]
            if "podId" in updated:
                n = int(change["documentKey"]["_id"].removeprefix("chunkid-"))
                self.owners.setdefault(n, []).append(updated["podId"])

    async def settle(self) -> None:
        """Everything that is in the stream by now."""
        while (change := await self._stream.try_next()) is not None:
            updated = change["updateDescription"]["updatedFields"]
            if "podId" in updated:
                n = int(change["documentKey"]["_id"].removeprefix("chunkid-"))
                self.owners.setdefault(n, []).append(updated["podId"])


@asynccontextmanager
async def claims(domain: Domain) -> AsyncIterator[Claims]:
    only_chunks = [
        {"$match": {"operationType": "update", "documentKey._id": {"$regex": "^chunkid-"}}},
    ]
    async with (
        mongo_client(domain) as client,
        await client[domain.database][POOL].watch(only_chunks) as stream,
    ):
        yield Claims(stream)


@pytest.mark.timeout(300)  # forty-nine pods and the agent in one process: a minute on a busy machine
async def test_one_of_fifty_is_killed_and_each_of_its_chunks_is_claimed_once_and_evenly(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 chunks in all. Two demuxes agree with MongoDB, and the other pods notice nothing. (None of them
    gives empty chunks back meanwhile: claims go by what each has.)"""
    monkeypatch.setattr(supply, "IDLE", 3600.0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(domain.agent(**SMALL_CHUNKS))
        demuxes: list[Demux] = [await stack.enter_async_context(demux_of(domain)) for _ in range(2)]
        clients: list[Drsm] = [
            await stack.enter_async_context(
                Drsm.connect(
                    domain.nats_url,
                    Pod(f"amf-{i}", f"10.0.1.{i}", "nf"),
                    prefix=domain.prefix,
                    timeout=PODS_AT_ONCE_SECONDS,
                )
            )
            for i in range(49)
        ]
        pools = await asyncio.gather(*[client.join(POOL) for client in clients])
        for pool in pools:
            for _ in range(180):
                await pool.allocate(timeout=PODS_AT_ONCE_SECONDS)
        victim = await stack.enter_async_context(pod_process(domain, "amf-victim", tmp_path))
        await victim.ask("allocate 1000", "allocated")
        # From here on no pod asks for more: claims go by what each has.
        await eventually(lambda: all(pool.stats.free >= pool.stats.wanted for pool in pools))
        incarnations = [client.incarnation for client in clients]
        watching = await stack.enter_async_context(claims(domain))
        victim.kill()
        before = await mongo_table(domain)  # the victim may have asked for more, which is granted only now
        orphans = {n for n, (name, _) in before.items() if name == "amf-victim"}
        assert len(orphans) >= 100
        assert len(before) >= 1000
        await within(watching.gather(orphans), PODS_AT_ONCE_SECONDS)
        after = await until_without(domain, "amf-victim")
        await demuxes_equal_mongodb(domain, *demuxes)
        await watching.settle()
        assert {n: len(watching.owners[n]) for n in orphans} == dict.fromkeys(orphans, 1)
        loads = Counter(name for name, _ in after.values())
        gained = {owner for owners in watching.owners.values() for owner in owners}
        assert max(loads[name] for name in gained) - min(loads.values()) <= 1  # whoever had fewest got them
        assert [client.incarnation for client in clients] == incarnations
        await eventually(lambda: all(client.state == "live" for client in clients))
        assert all(pool.allocate_nowait() for pool in pools)


async def until_without(domain: Domain, name: str) -> dict[int, tuple[str, int]]:
    """MongoDB's table once a pod has no chunk any more."""
    async with asyncio.timeout(PODS_AT_ONCE_SECONDS):
        while True:
            table = await mongo_table(domain)
            if name not in {owner for owner, _ in table.values()}:
                return table
            await asyncio.sleep(0.05)


async def test_a_pod_that_was_stopped_beyond_its_lease_never_issues_an_id_again_that_another_has(
    domain: Domain, tmp_path: Path
) -> None:
    """SIGSTOP until its chunks were claimed and scanned, then SIGCONT: it comes back as a new incarnation.
    The contexts' primary key refuses an id that is in use, whichever process issues it."""
    contexts = Contexts(tmp_path / "contexts.sqlite")
    async with (
        domain.agent(**SHORT),
        pod_process(domain, "amf-1", tmp_path) as paused,
        pod_process(domain, "amf-2", tmp_path) as survivor,
    ):
        first = (await paused.heard("joined"))["incarnation"]
        shared = (await paused.ask("allocate 300", "allocated"))["chunks"]
        paused.pause()
        await eventually(lambda: found_in_use(survivor) >= 300)
        more = await survivor.ask("allocate 1500", "allocated", timeout=60)  # beyond its own first chunk
        assert set(shared) < set(more["chunks"])
        paused.resume()
        renewed = await paused.heard("session_renewed")
        assert renewed["incarnation"] > first
        await asyncio.gather(
            paused.ask("allocate 100", "allocated", timeout=60), survivor.ask("allocate 100", "allocated")
        )
        assert len(contexts.of("amf-1")) == 400
        assert len(contexts.of("amf-2")) == 1600


def found_in_use(pod: PodProcess) -> int:
    return sum(line["in_use"] for line in pod.said if line["say"] == "scanned")


async def test_what_died_while_nobody_lived_goes_to_the_first_that_comes(
    domain: Domain, tmp_path: Path
) -> None:
    """All pods are killed: their chunks are orphans, listed as such, until a pod starts."""
    async with domain.served(**SMALL_CHUNKS) as asking:
        async with (
            pod_process(domain, "amf-1", tmp_path) as one,
            pod_process(domain, "amf-2", tmp_path) as two,
        ):
            for process in (one, two):
                await process.ask("allocate 50", "allocated")
                process.kill()
            await asking.seen(lambda: {down.pod.name for down in asking.of(m.PodDown)} == {"amf-1", "amf-2"})
        left = await mongo_table(domain)
        assert await orphans_of(asking) == len(left) >= 10
        async with pod(domain, "amf-3") as pool:
            # (The last of the two to be missed may have had chunks of the other.)
            await asking.seen(
                lambda: (
                    {n for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-3" for n in c.chunks}
                    >= left.keys()
                )
            )
            assert await orphans_of(asking) == 0
            table = await mongo_table(domain)
            assert {table[n][0] for n in left} == {"amf-3"}
            await eventually(lambda: pool.owner(min(left) << 10 | 1))


async def orphans_of(asking: Requester) -> int:
    answer = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
    return sum(pool.orphans for pool in answer.pools)


async def test_pod_and_agent_killed_together_leave_chunks_that_the_next_agent_has_claimed_once(
    domain: Domain, tmp_path: Path
) -> None:
    """Nobody saw the death; the next leader finds it by the lease that nobody renews."""
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        agent_process(domain) as agent,
        AsyncExitStack() as stack,
    ):
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)  # a pod waits only so long for a leader
        victim = await stack.enter_async_context(pod_process(domain, "amf-1", tmp_path))
        await victim.ask("allocate 10", "allocated")
        async with pod(domain, "amf-2"), claims(domain) as watching:
            lost = {n for n, (name, _) in (await mongo_table(domain)).items() if name == "amf-1"}
            agent.kill()
            victim.kill()
            await agent.wait()
            async with domain.agent():
                await within(watching.gather(lost), PODS_AT_ONCE_SECONDS)
                await watching.settle()
                assert {n: watching.owners[n] for n in lost} == {n: ["amf-2"] for n in lost}


@asynccontextmanager
async def agent_process(domain: Domain) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent that can be killed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DRSM_")}
    agent = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "drsm_agent", "run"),
        env=clean | domain.environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield agent
    finally:
        if agent.returncode is None:
            agent.kill()
        await agent.wait()


async def test_nobody_is_orphaned_while_the_agent_is_away_and_the_ttl_monitor_takes_the_keepalives(
    domain: Domain,
) -> None:
    """The mirrors are no sign of life: when the agent is back, so are they, and nothing has moved."""
    async with mongo_client(domain) as client:
        documents = client[domain.database][POOL]
        await documents.create_index("expireAt", expireAfterSeconds=0)
        async with domain.agent(**SHORT) as agent:
            async with pod(domain, "amf-1") as pool:
                id_ = pool.allocate_nowait()
                async with asyncio.timeout(TTL_SECONDS):
                    while await documents.find_one({"_id": "amf-1"}) is None:
                        await asyncio.sleep(0.1)
                    before = await mongo_table(domain)
                    assert agent.task is not None
                    agent.task.cancel()
                    while await documents.find_one({"_id": "amf-1"}) is not None:
                        await asyncio.sleep(0.1)
                async with domain.agent(**SHORT), asyncio.timeout(TTL_SECONDS):
                    while await documents.find_one({"_id": "amf-1"}) is None:
                        await asyncio.sleep(0.1)
                    await eventually(lambda: pool.synced)
                    after = await mongo_table(domain)
                    assert {n: after.get(n) for n in before} == before
                    await eventually(lambda: pool.valid(id_))
                    assert await pool.allocate(timeout=SEEN_SECONDS)


async def test_of_two_hundred_pods_one_goes_away_and_exactly_one_other_claims_each_chunk(
    domain: Domain,
) -> None:
    """The original's wish: all others would claim, exactly one succeeds."""
    async with domain.served(**NONE_EXPIRES) as asking, claims(domain) as watching:
        names = [f"amf-{i}" for i in range(200)]
        opened = await asyncio.gather(*[asking.open(name) for name in names])
        pods = [(name, answer.incarnation) for name, answer in zip(names, opened, strict=True)]
        await asyncio.gather(*[asking.renew(*pod) for pod in pods])
        granted = await asking.acquire(*pods[0], count=20)
        await asking.ask(asking.subjects.session("close"), m.SessionRef(*pods[0]), m.Empty)
        await within(watching.gather({n for n, _ in granted.chunks}), PODS_AT_ONCE_SECONDS)
        await watching.settle()
        assert {len(owners) for owners in watching.owners.values()} == {1}
        assert len({owners[0] for owners in watching.owners.values()}) == 20  # one each
        await asking.seen(lambda: sum(len(claim.chunks) for claim in asking.of(m.ChunkClaimed)) >= 20)
        assert await orphans_of(asking) == 0


async def test_each_life_of_a_name_has_a_higher_incarnation_than_those_before(
    domain: Domain, tmp_path: Path
) -> None:
    """The original's wished-for restart counter: in place, and with another address."""
    lives = []
    async with domain.agent():
        for _ in range(3):
            async with pod_process(domain, "amf-1", tmp_path) as process:
                lives.append((await process.heard("joined"))["incarnation"])
                process.kill()
        async with pod(domain, "amf-1", "10.0.0.9") as pool:
            (mine,) = [owner for owner in pool.pods() if owner.state == "live" and owner.ip != "127.0.0.1"]
            lives.append(mine.incarnation)
    assert lives == sorted(set(lives))


async def test_a_pod_that_restarts_in_place_has_fresh_chunks_while_its_old_lease_still_runs(
    domain: Domain, tmp_path: Path
) -> None:
    """It need not wait for `L`, here longer than any of the waits; only its old chunks do."""
    long = {"liveness_ttl": 3 * SEEN_SECONDS, "allocation_ttl": 300.0}
    async with domain.served(**SMALL_CHUNKS, **long, **ONE_LEAD) as asking:
        async with pod_process(domain, "amf-1", tmp_path) as first:
            old = (await first.ask("allocate 10", "allocated"))["chunks"]
            first.kill()
        async with pod_process(domain, "amf-1", tmp_path) as second:
            new = (await second.ask("allocate 10", "allocated"))["chunks"]
            assert not set(old) & set(new)
            await asking.seen(lambda: asking.of(m.PodDown))
            assert [down.reason for down in asking.of(m.PodDown)] == ["superseded"]
            assert not asking.of(m.ChunkClaimed)


async def test_a_second_life_at_another_address_has_fresh_chunks_and_then_those_of_its_name(
    domain: Domain, tmp_path: Path
) -> None:
    """As in a StatefulSet: same name, new IP. It gets the old chunks although another pod has fewer."""
    async with (
        domain.served(**SMALL_CHUNKS, liveness_ttl=2.5) as asking,
        pod(domain, "amf-2"),
        AsyncExitStack() as until_superseded,
    ):
        async with pod_process(domain, "amf-1", tmp_path) as first:
            old = set((await first.ask("allocate 50", "allocated"))["chunks"])
            life = "amf-1", (await first.heard("joined"))["incarnation"]
            # Else it would be over by `L` where the second life takes longer than that to begin.
            await until_superseded.enter_async_context(renewing(asking, life))
            first.kill()
        async with pod(domain, "amf-1", "10.0.0.9") as second:
            fresh = await second.allocate()
            assert fresh >> 10 not in old
            await asking.seen(lambda: {n for claim in asking.of(m.ChunkClaimed) for n in claim.chunks} >= old)
            allocated = {(e.owner.name, e.owner.ip): e.owner for e in asking.of(m.ChunkAllocated)}
            mine = allocated["amf-1", "10.0.0.9"]
            assert {claim.owner for claim in asking.of(m.ChunkClaimed)} == {mine}
            assert {claim.previous for claim in asking.of(m.ChunkClaimed)} == {
                allocated["amf-1", "127.0.0.1"]
            }
            assert {(await mongo_table(domain))[n] for n in old} == {("amf-1", mine.incarnation)}
