"""The parts started and stopped in every order: nobody hangs, nobody complains, all find each other."""

import asyncio
import gc
import signal
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import pytest_asyncio

from drsm_agent.demo.process import PodProcess
from drsm_agent.embedded import NatsServer, ReplicaSet, Scratch, start_replica_set
from drsm_agent.embedded.binaries import find_nats_server
from drsm_agent.embedded.server import free_port
from drsm_sdk import AgentUnavailable, Demux, Drsm, Pod
from tests.harness import POOL, Domain, eventually, within
from tests.integration.test_start import EXIT_OK, agent_process

LEAVING_SECONDS = {"agent": 20.0, "mongodb": 20.0, "nats": 20.0, "pod": 2 * 8.0, "demux": 8.0}
"""What `deploy/kubernetes.yaml` gives an agent: without MongoDB it waits for the driver's time-out. The SDK
gives its goodbye 2 s, and its connection as long; there are two pods. The servers are not ours."""
STARTED_SECONDS = 60.0
"""A bound against hanging: all parts are processes that start here."""
PARTS = ("mongodb", "nats", "agent", "pod", "demux")


def orders() -> list[tuple[str, ...]]:
    """Five of the 120: each part is the first once, and as many as can be follow directly on each other."""
    chosen: list[tuple[str, ...]] = []
    seen: set[tuple[str, str]] = set()
    for first in PARTS:
        beginning = [order for order in permutations(PARTS) if order[0] == first]
        chosen.append(max(beginning, key=lambda order: len({*pairwise(order)} - seen)))
        seen |= {*pairwise(chosen[-1])}
    return chosen


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mongo_to_stop() -> AsyncIterator[ReplicaSet]:
    async with Scratch() as scratch:
        yield await start_replica_set(scratch)


@pytest.fixture
async def mongo(mongo_to_stop: ReplicaSet) -> ReplicaSet:
    """A replica set that may be stopped; the next test starts it again."""
    (member,) = mongo_to_stop.members
    if member.returncode is not None:
        await member.start()
        await mongo_to_stop.await_primary()
    return mongo_to_stop


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    """A server that does not run yet, on a port that is its own."""
    async with Scratch() as scratch:
        yield NatsServer(scratch, find_nats_server(), port=free_port())


@pytest.fixture
def near(domain: Domain, nats: NatsServer) -> Domain:
    return Domain(domain.mongo_url, nats.url, domain.database, domain.prefix)


def pod_of(near: Domain, timeout: float = STARTED_SECONDS) -> Drsm:
    return Drsm.connect(near.nats_url, Pod("amf-1", "10.0.0.1", ""), prefix=near.prefix, timeout=timeout)


def demux_of(near: Domain) -> Demux:
    return Demux.connect(near.nats_url, POOL, prefix=near.prefix, timeout=STARTED_SECONDS)


async def test_pods_and_demuxes_that_start_first_wait_for_nats_and_then_for_an_agent(
    nats: NatsServer, near: Domain
) -> None:
    """Each part comes when the one before it waits already; entering may take as long as its `timeout`."""
    async with AsyncExitStack() as entered:
        pod, demux = pod_of(near), demux_of(near)
        entering = [asyncio.create_task(entered.enter_async_context(part)) for part in (pod, demux)]
        agent = await entered.enter_async_context(agent_process(near))
        await asyncio.sleep(0.5)  # nothing tells that they wait
        await nats.start()
        await within(asyncio.gather(*entering), STARTED_SECONDS)
        pool = await pod.join(POOL)
        id_ = await pool.allocate()
        await eventually(lambda: (owner := demux.owner(id_)) and owner.name == "amf-1")
        agent.send_signal(signal.SIGTERM)
        assert await within(agent.wait()) == EXIT_OK


async def test_a_pod_that_gave_up_waiting_can_be_made_again(nats: NatsServer, near: Domain) -> None:
    """What an application does that must start without NATS: it tries again, as often as it likes."""
    for _ in range(3):
        with pytest.raises(AgentUnavailable, match="no connection to NATS"):
            await pod_of(near, timeout=0.2).__aenter__()
    await nats.start()
    async with agent_process(near), pod_of(near) as pod:
        assert (await pod.join(POOL)).allocate_nowait()


async def test_the_sdk_before_nats_before_mongodb_and_the_agent_last(
    nats: NatsServer, mongo: ReplicaSet, near: Domain
) -> None:
    """The order in which nothing finds what it needs: each part waits for those after it."""
    (member,) = mongo.members
    await member.stop()
    async with AsyncExitStack() as entered:
        pod, demux = pod_of(near), demux_of(near)
        entering = [asyncio.create_task(entered.enter_async_context(part)) for part in (pod, demux)]
        await asyncio.sleep(0.2)  # nothing tells that they wait
        await nats.start()
        await member.start()
        assert not any(task.done() for task in entering)
        await entered.enter_async_context(agent_process(near, DRSM_MONGO_URL=mongo.url))
        await within(asyncio.gather(*entering), STARTED_SECONDS)
        id_ = await (await pod.join(POOL)).allocate()
        await eventually(lambda: (owner := demux.owner(id_)) and owner.name == "amf-1")


@pytest.mark.parametrize("order", orders(), ids=", ".join)
async def test_in_whichever_order_the_parts_end_none_has_a_word_of_complaint(
    nats: NatsServer, mongo: ReplicaSet, near: Domain, tmp_path: Path, order: tuple[str, ...]
) -> None:
    """In bounded time, with exit code 0; no warning, and no traceback."""
    (member,) = mongo.members
    await nats.start()
    async with agent_process(near, DRSM_MONGO_URL=mongo.url) as agent, AsyncExitStack() as entered:
        pod, demux = pod_of(near), demux_of(near)
        await entered.enter_async_context(pod)
        await entered.enter_async_context(demux)
        assert await (await pod.join(POOL)).allocate()
        process = await PodProcess.start(
            "amf-2",
            nats=nats.url,
            pool=POOL,
            contexts=tmp_path / "contexts.sqlite",
            log=tmp_path / "amf-2.log",
            prefix=near.prefix,
        )
        await process.heard("joined")

        async def end(part: str) -> None:
            match part:
                case "mongodb":
                    await member.stop(LEAVING_SECONDS[part])
                    assert member.returncode == EXIT_OK
                case "nats":
                    await nats.stop(LEAVING_SECONDS[part])
                case "agent":
                    agent.send_signal(signal.SIGTERM)
                    _, errors = await agent.communicate()
                    assert agent.returncode == EXIT_OK
                    assert "Traceback" not in errors.decode()
                case "pod":
                    await pod.__aexit__(None, None, None)
                    assert process.process.stdin is not None
                    process.process.stdin.close()  # its way to be asked to leave
                    assert await process.process.wait() == EXIT_OK
                    await process.stop()
                    said = (tmp_path / "amf-2.log").read_text()
                    assert "Traceback" not in said
                    assert "Warning:" not in said
                case "demux":
                    await demux.__aexit__(None, None, None)

        entered.pop_all()
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            for part in order:
                await within(end(part), LEAVING_SECONDS[part])
            gc.collect()
        assert [str(complaint.message) for complaint in complaints] == []
