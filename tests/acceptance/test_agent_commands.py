"""`drsm-agent dev` and `demo`, and the commands without their extras: as processes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from drsm_sdk import Drsm, Pod
from tests.harness import PROCESS_SECONDS, SEEN_SECONDS, within

AGENT = Path(sys.executable).with_name("drsm-agent")
DEMO_SECONDS = 110.0


@asynccontextmanager
async def command(*arguments: str | Path, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DRSM_")}
    process = await asyncio.create_subprocess_exec(
        *arguments,
        env=clean | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_ready(process: asyncio.subprocess.Process) -> dict[str, str]:
    """The URLs that `dev` prints, by the server's name."""
    assert process.stdout is not None
    urls: dict[str, str] = {}
    async with asyncio.timeout(PROCESS_SECONDS):
        while not (line := (await process.stdout.readline()).decode()).startswith("ready"):
            assert line, (await process.communicate())[1].decode()
            name, _, rest = line.strip().partition(" ")
            urls[name] = rest.strip()
    return urls


def children(pid: int, name: str) -> list[int]:
    """Processes of this name that descend from `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            inner, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if inner.partition("(")[2] == name and int(rest.split()[1]) == pid:
            found.append(int(stat.parent.name))
    return found


async def test_dev_serves_pods_until_ctrl_c(tmp_path: Path) -> None:
    async with command(AGENT, "dev", "--pool", "amfid", "--pool", "fseid") as process:
        urls = await until_ready(process)
        pod = Pod("amf-1", "10.0.0.1", "i")
        async with Drsm.connect(urls["NATS"], pod, timeout=SEEN_SECONDS) as drsm:
            assert (await (await drsm.join("fseid")).allocate()) > 0
        process.send_signal(signal.SIGINT)
        _, errors = await within(process.communicate(), PROCESS_SECONDS)
    assert process.returncode == 0
    assert "Traceback" not in errors.decode()


async def test_dev_ends_with_a_fault_when_one_of_its_servers_does() -> None:
    async with command(AGENT, "dev") as process:
        await until_ready(process)
        (server,) = children(process.pid, "nats-server")
        os.kill(server, signal.SIGKILL)
        _, errors = await within(process.communicate(), PROCESS_SECONDS)
    assert process.returncode == 1
    assert "drsm-agent: nats-server" in errors.decode()
    assert "ended with -9" in errors.decode()


async def test_dev_tells_a_mistake_before_it_starts_anything() -> None:
    async with command(AGENT, "dev", "--pool", "No Pool") as process:
        _, errors = await within(process.communicate(), PROCESS_SECONDS)
    assert process.returncode == 2
    assert "DRSM_POOLS[0]: name: expected" in errors.decode()


@pytest.mark.timeout(DEMO_SECONDS + 10)
async def test_the_demonstration_ends_with_0_and_was_seen_to_happen() -> None:
    async with command(AGENT, "demo") as process:
        out, errors = await within(process.communicate(), DEMO_SECONDS)
    assert process.returncode == 0, errors.decode()
    assert "Everything was seen to happen." in out.decode()


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [("drsm_agent.__main__", "motor", "drsm[agent]"), ("drsm_sdk.cli", "typer", "drsm[cli]")],
)
async def test_a_missing_extra_is_named(module: str, missing: str, extra: str) -> None:
    """An application that installed only the SDK has the commands all the same."""
    without = f"import sys; sys.modules['{missing}'] = None; from {module} import main; main()"
    async with command(sys.executable, "-c", without) as process:
        _, errors = await within(process.communicate(), PROCESS_SECONDS)
    assert process.returncode == 1
    assert f"{missing} is not installed" in errors.decode()
    assert f"pip install '{extra}'" in errors.decode()
    assert "Traceback" not in errors.decode()
