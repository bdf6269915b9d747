"""Many pods: all starting at once, one of them killed, and all idle."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median

from pymongo import AsyncMongoClient

from drsm_sdk import Demux
from drsm_sdk.wire.messages import ChunkClaimed, Join, Joined, PodDown
from tests.bench.children import Child, child
from tests.bench.measure import Row, seconds
from tests.bench.raw import RawMongo
from tests.bench.setting import START_SECONDS, Served, Setting, cpu_seconds, served
from tests.harness import POOL, Domain, Requester

SURVIVORS = 2
SEEN_SECONDS = 60.0
GO_REQUESTS_PER_POD, GO_CONNECTIONS_PER_POD = 5, "6-7"


async def start(setting: Setting) -> list[Row]:
    """From `go` to the last of all pods that has joined with stock, and what that costs the processors.

    The pods are spread over as many processes as `scale.fleet` says: one Python process that starts
    them all would measure itself.
    """
    processes, each = setting.scale.fleet
    count = processes * each
    walls, pods, clients, agents, bare, raws = [], [], [], [], [], []
    for _ in range(setting.scale.starts):
        async with served(setting) as here, fleet(here.domain, processes, each) as children:
            used, begun = cpu_seconds(here.agent.pid), time.perf_counter()
            for one in children:
                one.go()
            said = await asyncio.gather(*[one.says() for one in children])
            walls.append(time.perf_counter() - begun)
            agents.append(cpu_seconds(here.agent.pid) - used)
            pods += [took for report in said for took in report["took"]]
            clients.append(sum(report["cpu"] for report in said))
        async with served(setting) as here:
            bare.append(await seconds(_start_bare(here.asking, count)))
        async with RawMongo(setting.stack.mongo_url, f"{here.domain.database}raw") as raw:
            await raw.insert_and_see()  # connected, and the collection is there
            raws.append(await seconds(raw.insert_at_once(count)))
    against = f"{count} majority inserts at once"
    return [
        Row(what=f"{count} pods start at once: all joined", samples=walls, against=against, raw=raws),
        Row(what="- each of them", samples=pods),
        Row(what="- processor time of all pods", samples=clients),
        Row(what="- processor time of the agent", samples=agents),
        Row(what="- the same requests without the SDK", samples=bare, against=against, raw=raws),
    ]


async def kill(setting: Setting) -> list[Row]:
    """SIGKILL a pod, until a demux has seen the claim of its last chunk."""
    chunks = setting.scale.chunks
    downs, claims, totals, raws = [], [], [], []
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(served(setting))
        nats_url, prefix = here.domain.nats_url, here.domain.prefix
        (survivors,) = await stack.enter_async_context(fleet(here.domain, 1, SURVIVORS))
        survivors.go()
        await survivors.says()
        demux = await stack.enter_async_context(
            Demux.connect(nats_url, POOL, prefix=prefix, timeout=START_SECONDS)
        )
        raw = await stack.enter_async_context(RawMongo(here.domain.mongo_url, f"{here.domain.database}raw"))
        for number in range(setting.scale.kills):
            name = f"victim-{number}"
            async with child("victim", nats=nats_url, prefix=prefix, name=name, chunks=chunks) as victim:
                await victim.says()
                begun = time.perf_counter()
                victim.kill()
                down, last = await _death(demux, name, chunks)
            downs.append(down - begun)
            claims.append(last - down)
            totals.append(last - begun)
            raws.append(await seconds(raw.update_and_see(await raw.insert_many(chunks))))
    what = f"{chunks:,} chunks"
    against = f"{chunks:,} updates in one bulk + their change events"
    return [
        Row(what=f"kill -> last claim seen, {what}", samples=totals, go="21-69 s"),
        Row(what="- kill -> down seen", samples=downs),
        Row(what="- down -> last claim seen", samples=claims, against=against, raw=raws),
    ]


async def idle(setting: Setting) -> list[Row]:
    """What MongoDB is asked, and by how many connections, while pods only live. What it is asked without
    an agent (by this client, and by itself) is subtracted."""
    scale = setting.scale
    rates: dict[int, list[float]] = {}
    connections: dict[int, list[float]] = {}
    cpu: dict[int, list[float]] = {}
    async with AsyncMongoClient[dict[str, object]](setting.stack.mongo_url) as mongo:
        load = _Load(mongo, scale.window)
        nothing = [await load.sample() for _ in range(scale.windows)]
        for pods in scale.idle:
            async with served(setting) as here, _idling(here, setting, pods):
                await asyncio.sleep(scale.settle)
                used, begun = cpu_seconds(here.agent.pid), time.perf_counter()
                samples = [await load.sample() for _ in range(scale.windows)]
                cpu[pods] = [100 * (cpu_seconds(here.agent.pid) - used) / (time.perf_counter() - begun)]
            rates[pods] = [rate - median(base[0] for base in nothing) for rate, _ in samples]
            connections[pods] = [open_ - median(base[1] for base in nothing) for _, open_ in samples]
    return [
        *(
            Row(
                what=f"MongoDB requests, {pods} idle pods",
                samples=rates[pods],
                unit="/s",
                go=f"about {GO_REQUESTS_PER_POD * pods} /s" if pods else "",
            )
            for pods in scale.idle
        ),
        *(
            Row(
                what=f"MongoDB connections, {pods} idle pods",
                samples=connections[pods],
                unit="",
                go=f"{GO_CONNECTIONS_PER_POD} per pod" if pods else "",
            )
            for pods in scale.idle
        ),
        *(
            Row(what=f"agent's processor, {pods} idle pods", samples=cpu[pods], unit="%")
            for pods in scale.idle
        ),
    ]


@asynccontextmanager
async def fleet(domain: Domain, processes: int, each: int) -> AsyncIterator[list[Child]]:
    """Processes of `each` pods that wait for their `go`."""
    async with AsyncExitStack() as stack:
        common = {"nats": domain.nats_url, "prefix": domain.prefix, "pool": POOL, "count": each}
        children = [child("pods", name=f"pod-{number}", **common) for number in range(processes)]
        yield list(await asyncio.gather(*[stack.enter_async_context(one) for one in children]))


async def _start_bare(asking: Requester, pods: int) -> None:
    """What that many pods ask for at their start, on one connection that follows no events."""

    async def ask(name: str) -> None:
        incarnation = (await asking.open(name, pools=())).incarnation
        await asking.ask(asking.subjects.session("join"), Join(name, incarnation, (POOL,)), Joined)
        await asking.acquire(name, incarnation)

    await asyncio.gather(*[ask(f"bare-{number}") for number in range(pods)])


@asynccontextmanager
async def _idling(here: Served, setting: Setting, pods: int) -> AsyncIterator[None]:
    processes = min(setting.scale.fleet[0], pods)
    each = pods // processes if processes else 0
    async with fleet(here.domain, processes, each) as children:
        for one in children:
            one.go()
            await one.says()
        yield


async def _death(demux: Demux, name: str, chunks: int) -> tuple[float, float]:
    """When the demux saw the pod down, and when the last of its chunks claimed."""
    down = 0.0
    async with asyncio.timeout(SEEN_SECONDS):
        async for event in demux.events():
            match event:
                case PodDown(pod) if pod.name == name:
                    down = time.perf_counter()
                case ChunkClaimed(_, previous) if previous.name == name:
                    chunks -= len(event.chunks)
                    if chunks <= 0:
                        return down, time.perf_counter()
    raise AssertionError("the demux's events ended")


class _Load:
    """What a mongod counts, per window."""

    def __init__(self, mongo: AsyncMongoClient[dict[str, object]], window: float) -> None:
        self._mongo, self._window = mongo, window

    async def sample(self) -> tuple[float, float]:
        """(requests per second, open connections) over one window."""
        before, _ = await self._counts()
        begun = time.perf_counter()
        await asyncio.sleep(self._window)
        after, connections = await self._counts()
        return (after - before) / (time.perf_counter() - begun), connections

    async def _counts(self) -> tuple[int, int]:
        status = await self._mongo.admin.command("serverStatus")
        return int(status["network"]["numRequests"]), int(status["connections"]["current"])
