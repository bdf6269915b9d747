"""Snapshots on real servers: large ones while events flow, and many askers at once."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from nats.aio.msg import Msg
from pymongo.asynchronous.collection import AsyncCollection

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner
from drsm_agent.embedded import Scratch, start_nats_server
from drsm_agent.metrics import Metrics
from drsm_agent.service import Agent
from drsm_agent.snapshots import _Encoded
from drsm_sdk import Demux, Drsm, Pod
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.acceptance.test_original_list import pod_process
from tests.fault.world import start_cluster
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Requester,
    demuxes_equal_mongodb,
    eventually,
    mongo_client,
    raw,
    requester,
    within,
)
from tests.integration.test_start import agent_process

log = logging.getLogger("tests")
DEMUXES = int(os.environ.get("DEMUXES", "100"))
"""That are cut off at once; `docs/performance.md` has what 500 take."""
CHUNKS = 5000
OWNERS = 200
WAVES, ASKERS = 5, 50
LONG_NAMES = [
    Owner(f"amf-{i:059d}." + "x" * 63 + "." + "y" * 63, "10.0.0.1", "nf", 1 + i) for i in range(1000)
]


async def test_a_snapshot_is_of_one_version_while_all_chunks_change_their_owner(domain: Domain) -> None:
    """On the smallest server that is taken, so in many pages, with events between any two of them. Each chunk
    is on each snapshot once, and a demux that begins in between ends with MongoDB's table."""
    names = [".".join([f"amf-{i:059d}", "x" * 63, "y" * 63, "z" * 61]) for i in range(OWNERS)]
    owners = [Owner(name, "10.0.0.1", "nf", 1 + i) for i, name in enumerate(names)]
    inserts = [writes.allocate(POOL, n, owners[n % OWNERS], f"{n:016x}", "") for n in range(CHUNKS)]
    async with Scratch() as scratch, mongo_client(domain) as client, AsyncExitStack() as entered:
        await client[domain.database][POOL].insert_many([insert.document for insert in inserts])
        server = await start_nats_server(scratch, config="max_payload: 131072")
        small = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        asking = await entered.enter_async_context(requester(server.url, domain.prefix))
        unhurried = {"DRSM_LEADER_TTL": str(SEEN_SECONDS), "DRSM_LIVENESS_TTL": str(SEEN_SECONDS)}
        await entered.enter_async_context(agent_process(small, **unhurried))
        pod = Drsm.connect(server.url, Pod("amf-1", "10.0.0.1", ""), prefix=domain.prefix, timeout=60)
        await entered.enter_async_context(pod)
        demuxes: list[Demux] = []
        versions: set[m.Version] = {page.version for page in await asking.snapshot()}
        joining = asyncio.create_task(pod.join(POOL))
        claimed = 0
        while claimed < CHUNKS:
            claimed = sum(len(event.chunks) for event in asking.of(m.ChunkClaimed))
            if len(demuxes) < 3:
                demux = Demux.connect(server.url, POOL, prefix=domain.prefix, timeout=60)
                demuxes.append(await entered.enter_async_context(demux))
            pages = await asking.snapshot()
            assert len(pages) >= 2
            assert {page.version for page in pages} == {pages[0].version}
            assert sorted(n for page in pages for _, ns in page.chunks for n in ns)[:CHUNKS] == [
                *range(CHUNKS)
            ]
            versions.add(pages[0].version)
        assert len(versions) > 1
        await joining
        await demuxes_equal_mongodb(domain, *demuxes)


async def test_demuxes_that_lost_their_server_all_at_once_do_not_keep_the_agent_from_its_pods(
    domain: Domain, tmp_path: Path
) -> None:
    """They missed an event, so each takes a snapshot, within a second or two. No pod is declared dead."""
    gone = Owner("gone", "10.0.0.1", "nf", 1)
    inserts = [writes.allocate(POOL, n, gone, f"{n:016x}", "") for n in range(1000)]
    async with Scratch() as scratch, mongo_client(domain) as client, AsyncExitStack() as entered:
        await client[domain.database][POOL].insert_many([insert.document for insert in inserts])
        ours, theirs = await start_cluster(scratch, 2)
        near = Domain(domain.mongo_url, ours.url, domain.database, domain.prefix)
        asking = await entered.enter_async_context(requester(ours.url, domain.prefix))
        await entered.enter_async_context(agent_process(near))
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)  # a pod waits only so long for a leader
        pods = [f"amf-{i}" for i in range(3)]
        for name in pods:
            await entered.enter_async_context(pod_process(near, name, tmp_path))
        await asking.seen(lambda: sum(len(event.chunks) for event in asking.of(m.ChunkClaimed)) == 1000)
        demuxes = [Demux.connect(theirs.url, POOL, prefix=domain.prefix, timeout=60) for _ in range(DEMUXES)]
        began = time.monotonic()
        await asyncio.gather(*[entered.enter_async_context(demux) for demux in demuxes])
        log.info("%d demuxes entered within %.2f s", DEMUXES, time.monotonic() - began)
        await theirs.kill()
        late = (await asking.open("late")).incarnation
        missed = (await asking.acquire("late", late)).chunks[0][0]
        assert {demux.chunks().get(missed) for demux in demuxes} == {None}
        await theirs.start()
        began = time.monotonic()
        await within(_all_know(demuxes, missed), 60)
        log.info("all had the missed event %.2f s after their server was back", time.monotonic() - began)
        sync = len(asking.of(m.Sync))
        await asking.seen(lambda: len(asking.of(m.Sync)) > sync)
        assert {event.pod.name for event in asking.of(m.PodDown)} <= {"late"}


async def test_askers_that_are_gone_keep_no_pages_and_hold_up_no_renewal(domain: Domain) -> None:
    """Demuxes that crash while they start: each asks for many pages, at another version of the table, and
    closes its connection. Renewals are answered meanwhile, and only the last snapshot's pages are kept."""
    async with _many_pages(domain) as (small, asking, agent, chunks):
        pod = (await asking.open("amf-1", pools=("other",))).incarnation
        subject, before = asking.subjects.pool(POOL, "snapshot"), _kept()
        answered = _snapshots_answered(agent.metrics)
        for wave in range(WAVES):
            news = writes.allocate(POOL, CHUNKS + wave, LONG_NAMES[0], f"{wave:016x}", "")
            await chunks.insert_one(news.document)
            await asking.seen(lambda: len(asking.of(m.ChunkAllocated)) > wave)  # noqa: B023
            ask = f"SUB gone 1\r\nPUB {subject} gone 0\r\n\r\n".encode()
            await asyncio.gather(*[raw(small.nats_url, ask) for _ in range(ASKERS)])
            await asking.renew("amf-1", pod)
            answered += ASKERS
            await eventually(lambda: _snapshots_answered(agent.metrics) == answered)  # noqa: B023
        assert _kept() <= before


async def test_a_renewal_is_answered_ahead_of_the_pages_of_those_who_asked_before_it(domain: Domain) -> None:
    """All answers come over one connection, so their order is the order in which the agent sent them."""
    async with _many_pages(domain) as (_, asking, _, _):
        pod = (await asking.open("amf-1", pools=("other",))).incarnation
        inbox = asking.client.new_inbox()
        answers = await asking.client.subscribe(f"{inbox}.*")
        for i in range(ASKERS):
            await asking.client.publish(asking.subjects.pool(POOL, "snapshot"), reply=f"{inbox}.{i}")
        renew = codec.encode(codec.to_map(m.Renew("amf-1", pod)))
        await asking.client.publish(asking.subjects.session("renew"), renew, reply=f"{inbox}.renewed")
        arrived: list[Msg] = []
        while len([answer for answer in arrived if _is_last(answer)]) < ASKERS:
            arrived.append(await answers.next_msg(timeout=SEEN_SECONDS))
        ahead = [answer.subject for answer in arrived].index(f"{inbox}.renewed")
        assert ahead < len(arrived) / 2, (
            f"{ahead} of {len(arrived)} messages came before the renewal's answer"
        )


@asynccontextmanager
async def _many_pages(domain: Domain) -> AsyncIterator[tuple[Domain, Requester, Agent, AsyncCollection[Any]]]:
    """An agent with a pool whose snapshot takes many messages, on the smallest server that is taken."""
    inserts = [writes.allocate(POOL, n, LONG_NAMES[n % 1000], f"{n:016x}", "") for n in range(CHUNKS)]
    async with Scratch() as scratch, mongo_client(domain) as client, AsyncExitStack() as entered:
        chunks = client[domain.database][POOL]
        await chunks.insert_many([insert.document for insert in inserts])
        server = await start_nats_server(scratch, config="max_payload: 131072")
        small = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        asking = await entered.enter_async_context(requester(server.url, domain.prefix))
        pools = [{"name": POOL}, {"name": "other"}]
        agent = await entered.enter_async_context(small.agent(pools=pools, **UNHURRIED))
        assert len(await asking.snapshot()) >= 5
        yield small, asking, agent, chunks


def _is_last(answer: Msg) -> bool:
    """Of a snapshot: its end, or that there are too many askers."""
    return "pages" in codec.decode(answer.data) or m.ERROR_HEADER in (answer.headers or {})


def _snapshots_answered(metrics: Metrics) -> int:
    """Those that were refused too."""
    samples = [sample for metric in metrics.requests.collect() for sample in metric.samples]
    return sum(
        int(sample.value)
        for sample in samples
        if sample.name.endswith("_total") and sample.labels["verb"] == "snapshot"
    )


def _kept() -> int:
    gc.collect()
    return sum(isinstance(thing, _Encoded) for thing in gc.get_objects())


async def _all_know(demuxes: list[Demux], missed: int) -> None:
    while not all(demux.synced and missed in demux.chunks() for demux in demuxes):
        await asyncio.sleep(0.05)
