"""The examples of several ids for one session: as processes, with a real collection of contexts."""

import asyncio
import importlib.util
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from drsm_agent.embedded import Process, Scratch
from drsm_agent.settings import PoolSettings
from drsm_sdk import Demux, Drsm, Pod, testing
from drsm_sdk.wire.definition import Definition
from tests.acceptance.test_agent_commands import AGENT, command, until_ready
from tests.harness import PROCESS_SECONDS, SEEN_SECONDS, Domain, eventually, mongo_client

EXAMPLES = Path(__file__).parents[2] / "examples"
POOLS = EXAMPLES / "pools.json"


@dataclass(frozen=True)
class Example:
    """A program, the spaces of its sessions, and how many bits of a block each shall have here: so few that
    a claimed chunk is soon issued from."""

    name: str
    spaces: dict[str, int]

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = [pool for pool in json.loads(POOLS.read_text()) if pool["name"] == self.name]
        spaces = [space | {"block_bits": self.spaces[space["name"]]} for space in pool["spaces"]]
        return dict(pool | {"spaces": spaces, "quarantine_ms": 0, "usage_lag_ms": 1000})


AMF = Example("amf", {"ngapid": 5, "tmsi": 6})
SMF = Example("smf", {"seid": 6, "ue_ip": 5})


class Run:
    """One pod's process."""

    def __init__(self, scratch: Scratch, domain: Domain, example: Example, name: str) -> None:
        environment = {
            "DRSM_NATS_URL": domain.nats_url,
            "DRSM_SUBJECT_PREFIX": domain.prefix,
            "CONTEXTS_URL": domain.mongo_url,
            "CONTEXTS_DATABASE": f"{domain.database}_contexts",
            "SESSIONS_PER_SECOND": "50",
            "SESSIONS_MAX": "100000",
            "HOSTNAME": name,
            "POD_IP": "10.0.0.1",
            "POD_INSTANCE": "test",
            "PYTHONUNBUFFERED": "1",
        }
        program = [sys.executable, str(EXAMPLES / f"{example.name}.py")]
        self.process = Process(scratch, name, program, environment)

    def sessions(self) -> list[tuple[str, ...]]:
        """The ids of each session, as text, in the order in which they were issued."""
        lines = self.process.log_since(0).splitlines(keepends=True)
        return [
            tuple(line.split()[1:]) for line in lines if line.startswith("session ") and line.endswith("\n")
        ]

    async def until(self, holds: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(PROCESS_SECONDS):
                while not holds():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"{self.process.name}: {self.process.log_tail()}")


@pytest.mark.parametrize("example", [AMF, SMF], ids=lambda example: example.name)
async def test_all_ids_of_a_session_move_to_one_owner_and_none_is_issued_again(
    domain: Domain, example: Example
) -> None:
    """One pod is killed: all ids of each of its sessions have one new owner, the same for all. After hold and
    scan that one goes on in the claimed chunks, with other ids."""
    first, second = example.spaces
    async with AsyncExitStack() as stack:
        scratch = await stack.enter_async_context(Scratch())
        await stack.enter_async_context(domain.agent(pools=[example.pool], allocation_ttl=4.0))
        demux = await stack.enter_async_context(
            Demux.connect(domain.nats_url, example.name, prefix=domain.prefix, timeout=SEEN_SECONDS)
        )
        dying, survivor = (Run(scratch, domain, example, f"{example.name}-{i}") for i in (1, 2))
        for run in (dying, survivor):
            await run.process.start()
            stack.push_async_callback(run.process.stop)

        def owners(session: tuple[str, ...]) -> tuple[str | None, ...]:
            asked = [int(text) if text.isdigit() else text for text in session]
            found = [demux.owner(id_, space=s) for id_, s in zip(asked, example.spaces, strict=True)]
            return tuple(owner.name if owner else None for owner in found)

        def chunk(session: tuple[str, ...]) -> int | None:
            return demux.definition.chunk_of(int(session[0]), first)

        for run in (dying, survivor):
            await run.until(lambda: len(run.sessions()) > 70)  # noqa: B023
        await dying.process.kill()
        lost, kept = dying.sessions(), survivor.sessions()
        await eventually(lambda: {owners(session) for session in lost} == {(survivor.process.name,) * 2})
        assert {owners(session) for session in kept} == {(survivor.process.name,) * 2}
        for session in lost + kept:
            assert chunk(session) == demux.definition.chunk_of(
                int(session[1]) if session[1].isdigit() else session[1], second
            )
        claimed = {chunk(session) for session in lost}
        await survivor.until(lambda: any(chunk(new) in claimed for new in survivor.sessions()))
        await survivor.process.stop()
        assert survivor.process.returncode == 0
        assert "left" in survivor.process.log_tail()
        issued = lost + survivor.sessions()
        for ids in zip(*issued, strict=True):
            assert len(set(ids)) == len(issued)
        async with mongo_client(domain) as client:
            database = client[f"{domain.database}_contexts"]
            (collection,) = await database.list_collection_names()
            untold = await database[collection].count_documents({}) - len(issued)
            assert untold in {0, 1, 2}  # each pod may have ended between keeping a session and telling of it
            indexes = await database[collection].index_information()
            assert {f"{first}_1", f"{second}_1"} < set(indexes)


def loaded(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Unreadable:
    """Contexts that can be written but not read."""

    def __init__(self, error: Exception) -> None:
        self.tries, self._error = 0, error

    def fail(self) -> None:
        self.tries += 1
        raise self._error


class UnreadableDocuments(Unreadable):
    async def add(self, ids: dict[str, Any], pod: str) -> None: ...

    async def all(self) -> None:
        self.fail()


class UnreadableFile(Unreadable):
    def add(self, id_: int) -> None: ...

    def in_use(self) -> None:
        self.fail()


@pytest.mark.parametrize(
    ("name", "contexts", "arguments"),
    [
        ("amf", UnreadableDocuments(AutoReconnect("no primary")), ("amf-1",)),
        ("smf", UnreadableDocuments(AutoReconnect("no primary")), ("smf-1",)),
        ("pod", UnreadableFile(sqlite3.OperationalError("database is locked")), ()),
    ],
    ids=["amf", "smf", "pod"],
)
async def test_an_example_works_on_while_its_contexts_cannot_be_read(
    name: str, contexts: Unreadable, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would leave, give up its session, and all that it serves would move."""
    program = loaded(name)
    for setting in ("SESSIONS_PER_SECOND", "IDS_PER_SECOND"):
        monkeypatch.setattr(program, setting, 1000.0, raising=False)
    pools = {pool["name"]: PoolSettings(**pool).definition for pool in json.loads(POOLS.read_text())}
    pool_name = program.POOL
    definition = pools.get(pool_name, Definition(name=pool_name))
    async with testing.Domain(definition) as domain, domain.drsm(Pod(f"{name}-1", "10.0.0.1", "i")) as drsm:
        working = asyncio.create_task(program.work(await drsm.join(pool_name), contexts, *arguments))
        await eventually(lambda: contexts.tries >= 3 or working.done())
        assert not working.done(), working.exception()
        working.cancel()


async def test_dev_serves_the_pools_of_the_examples() -> None:
    """As examples/README.md says it is started."""
    async with command(AGENT, "dev", DRSM_POOLS=POOLS.read_text()) as process:
        urls = await until_ready(process)
        pod = Pod("smf-1", "10.0.0.1", "i")
        async with Drsm.connect(urls["NATS"], pod, timeout=SEEN_SECONDS) as drsm:
            pool = await drsm.join("smf")
            assert set(await pool.allocate_set()) == {"seid", "ue_ip"}
            assert pool.definition.parts[1].ranges == ("10.45.0.0/16",)
