"""MongoDB goes away, loses its majority or its oplog; leaders crash and leave. What is seen of it.

Longer: `OUTAGE_SECONDS=600 pytest tests/integration/test_outages.py -k gone`.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from pymongo import AsyncMongoClient
from structlog.testing import capture_logs

from drsm_agent import feed
from drsm_agent.embedded import Mongod, Scratch, Stack, start_nats_server
from drsm_agent.embedded.binaries import find_mongod
from drsm_agent.service import running
from drsm_agent.store import replica_set
from drsm_sdk import Demux, Drsm, Pod, Pool
from drsm_sdk.wire import messages as m
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    Domain,
    Failed,
    Requester,
    demuxes_equal_mongodb,
    eventually,
    mongo_client,
    requester,
    within,
)
from tests.integration.test_leadership import go_chunk, go_keepalive
from tests.integration.test_start import EXIT_OK, agent_process, answer_of

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "20"))
DEADLINE_SECONDS = 9.0
"""The agent answers within 8 s (`endpoints.HANDLER_TIMEOUT`), or does not listen at all."""
LEADING_SECONDS = 13.0
"""`T`: a leader goes on for two thirds of it without MongoDB at least, some seconds longer than the 5 s of an
operation, and for nearly all of it at most, some seconds shorter than the outage."""
GROWTH_MIB = 10.0
ROLLED_SECONDS = 60.0
"""A bound against hanging: it takes some MB on the disk, and one of MongoDB's checkpoints or more."""


# --- Gone as a whole --------------------------------------------------------------------------------------


@pytest.mark.timeout(120 + OUTAGE_SECONDS)
async def test_while_mongodb_is_gone_stock_is_issued_and_requests_hear_so_and_nothing_piles_up(
    unused_tcp_port: int,
) -> None:
    """G6: pods issue, demuxes route, whoever needs the store hears so within its deadline; the agent stays,
    says why it is not ready, and does not grow. Afterwards all go on as they were."""
    async with (
        Stack() as stack,
        agent_process(
            domain := Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm"),
            DRSM_HTTP_PORT=str(unused_tcp_port),
            DRSM_ALLOCATION_TTL=str(max(300.0, 2 * OUTAGE_SECONDS)),
            DRSM_LEADER_TTL=str(LEADING_SECONDS),
        ) as process,
        aiohttp.ClientSession() as http,
        Drsm.connect(domain.nats_url, Pod("amf-1", "10.0.0.1", "nf"), prefix="drsm", timeout=20) as drsm,
        Demux.connect(domain.nats_url, POOL, prefix="drsm") as demux,
        requester(domain.nats_url, "drsm") as asking,
    ):
        pool = await drsm.join(POOL)
        url, incarnation = f"http://127.0.0.1:{unused_tcp_port}", drsm.incarnation
        (member,) = stack.mongo.members
        before = resident_mib(process.pid)
        await member.kill()
        issued, heard = await asyncio.gather(_issue(pool, demux), _ask(asking))
        assert process.returncode is None
        assert issued > OUTAGE_SECONDS
        led = heard.index("no responders")  # from when on nobody leads, as the lead cannot be renewed
        assert set(heard[led:]) == {"no responders"}
        told = heard[: heard.index("no answer")] if "no answer" in heard else heard[:led]
        assert set(told) == {"store_unavailable"}
        assert told  # the others were under way when the lead ended: then nothing is answered (R2)
        assert "silent" in await answer_of(http, f"{url}/readyz", "MongoDB")
        assert await answer_of(http, f"{url}/livez", "alive")
        assert resident_mib(process.pid) < before + GROWTH_MIB
        await member.start()
        await answer_of(http, f"{url}/readyz", "ready\n")
        leading_again = LEADING_SECONDS + SEEN_SECONDS
        ids = [await pool.allocate(timeout=leading_again) for _ in range(3000)]
        assert len(set(ids)) == 3000
        assert drsm.incarnation == incarnation
        await demuxes_equal_mongodb(domain, demux)


async def _issue(pool: Pool, demux: Demux) -> int:
    """Ids allocated, found at the demux and released during the outage: not one may fail."""
    over, issued = time.monotonic() + OUTAGE_SECONDS, 0
    while time.monotonic() < over:
        id_ = pool.allocate_nowait()
        owner = demux.owner(id_)
        assert owner
        assert owner.name == "amf-1"
        pool.release(id_)
        issued += 1
        await asyncio.sleep(0.05)
    return issued


async def _ask(asking: Requester) -> list[str]:
    """What new pods hear, five times a second, in the order in which they asked."""
    over = time.monotonic() + OUTAGE_SECONDS
    asked: list[asyncio.Task[str]] = []
    while time.monotonic() < over:
        asked.append(asyncio.create_task(_heard(asking, f"new-{len(asked)}")))
        await asyncio.sleep(0.2)
    return list(await asyncio.gather(*asked))


async def _heard(asking: Requester, name: str) -> str:
    request = m.Open(m.PodRef(name, "10.0.0.1", "i"), (POOL,), uuid4().hex)
    try:
        await asking.ask(asking.subjects.session("open"), request, m.Opened, timeout=DEADLINE_SECONDS)
    except Failed as failed:
        return failed.failure.error
    except NoRespondersError:
        return "no responders"
    except NatsTimeout:
        return "no answer"
    raise AssertionError("a session was opened although MongoDB is gone")


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


# --- Without a majority -----------------------------------------------------------------------------------


async def test_a_primary_without_a_majority_is_noticed_by_a_position_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on answering, with empty batches, for as long as it stays primary; for ever with an arbiter."""
    monkeypatch.setattr(feed, "STILL_AFTER", 3.0)
    async with Stack(mongo_members=3) as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        await _stay_primary(domain)
        primary = await stack.mongo.await_primary()
        with capture_logs() as logs:
            async with domain.agent() as agent:
                others = [member for member in stack.mongo.members if member is not primary]
                for member in others:
                    member.pause()
                try:
                    await eventually(  # of a machine that stands still itself nothing is heard for a moment
                        lambda: agent.feed.stands_still() and agent.feed.staleness() < feed.STILL_AFTER
                    )
                    assert any("stood still for" in reason for reason in agent.unready())
                    agent.measure()
                    standstill = agent.metrics.registry.get_sample_value("drsm_stream_standstill_seconds")
                    assert standstill is not None
                    assert standstill > feed.STILL_AFTER
                    await eventually(lambda: _logged(logs, "position_stands_still"))
                finally:
                    for member in others:
                        member.resume()
                await eventually(lambda: not agent.unready())
                assert _logged(logs, "position_moves_again")


async def _stay_primary(domain: Domain) -> None:
    """Have the primary stay one for a minute without its secondaries."""
    async with mongo_client(domain) as client:
        config = (await client.admin.command("replSetGetConfig"))["config"]
        config["version"] += 1
        config["settings"] |= {"electionTimeoutMillis": 60_000}
        await client.admin.command("replSetReconfig", config)


def _logged(logs: list[Any], event: str) -> list[Any]:
    return [log for log in logs if log["event"] == event]


async def test_a_set_that_lost_its_majority_and_its_primary_makes_the_agent_unready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ordinary settings the primary steps down; the agent recovers by itself."""
    async with Stack(mongo_members=3) as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        primary = await stack.mongo.await_primary()
        async with domain.agent(leader_ttl=1.0) as agent:
            others = [member for member in stack.mongo.members if member is not primary]
            for member in others:
                member.pause()
            try:
                await eventually(agent.unready)
                assert not agent.leader.leading.is_set()
            finally:
                for member in others:
                    member.resume()
            await within(agent.leader.leading.wait(), 30)
            await eventually(lambda: not agent.unready())


# --- An oplog that does not reach back ----------------------------------------------------------------------


@pytest.mark.parametrize("away", ["paused", "stopped"])
async def test_an_oplog_that_rolled_over_while_the_agent_was_away_is_told_by_a_reset(away: str) -> None:
    """What happened meanwhile nobody can replay: consumers take snapshots, and are equal to MongoDB then."""
    async with small_oplog() as domain, mongo_client(domain) as client:
        async with (
            requester(domain.nats_url, domain.prefix) as asking,
            agent_process(domain) as first,
            Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=20) as demux,
        ):
            pod = (await asking.open("amf-1")).incarnation
            await asking.acquire("amf-1", pod, 2)
            histories = {head.history for head, _ in asking.events}
            first.send_signal(signal.SIGSTOP if away == "paused" else signal.SIGTERM)
            if away == "stopped":
                await within(first.communicate())
            await client[domain.database][POOL].insert_many([go_keepalive("go-1"), go_chunk(7, "go-1")])
            await roll_the_oplog(client)
            if away == "paused":
                first.send_signal(signal.SIGCONT)
                await _told(domain, asking, demux, histories)
                first.send_signal(signal.SIGTERM)
                _, said = await within(first.communicate())
                assert first.returncode == EXIT_OK
                assert b"position_lost" in said
                assert b"reading everything anew" in said
            else:
                async with agent_process(domain):
                    await _told(domain, asking, demux, histories)


async def _told(domain: Domain, asking: Requester, demux: Demux, histories: set[str]) -> None:
    await asking.seen(lambda: {head.history for head, _ in asking.events} - histories)
    assert len(asking.of(m.Reset)) >= 2
    await demuxes_equal_mongodb(domain, demux)
    assert demux.chunks()[7].name == "go-1"


@asynccontextmanager
async def small_oplog() -> AsyncIterator[Domain]:
    """A replica set with an oplog of 1 MB, which is cut at each of its checkpoints, every second."""
    async with Scratch() as scratch:
        options = ("--replSet", "rs0", "--oplogSize", "1", "--syncdelay", "1")
        member = Mongod(scratch, find_mongod(), options=options)
        await member.start()
        await replica_set.initiate([member.address], "rs0", 2000)
        url = f"mongodb://{member.address}/?replicaSet=rs0"
        await replica_set.await_primary(url, SEEN_SECONDS)
        nats = await start_nats_server(scratch)
        yield Domain(url, nats.url, "drsm", "drsm")


async def roll_the_oplog(client: AsyncMongoClient[dict[str, Any]]) -> None:
    """Write until nothing is left of what the oplog has now."""
    oplog = client["local"]["oplog.rs"]
    newest = await oplog.find_one({}, sort=[("$natural", -1)])
    assert newest
    async with asyncio.timeout(ROLLED_SECONDS):
        while (oldest := await oplog.find_one({}, sort=[("$natural", 1)])) and oldest["ts"] <= newest["ts"]:
            await client["filler"]["x"].insert_one({"x": "x" * 300_000})


# --- Who leads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "after"), [(signal.SIGKILL, "first"), (signal.SIGTERM, "")], ids=["crash", "SIGTERM"]
)
async def test_a_leader_that_ends_is_followed_soon(domain: Domain, sent: signal.Signals, after: str) -> None:
    """Within `T` and a second after a crash; here twice that, as the machine may be busy. One that leaves in
    good order gives the lead up: its record names nobody, and nobody has to wait for `T`. The standby's log
    says whom it follows, and that it leads now."""
    with capture_logs() as logs:
        async with (
            requester(domain.nats_url, domain.prefix) as asking,
            agent_process(domain, DRSM_AGENT_ID="first") as process,
        ):
            await asking.seen(lambda: asking.events)
            async with running(domain.settings()) as standby:
                await eventually(lambda: _logged(logs, "following"))
                began = time.monotonic()
                process.send_signal(sent)
                await within(standby.leader.leading.wait())
                took = time.monotonic() - began
    (following,), (won,) = _logged(logs, "following"), _logged(logs, "lead_won")
    assert following["leader"].startswith("first-")
    assert (following["term"], won["term"]) == (1, 2)
    assert won["after"].partition("-")[0] == after
    assert took < 2 * (domain.settings().leader_ttl + 1.0)
