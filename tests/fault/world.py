"""A world to break: three mongods, three nats-servers, two agents as processes, 20 busy pods, four demuxes.

One world serves many faults; `strike` breaks it, waits until it is whole again, and judges. Each agent has
links of its own to every server, and so have the pods that can be cut off; everybody else goes directly.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import nats
import pymongo
from nats.errors import Error as NatsError
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from drsm_agent.embedded import Mongod, NatsServer, Process, Scratch, start_nats_server, start_replica_set
from drsm_agent.embedded.server import free_port
from drsm_sdk import Demux, Drsm, Pod
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects
from tests.fault.link import Link
from tests.fault.load import LoadedPod, Record
from tests.harness import POOL, Failed, Requester

T, L, A = 1.0, 2.5, 20.0
"""The smallest leases that the agent takes; `A` longer than any outage here, as no allocation may fail."""
PODS = 20
CUTTABLE = 2
"""Pods that reach NATS by links. Two, as more at once would be spared once (rule R7)."""
AGENTS = ("agent-a", "agent-b")
HEALED_SECONDS = 30.0
"""Bound for everything to be whole again after a fault: a driver's time-out (5 s), an election (2 s), an
agent's start (3 s), its wait for the lead (2 T), a demux's six seconds until it asks, and a busy machine."""
FAULT_SECONDS = 60.0
"""Bound for a fault itself: the longest one, a rolling update, waits for two agents."""
TEST_SECONDS = FAULT_SECONDS + 6 * HEALED_SECONDS
"""Bound for one fault and all that is waited for before and after it, so that a test says what is missing."""
RESTART_SECONDS = 0.5
"""Kubernetes begins with 10 s; a crash loop shows at any pace."""
GROWTH, GROWTH_MIB = 1.3, 10.0
"""How much larger an agent may be after a fault than before it."""
RUN_GROWTH_MIB = 20.0
"""How much larger at the end of a run than after its first fault, and than the same process at its start:
ten for the lead and the busiest rows, and less than half a MiB for each of some thirty faults."""
LINE = re.compile(r"\[(?:warning|error) *\] (\w+)")
"""The event of a line of trouble in an agent's log."""
LINES_MAX = 15
"""Of one event, with all its kinds, of one agent and one fault: `repeats.py` lets five of a kind
through in half a minute."""
ASK_SECONDS = 1.0
LOOK_SECONDS = 2.0
"""Bound for one look at MongoDB, which is looked at again; what is asked once waits for the world to heal."""
REST_SECONDS = HEALED_SECONDS
"""Bound for the last request of a client that is to rest, and for giving back what it was granted."""
DATABASE, PREFIX = "sdcore", "drsm"
UES, SESSIONS = "ueip", "sessions"
POOLS = (POOL, UES, SESSIONS)
MANY = 50
"""Chunks that a client takes at a time that is there to make the agents busy."""
DEFINITIONS: list[dict[str, Any]] = [
    {"name": POOL, "bits": 22},
    {"name": UES, "kind": "ipv4", "ranges": ["10.45.0.0/16", "10.60.0.0/16"], "excluded": ["10.45.3.0/26"]},
    {
        "name": SESSIONS,
        "spaces": [
            {"name": "seid", "bits": 64, "slots": 50},
            {"name": "tmsi", "bits": 32, "slots": 50, "order": "random"},
            {"name": "ue", "kind": "ipv6", "ranges": ["2001:db8::/40"], "prefix": 64, "slots": 50},
        ],
    },
]
for _definition in DEFINITIONS:
    _definition |= {"usage_lag_ms": 0} | ({} if "spaces" in _definition else {"slots": 50})
USED_BY = (POOL, POOL, UES, SESSIONS)
"""Which pool each pod uses, in turn."""


Strike = Callable[["World"], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """`may_lose`: pods that must lose their session by it, as they are away for longer than `L`. `exits`: the
    codes with which it ends agents; whoever ends otherwise, or once more, was not meant to. `may_starve`: it
    may last longer than an application waits for an id."""

    strike: Strike
    may_lose: frozenset[str] = frozenset()
    exits: tuple[int, ...] = ()
    may_starve: bool = False


@dataclass
class Row:
    """A fault and how it went; times in seconds."""

    fault: str
    lasted: float = 0.0
    outage: float = 0.0
    """The longest time without a fresh chunk."""
    after_begin: float = 0.0
    after_end: float = 0.0
    demuxes_after_end: float = 0.0
    sessions_lost: int = 0
    exits: list[int] = field(default_factory=list)
    leaders: int = 0
    issued: int = 0
    waited: int = 0
    starved: int = 0
    longest_wait: float = 0.0
    """Of a pod that had nothing in stock, for an id."""
    rss_mib: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class AgentSlot:
    """An agent's place, as a Deployment keeps it: who ends there is started again."""

    def __init__(self, scratch: Scratch, name: str, mongo: list[Link], nats_links: list[Link]) -> None:
        self.name, self.mongo, self.nats = name, mongo, nats_links
        self.http_port = free_port()
        assert not [key for key in os.environ if key.startswith("DRSM_")], "unset these: agents would obey"
        hosts = ",".join(link.address for link in mongo)
        environment = {
            "DRSM_AGENT_ID": name,
            "DRSM_MONGO_URL": f"mongodb://{hosts}/?replicaSet=rs0",
            "DRSM_NATS_URL": ",".join(f"nats://{link.address}" for link in nats_links),
            "DRSM_MONGO_DATABASE": DATABASE,
            "DRSM_SUBJECT_PREFIX": PREFIX,
            "DRSM_POOLS": json.dumps(DEFINITIONS),
            "DRSM_LIVENESS_TTL": str(L),
            "DRSM_ALLOCATION_TTL": str(A),
            "DRSM_LEADER_TTL": str(T),
            "DRSM_HTTP_HOST": "127.0.0.1",
            "DRSM_HTTP_PORT": str(self.http_port),
        }
        self.process = Process(scratch, name, [sys.executable, "-m", "drsm_agent", "run"], environment)
        self.exits: list[int] = []
        self.kept_down = False

    @property
    def links(self) -> list[Link]:
        return [*self.mongo, *self.nats]

    async def supervise(self) -> None:
        while True:
            await self.process.start()
            self.exits.append(await self.process.wait())
            await asyncio.sleep(RESTART_SECONDS)
            while self.kept_down:
                await asyncio.sleep(0.05)

    async def ready(self) -> str:
        """What keeps it from being ready; empty when it is."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.http_port)
                writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                answer = (await reader.read()).decode()
                writer.close()
        except (OSError, TimeoutError) as error:
            return f"{self.name} does not answer: {error!r}"
        return "" if " 200 " in answer.split("\r\n", 1)[0] else f"{self.name}: {answer[-200:]!r}"

    def rss(self) -> tuple[int, float]:
        """Its process id and resident MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return self.process.pid, pages * os.sysconf("SC_PAGESIZE") / 2**20

    def log_size(self) -> int:
        return self.process.log.stat().st_size


class Churn:
    """A bare client that asks for fresh chunks and gives them back, all the time; what was not answered it
    asks again, or chunks whose grant it has not heard of would be missing in the pool. The one that asks for
    a single chunk every 0.1 s is the measure of an outage."""

    def __init__(self, asking: Requester, name: str, pool: str = POOL, count: int = 1) -> None:
        self._asking, self._name, self._pool, self._count = asking, name, pool, count
        self.successes: list[tuple[float, float]] = []
        """When it was first asked for, and when it was granted."""
        self.resting = asyncio.Event()
        self.going = asyncio.Event()
        self.going.set()
        self.reopened = -1
        self.trouble = ""
        self.ended = False
        """For whoever cancels it: nats-py's requests can swallow a cancellation on Python 3.11."""
        self._incarnation = 0
        self._request_id, self._sent = "", 0.0
        self._granted: tuple[tuple[int, str], ...] = ()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew())
            tasks.create_task(self._churn())

    async def rest(self) -> None:
        """Returns when it has nothing and waits for no answer, until it is told to go on."""
        self.going.clear()
        async with asyncio.timeout(REST_SECONDS):
            await self.resting.wait()

    def go_on(self) -> None:
        self.resting.clear()
        self.going.set()

    async def close(self) -> None:
        """While it rests: its session ends, and with it whatever it may still own. It expires where that is
        not heard."""
        incarnation, self._incarnation = self._incarnation, 0
        if incarnation:
            closing = m.SessionRef(self._name, incarnation)
            with suppress(Failed, NatsError):
                await self._asking.ask(self._asking.subjects.session("close"), closing, m.Empty)

    async def _renew(self) -> None:
        renew = self._asking.subjects.session("renew")
        while not self.ended:
            if self._incarnation:
                with suppress(Exception):
                    renewing = m.Renew(self._name, self._incarnation)
                    await self._asking.ask(renew, renewing, m.Renewed, timeout=ASK_SECONDS)
            await asyncio.sleep(0.5)

    async def _churn(self) -> None:
        while not self.ended:
            if not (self._granted or self._request_id or self.going.is_set()):
                self.resting.set()
                await self.going.wait()
                self.resting.clear()
            try:
                if not self._incarnation:
                    await self._open()
                if not self._granted:
                    await self._acquire()
                await self._release()
            except Failed as failed:
                self.trouble = str(failed)
                if failed.failure.error == "session_lost":
                    self._incarnation, self._granted = 0, ()
                if not failed.failure.retry:
                    self._request_id = ""
            except Exception as error:  # whatever a broken connection raises
                self.trouble = repr(error)
            await asyncio.sleep(0.1)

    async def _open(self) -> None:
        opened = await self._asking.open(
            self._name, request_id=self._repeated(), pools=(self._pool,), timeout=ASK_SECONDS
        )
        self._incarnation, self._request_id = opened.incarnation, ""
        self.reopened += 1

    async def _acquire(self) -> None:
        request = m.Acquire(self._name, self._incarnation, self._count, self._repeated())
        subject = self._asking.subjects.pool(self._pool, "acquire")
        granted = await self._asking.ask(subject, request, m.Acquired, timeout=ASK_SECONDS)
        self._granted, self._request_id = granted.chunks, ""
        self.successes.append((self._sent, time.monotonic()))

    async def _release(self) -> None:
        request = m.ChunkList(self._name, self._incarnation, self._granted)
        subject = self._asking.subjects.pool(self._pool, "release")
        await self._asking.ask(subject, request, m.Released, timeout=ASK_SECONDS)
        self._granted = ()

    def _repeated(self) -> str:
        """The id of the request that was not answered, or of a new one."""
        if not self._request_id:
            self._request_id, self._sent = uuid4().hex, time.monotonic()
        return self._request_id


class World:
    """Use `async with world() as w:`."""

    def __init__(self, scratch: Scratch, stack: AsyncExitStack) -> None:
        self.scratch, self._stack = scratch, stack
        self.record = Record()
        self.rows: list[Row] = []
        self.demuxes: list[Demux] = []
        self.agents: list[AgentSlot] = []
        self._churns: list[Churn] = []
        self.pod_links: list[Link] = []
        self._transports: dict[str, NatsTransport] = {}
        self._drsm: dict[str, Drsm] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._born_mib: dict[int, float] = {}
        """What each agent's process took when it was first looked at."""

    async def start(self) -> None:
        self.mongo = await start_replica_set(self.scratch, 3)
        self.nats = await start_cluster(self.scratch)
        direct = [server.url for server in self.nats]
        self.client = await self._stack.enter_async_context(
            AsyncMongoClient[dict[str, Any]](
                self.mongo.url, timeoutMS=HEALED_SECONDS * 1000, heartbeatFrequencyMS=1000
            )
        )
        for name in AGENTS:
            mongo = [await self._link(member.address) for member in self.mongo.members]
            names = {
                member.address.encode(): link.address.encode()
                for member, link in zip(self.mongo.members, mongo, strict=True)
            }
            for link in mongo:
                link.names = names
            self.agents.append(AgentSlot(self.scratch, name, mongo, await self._nats_links()))
        self._run(*(agent.supervise() for agent in self.agents))
        await self._eventually(self._agents_ready)
        self.pod_links = await self._nats_links()
        for i in range(PODS):
            urls = [f"nats://{link.address}" for link in self.pod_links] if i < CUTTABLE else direct
            await self._pod(f"amf-{i}", urls, seed=i)
        for pool in (POOL, POOL, UES, SESSIONS):
            demux = Demux.connect(direct, pool, prefix=PREFIX, timeout=20)
            self.demuxes.append(await self._stack.enter_async_context(demux))
        client = await nats.connect(
            direct,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            ping_interval=1,
            connect_timeout=1,
            error_cb=_ignore,
            pending_size=-1,
        )
        self._stack.push_async_callback(client.close)
        self._asking = Requester(client, Subjects(PREFIX))
        self.churn = Churn(self._asking, "churn")
        self._churns.append(self.churn)
        self._run(self.churn.run())
        await self._eventually(self._whole)

    async def _pod(self, name: str, urls: list[str], seed: int) -> None:
        pod = Pod(name, f"10.0.0.{seed + 1}", "nf")
        transport = self._transports[name] = NatsTransport(urls)
        connected = Drsm.connect(urls, pod, prefix=PREFIX, timeout=20, transport=transport)
        drsm = self._drsm[name] = await self._stack.enter_async_context(connected)
        used = USED_BY[seed % len(USED_BY)]
        pool = await drsm.join(used, in_use=self.record.scan_of(used))
        self._run(LoadedPod(drsm, pool, self.record, seed).run())

    async def _link(self, server: str) -> Link:
        link = Link(server)
        await link.start()
        self._stack.push_async_callback(link.stop)
        return link

    async def _nats_links(self) -> list[Link]:
        return [await self._link(server.address) for server in self.nats]

    def _run(self, *jobs: Any) -> None:
        self._tasks += [asyncio.create_task(job) for job in jobs]

    @asynccontextmanager
    async def busier(self) -> AsyncIterator[None]:
        """More clients, that take and give back many chunks of each pool at a time."""
        more = [Churn(self._asking, f"churn-{pool}-{i}", pool, MANY) for pool in POOLS for i in range(2)]
        tasks = [asyncio.create_task(churn.run()) for churn in more]
        self._churns += more
        try:
            yield
            await self.rest()
            await asyncio.gather(*[churn.close() for churn in more])
        finally:
            self._churns = [self.churn]
            for churn in more:
                churn.ended = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.go_on()

    async def rest(self) -> None:
        """Returns when no client asks for chunks any more (pods do, when they must)."""
        await asyncio.gather(*[churn.rest() for churn in self._churns])

    def go_on(self) -> None:
        for churn in self._churns:
            churn.go_on()

    async def stop(self) -> None:
        for churn in self._churns:
            churn.ended = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in [*self.pod_links, *(link for agent in self.agents for link in agent.links)]:
            link.heal()

    # --- what faults use --------------------------------------------------------------------------

    def pods_on(self, server: NatsServer) -> frozenset[str]:
        """The pods that are connected to a server, directly or by their link."""
        addresses = {
            server.address,
            *(link.address for link in self.pod_links if link.server == server.address),
        }
        return frozenset(
            name
            for name, transport in self._transports.items()
            if (client := transport._client) and (url := client.connected_url) and url.netloc in addresses
        )

    def busiest_nats(self) -> NatsServer:
        """The server with most pods."""
        return max(self.nats, key=lambda server: len(self.pods_on(server)))

    async def leader(self) -> AgentSlot:
        """The agent that the leader's record names."""
        while True:
            record = await self.client[DATABASE]["drsm_leader"].find_one({"_id": "leader"})
            for agent in self.agents:
                if record and str(record["holder"]).startswith(agent.name):
                    return agent
            await asyncio.sleep(0.05)

    async def term(self) -> int:
        record = await self.client[DATABASE]["drsm_leader"].find_one({"_id": "leader"})
        return int(record["term"]) if record else 0

    async def position_saved(self) -> None:
        """Returns when the position that is saved is younger than this call."""
        now = (await self.client.admin.command("hello"))["operationTime"]
        saved: dict[str, Any] = {}
        while int(saved.get("at", 0)) <= now.time << 32 | now.inc:
            saved = await self.client[DATABASE]["drsm_position"].find_one() or {}
            await asyncio.sleep(0.05)

    async def primary(self) -> Mongod:
        return await self.mongo.await_primary()

    async def secondary(self) -> Mongod:
        primary = await self.primary()
        return next(member for member in self.mongo.members if member is not primary)

    async def table(self, pool: str = POOL) -> dict[int, tuple[str, int]]:
        """Who owns which chunk, as MongoDB has it."""
        chunks = self.client[DATABASE][pool].find({"type": "chunk"})
        return {
            int(c["_id"].removeprefix("chunkid-")): (c["podId"], int(c["drsm"]["incarnation"]))
            async for c in chunks
        }

    # --- one fault, and the verdict -----------------------------------------------------------------

    async def strike(self, name: str, fault: Fault) -> Row:
        """Break it, wait until all is whole again, and judge. Raises AssertionError with what was wrong."""
        await self._eventually(self._whole)
        record, row = self.record, Row(name)
        record.may_lose, record.may_starve = fault.may_lose, fault.may_starve
        issued, waited, starved = record.issued, record.waited, record.starved
        lost, term = record.lost.total(), await self.term()
        record.longest_wait = 0.0
        exits = [len(agent.exits) for agent in self.agents]
        logs = [agent.log_size() for agent in self.agents]
        memory = [agent.rss() for agent in self.agents]
        begin = time.monotonic()
        async with asyncio.timeout(FAULT_SECONDS):
            await fault.strike(self)
        end = time.monotonic()
        row.lasted = end - begin
        try:
            row.after_end = await self._granted_since(end) - end
            self._measure_outage(row, begin)
            row.demuxes_after_end = await self._eventually(self._demuxes_equal) - end
        except TimeoutError:
            row.wrong.append(f"not healed within {HEALED_SECONDS} s: {await self._whole()}")
        finally:
            self.go_on()

        async def over() -> str:
            ended = sum(len(agent.exits) for agent in self.agents) - sum(exits)
            missing = len(fault.exits) - ended
            return f"{missing} agents have not ended" if missing > 0 else await self._whole()

        try:
            await self._eventually(over)
        except TimeoutError:
            row.wrong.append(f"not whole again: {await over()}")
        row.sessions_lost, row.issued = record.lost.total() - lost, record.issued - issued
        row.waited, row.starved = record.waited - waited, record.starved - starved
        row.longest_wait = record.longest_wait
        row.leaders = await self.term() - term
        for agent, before in zip(self.agents, exits, strict=True):
            row.exits += agent.exits[before:]
        if sorted(row.exits) != sorted(fault.exits):
            row.wrong.append(f"agents ended with {row.exits}, expected {list(fault.exits)}")
        row.wrong += self._memory_grown(memory, row)
        row.wrong += self._talkative(logs)
        row.wrong += [f"a task died: {task!r}" for task in self._tasks if task.done()]
        row.wrong += record.wrong
        record.wrong.clear()
        record.may_lose, record.may_starve = frozenset(), False
        self.rows.append(row)
        if row.wrong:
            said = "\n".join(
                f"--- {agent.name}\n{agent.process.log_since(at)[-6000:]}"
                for agent, at in zip(self.agents, logs, strict=True)
            )
            raise AssertionError(
                f"{name}: {len(row.wrong)} wrong\n" + "\n".join(row.wrong[:20]) + f"\n{row}\n{said}"
            )
        return row

    def _talkative(self, before: list[int]) -> list[str]:
        """Kinds of lines that an agent has said too often."""
        said = []
        for agent, at in zip(self.agents, before, strict=True):
            events = Counter(LINE.findall(agent.process.log_since(at)))
            said += [f"{agent.name} said {e} {n} times" for e, n in events.items() if n > LINES_MAX]
        return said

    def _measure_outage(self, row: Row, begin: float) -> None:
        """Before the demuxes are compared: for that nobody asks for chunks."""
        granted = [begin, *(at for _, at in self.churn.successes if at >= begin)]
        gaps = [(late - early, late) for early, late in pairwise(granted)]
        row.outage, over = max(gaps)
        row.after_begin = over - begin

    def _memory_grown(self, before: list[tuple[int, float]], row: Row) -> list[str]:
        grown = []
        for i, (agent, (pid, mib)) in enumerate(zip(self.agents, before, strict=True)):
            now_pid, now = agent.rss()
            row.rss_mib.append(round(now, 1))
            if now_pid == pid and now > mib * GROWTH + GROWTH_MIB:
                grown.append(f"{agent.name} grew from {mib:.1f} to {now:.1f} MiB")
            first = self.rows[0].rss_mib[i] if self.rows else now
            born = self._born_mib.setdefault(now_pid, now)
            if now > min(first, born) + RUN_GROWTH_MIB:
                grown.append(
                    f"{agent.name} has {now:.1f} MiB, {first:.1f} after the first fault, {born:.1f} young"
                )
        return grown

    async def _granted_since(self, moment: float) -> float:
        async with asyncio.timeout(HEALED_SECONDS):
            while True:
                if self.churn.successes and self.churn.successes[-1][0] >= moment:
                    return self.churn.successes[-1][1]
                await asyncio.sleep(0.01)

    async def _demuxes_equal(self) -> str:
        await self.rest()
        try:
            with pymongo.timeout(LOOK_SECONDS):
                tables = {pool: await self.table(pool) for pool in POOLS}
        except PyMongoError as error:
            return f"MongoDB: {error}"
        for demux in self.demuxes:
            routed = {n: owner.key for n, owner in demux.chunks().items()}
            differ = set(routed.items()) ^ set(tables[demux.pool].items())
            if not demux.synced or differ:
                synced = "" if demux.synced else "not "
                return f"a demux of {demux.pool} is {synced}synced, and differs by {len(differ)}"
        return ""

    async def _agents_ready(self) -> str:
        return " ".join([await agent.ready() for agent in self.agents]).strip()

    async def _whole(self) -> str:
        """What is still missing; empty when nothing is."""
        missing = [await self._agents_ready()]
        if not self.churn.successes or time.monotonic() - self.churn.successes[-1][1] > 1.0:
            missing.append(f"no chunk for a second, last trouble: {self.churn.trouble}")
        if self.record.waiting:
            missing.append(f"{self.record.waiting} pods wait for an id")
        missing += [
            f"{name}'s session is {drsm.state}" for name, drsm in self._drsm.items() if drsm.state != "live"
        ]
        missing += [f"demux stale for {demux.staleness:.1f} s" for demux in self.demuxes if not demux.synced]
        try:
            with pymongo.timeout(LOOK_SECONDS):
                states = (await self.client.admin.command("replSetGetStatus"))["members"]
            missing += [f"member {s['name']} is {s['stateStr']}" for s in states if s["state"] not in {1, 2}]
        except PyMongoError as error:
            missing.append(f"MongoDB: {error}")
        return "; ".join(what for what in missing if what)

    async def _eventually(self, missing: Callable[[], Awaitable[str]]) -> float:
        """Look until nothing is missing; when that was. Raises TimeoutError."""
        what = "nothing was seen"
        try:
            async with asyncio.timeout(HEALED_SECONDS):
                while what := await missing():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(what) from None
        return time.monotonic()

    def table_of_faults(self) -> str:
        """The measured times, for people and for docs."""
        columns = (
            "fault",
            "lasted",
            "longest time without a fresh chunk",
            "fresh chunk after its end",
            "demuxes equal after its end",
            "changes of leader",
            "waits for an id",
            "in vain",
            "longest",
            "sessions lost",
            "exits",
        )
        lines = [
            f"{row.fault} | {row.lasted:.1f} s | {row.outage:.1f} s | {row.after_end:.1f} s"
            f" | {row.demuxes_after_end:.1f} s | {row.leaders} | {row.waited} | {row.starved}"
            f" | {row.longest_wait:.1f} s | {row.sessions_lost} | {row.exits}"
            for row in self.rows
        ]
        return "\n".join([" | ".join(columns), " | ".join(["---"] * len(columns)), *lines])

    def report(self, file: Path) -> None:
        """All rows as JSON."""
        file.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


async def start_cluster(scratch: Scratch, servers: int = 3) -> list[NatsServer]:
    """nats-servers that are one cluster and hide each other from clients, or links would be passed by."""
    ports = [free_port() for _ in range(servers)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return [
        await start_nats_server(
            scratch,
            config=f'server_name: n{port}\nlame_duck_grace_period: "1s"\nlame_duck_duration: "30s"\n'
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, no_advertise: true, routes: [{routes}] }}\n",
        )
        for port in ports
    ]


async def _ignore(_error: Exception) -> None:
    pass


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    """A whole world; nothing is left of it afterwards."""
    async with Scratch() as scratch, AsyncExitStack() as stack:
        made = World(scratch, stack)
        try:
            await made.start()
            yield made
        finally:
            await made.stop()
