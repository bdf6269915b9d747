"""Every way in which a change stream ends, on a real MongoDB: how it is counted and answered (G7)."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from nats.errors import Error as NatsError
from pymongo import AsyncMongoClient
from structlog.testing import capture_logs

from drsm_agent import patience
from drsm_agent.core.documents import Document
from drsm_agent.embedded import Mongod, Scratch, Stack, start_nats_server
from drsm_agent.embedded.binaries import find_mongod
from drsm_agent.errors import (
    DROPPED,
    OVER,
    POSITION_DEAD,
    PositionLost,
    StoreBroken,
    StoreRefused,
    StoreUnavailable,
    leaf,
)
from drsm_agent.patience import Patience
from drsm_agent.ports import Chance
from drsm_agent.service import Agent
from drsm_agent.store import mongo, replica_set
from drsm_agent.store.change_stream import ChangeStream, Start
from drsm_sdk import Demux
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
from tests.integration.test_start import EXIT_FAULT, agent_process

STREAM = ("getMore", "aggregate")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def breakable() -> AsyncIterator[Stack]:
    """Servers of which MongoDB can be told to fail."""
    async with Stack(mongo_parameters={"enableTestCommands": 1}) as stack:
        yield stack


@pytest.fixture
def domain(breakable: Stack, database: str, prefix: str) -> Domain:
    return Domain(breakable.mongo_url, breakable.nats_url, database, prefix)


@asynccontextmanager
async def failing(domain: Domain, commands: Iterable[str], mode: Any, **fault: Any) -> AsyncIterator[None]:
    """Make the agents' commands of these names fail."""
    point = {"configureFailPoint": "failCommand"}
    data = {"failCommands": list(commands), "appName": mongo.APP_NAME, **fault}
    async with mongo_client(domain) as client:
        await client.admin.command(point | {"mode": mode, "data": data})
        try:
            yield
        finally:
            await client.admin.command(point | {"mode": "off"})


def ends(agent: Agent) -> dict[tuple[str, str], int]:
    """How often each sort of end was counted, by sort and code."""
    return {
        (sample.labels["end"], sample.labels["code"]): int(sample.value)
        for metric in agent.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "drsm_stream_ends_total"
    }


@dataclass
class Served:
    """An agent that serves, a chunk that it has granted, and a demux."""

    domain: Domain
    agent: Agent
    asking: Requester
    demux: Demux

    async def acquire(self, name: str) -> m.Acquired:
        """A chunk for a new pod, once the agent answers. Raises Failed when it refuses for good reason."""
        async with asyncio.timeout(SEEN_SECONDS):
            while True:
                try:
                    opened = await self.asking.open(name)
                    return await self.asking.acquire(name, opened.incarnation)
                except Failed as failed:
                    if failed.failure.reason == "data_lost":
                        raise
                except (NatsError, TimeoutError):
                    pass
                await asyncio.sleep(0.05)

    @property
    def histories(self) -> set[str]:
        return {head.history for head, _ in self.asking.events}


@asynccontextmanager
async def served(domain: Domain) -> AsyncIterator[Served]:
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        domain.agent() as agent,
        Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as demux,
    ):
        w = Served(domain, agent, asking, demux)
        await w.acquire("amf-1")
        yield w


# --- It goes on from its position -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [({"closeConnection": True}, ""), ({"errorCode": 43}, "43"), ({"errorCode": 133}, "133")],
    ids=["network", "cursor not found", "no primary for mongos"],
)
async def test_an_interrupted_stream_goes_on_in_the_same_history(
    domain: Domain, fault: dict[str, Any], code: str
) -> None:
    """Counted as such; nobody needs a snapshot."""
    async with served(domain) as w:
        async with failing(domain, ["getMore"], {"times": 1}, **fault):
            await eventually(lambda: ends(w.agent) == {("interrupted", code): 1})
        await w.acquire("amf-2")
        await demuxes_equal_mongodb(w.domain, w.demux)
        assert len(w.histories) == 1


async def test_a_cursor_that_an_operator_killed_is_opened_again(domain: Domain) -> None:
    """As `killOp` and `killCursors` do it."""
    async with served(domain) as w, mongo_client(domain) as client:
        ours: list[dict[str, Any]] = [
            {"$currentOp": {"idleCursors": True, "allUsers": True}},
            {"$match": {"ns": {"$regex": f"^{domain.database}."}, "cursor.tailable": True}},
        ]
        async with asyncio.timeout(SEEN_SECONDS):
            while not ends(w.agent):
                async for operation in await client.admin.aggregate(ours):
                    cursor = operation["cursor"]["cursorId"]
                    await client[domain.database].command("killCursors", "$cmd.aggregate", cursors=[cursor])
        assert {end for end, _ in ends(w.agent)} == {"interrupted"}
        await w.acquire("amf-2")
        await demuxes_equal_mongodb(w.domain, w.demux)
        assert len(w.histories) == 1


# --- Everything is read anew ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [136, 260, 280, 286, 464, 50811])
async def test_a_dead_position_is_answered_by_a_new_history(domain: Domain, code: int) -> None:
    """Consumers hear a `reset`, end up equal to MongoDB, and the log says what happened. Nobody led for the
    moment that it took, and not since before this lead."""
    async with served(domain) as w:
        w.agent.leader._campaign.led_at -= 3600  # it has led for an hour
        leaderless: list[float] = []

        def read_anew() -> bool:
            leaderless.append(w.agent.leader.leaderless())
            return len(w.asking.of(m.Reset)) == 2

        with capture_logs() as logs:
            async with failing(domain, ["getMore"], {"times": 1}, errorCode=code):
                await eventually(read_anew)
        assert max(leaderless) < 3600
        assert ends(w.agent) == {(POSITION_DEAD, str(code)): 1}
        (lost,) = [log for log in logs if log["event"] == "position_lost"]
        assert (lost["end"], lost["code"], lost["action"]) == (POSITION_DEAD, code, "reading everything anew")
        await w.acquire("amf-2")
        await demuxes_equal_mongodb(w.domain, w.demux)
        assert len(w.histories) == 2


@pytest.mark.parametrize("what", ["collection", "renamed", "database"])
async def test_documents_that_are_dropped_under_the_agent_are_counted_as_that(
    domain: Domain, what: str
) -> None:
    """What then is granted, and when, `test_robustness.py` shows."""
    async with served(domain) as w, mongo_client(domain) as client:
        database = client[domain.database]
        match what:
            case "collection":
                await database.drop_collection(POOL)
            case "renamed":
                await database[POOL].rename("elsewhere")
            case "database":
                await client.drop_database(domain.database)
        await w.asking.seen(lambda: len(w.histories) >= 2)
        await eventually(w.agent.leader.leading.is_set)
        assert {end for end, _ in ends(w.agent)} == {DROPPED}
        await demuxes_equal_mongodb(w.domain, w.demux)


async def test_a_cursor_that_is_over_without_a_reason_is_answered_by_a_new_history(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drop whose events a filter hides: MongoDB ends the cursor, and says nothing. Opened again right after
    its last token, the stream would only end again."""
    whole = ChangeStream.pipeline
    changes = {"$match": {"operationType": {"$in": ["insert", "replace", "update", "delete"]}}}

    def hiding(stream: ChangeStream, start: Start) -> list[Document]:
        return [*whole(stream, start), changes]

    monkeypatch.setattr(ChangeStream, "pipeline", hiding)
    async with served(domain) as w, mongo_client(domain) as client:
        with capture_logs() as logs:
            await client.drop_database(domain.database)
            await w.asking.seen(lambda: len(w.asking.of(m.Reset)) >= 2)
        assert ends(w.agent) == {(OVER, ""): 1}
        (lost,) = [log for log in logs if log["event"] == "position_lost"]
        assert (lost["end"], lost["action"]) == (OVER, "reading everything anew")
        await w.acquire("amf-2")
        await demuxes_equal_mongodb(w.domain, w.demux)
        assert len(w.histories) >= 2  # a third where the lead is won anew, as its record is gone, too


async def test_after_a_drop_another_end_does_not_make_chunks_look_free(domain: Domain) -> None:
    """Pods may still issue from what was dropped, however often everything is read anew since."""
    async with served(domain) as w, mongo_client(domain) as client:
        await client[domain.database].drop_collection(POOL)
        await w.asking.seen(lambda: len(w.histories) == 2)
        await eventually(w.agent.leader.leading.is_set)
        async with failing(domain, ["getMore"], {"times": 1}, errorCode=286):
            await w.asking.seen(lambda: len(w.histories) == 3)
        await eventually(w.agent.leader.leading.is_set)
        with pytest.raises(Failed) as refused:
            await w.acquire("amf-2")
        assert refused.value.failure.reason == "data_lost"


# --- The agent ends ----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REFUSED_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("commands", "code", "remedy"),
    [
        (("getMore", "aggregate"), 13, "give the user readWrite"),
        (("getMore", "aggregate"), 18, "correct user, password"),
        (("getMore", "aggregate"), 40324, "MongoDB 5.0 or newer"),
        (("getMore",), 13, "give the user readWrite"),
        (("insert", "update"), 13, "give the user readWrite"),
        (("getMore", "aggregate"), 286, "does not reach back"),
    ],
    ids=[
        "not authorised",
        "not authenticated",
        "unknown stage",
        "opens only",
        "may not write",
        "lost again and again",
    ],
)
async def test_what_no_waiting_mends_ends_the_agent_and_says_what_to_do(
    domain: Domain, commands: tuple[str, ...], code: int, remedy: str
) -> None:
    """After a bounded time without any progress; Kubernetes shows an agent that does not stay up."""
    with pytest.raises(ExceptionGroup) as ended:
        async with (
            domain.agent(leader_ttl=1.0) as agent,
            failing(domain, commands, "alwaysOn", errorCode=code),
        ):
            await within(agent.ended())
    assert isinstance(leaf(ended.value), StoreBroken)
    assert remedy in str(leaf(ended.value))


async def test_an_outage_never_ends_the_agent(domain: Domain, impatient: None) -> None:
    """Other errors may be one, however long they last; when it is over all is well, in the same history."""
    async with served(domain) as w:
        async with failing(domain, STREAM, "alwaysOn", errorCode=133):
            await eventually(lambda: sum(ends(w.agent).values()) > 2 * patience.REFUSALS_MIN)
            assert w.agent.task is not None
            assert not w.agent.task.done()
        await w.acquire("amf-2")
        assert len(w.histories) == 1


RIGHTS = [{"role": "readWrite", "db": "drsm"}]
IMPATIENT = (
    "import drsm_agent.patience as p; p.REFUSED_SECONDS = 1.0; from drsm_agent.cli import main; main()"
)


async def test_an_agent_whose_rights_are_taken_away_ends_with_a_code_and_waits_through_a_short_lapse() -> (
    None
):
    """On a MongoDB with users: the exit code is that of a fault, and one line names the rights."""
    async with Scratch() as scratch:
        nats = await start_nats_server(scratch)
        root_url, url = await _start_with_users(scratch)
        domain = Domain(url, nats.url, "drsm", "drsm")
        async with (
            AsyncMongoClient[dict[str, Any]](root_url) as root,
            requester(nats.url, "drsm") as asking,
            agent_process(domain, program=IMPATIENT) as process,
        ):
            await asking.seen(lambda: asking.events)
            await root["drsm"].command("revokeRolesFromUser", "agent", roles=RIGHTS)
            _, said = await within(process.communicate())
            assert process.returncode == EXIT_FAULT
        last = said.decode().splitlines()[-1]
        assert last.startswith("drsm-agent: gave up after")
        assert "readWrite" in last
        assert "hunter2" not in said.decode()


async def _start_with_users(scratch: Scratch) -> tuple[str, str]:
    """A replica set that asks who one is; the URLs of its root and of the agent."""
    member = Mongod(scratch, find_mongod(), options=("--replSet", "rs0"))
    await member.start()
    await replica_set.initiate([member.address], "rs0", 2000)
    plain = f"mongodb://{member.address}/?replicaSet=rs0"
    await replica_set.await_primary(plain, SEEN_SECONDS)
    async with AsyncMongoClient[dict[str, Any]](plain) as client:
        await client.admin.command("createUser", "root", pwd="hunter2", roles=["root"])
        await client["drsm"].command("createUser", "agent", pwd="hunter2", roles=RIGHTS)
    key = scratch.path / "key"
    key.write_text("c2VjcmV0")
    key.chmod(0o400)
    member.argv += ["--keyFile", str(key)]
    await member.restart()
    root = f"mongodb://root:hunter2@{member.address}/?replicaSet=rs0"
    await replica_set.await_primary(root, SEEN_SECONDS)
    return root, f"mongodb://agent:hunter2@{member.address}/drsm?replicaSet=rs0"


# --- How long is long enough -------------------------------------------------------------------------------


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_refusals_count_only_in_a_row_and_over_a_while() -> None:
    """Many at once are one mistake; one a day is none; an outage or a success in between begins anew."""
    clock = Hand()
    trying = Patience(clock, Chance())
    refused, lost, outage = StoreRefused("denied", 13), PositionLost("gone", 286), StoreUnavailable("down")
    for _ in range(10 * patience.REFUSALS_MIN):
        trying.count(refused)
    clock.now += patience.REFUSED_SECONDS
    trying.count(outage)
    trying.count(refused)
    clock.now += patience.REFUSED_SECONDS
    trying.restore()
    for error in (refused, lost) * patience.REFUSALS_MIN:
        trying.count(error)
    clock.now += patience.REFUSED_SECONDS - 0.1
    trying.count(lost)
    clock.now += 0.1
    with pytest.raises(StoreBroken, match="gave up after 12 attempts in 30 s: gone"):
        trying.count(lost)


def test_two_refusals_far_apart_are_not_the_end() -> None:
    """Such as around a pause of the process."""
    clock = Hand()
    trying = Patience(clock, Chance())
    for _ in range(patience.REFUSALS_MIN - 1):
        trying.count(StoreRefused("denied", 13))
        clock.now += 10 * patience.REFUSED_SECONDS
    with pytest.raises(StoreBroken):
        trying.count(StoreRefused("denied", 13))
