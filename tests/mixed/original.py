"""A pod of the original DRSM: a process of `gopod`, which is the real Go module and a few commands."""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness import PROCESS_SECONDS, SEEN_SECONDS
from tests.mixed.ledger import Ledger

GO = shutil.which("go")
SOURCES = Path(__file__).with_name("gopod")
STOP_SECONDS = 5.0
LINE_MAX = 2**24
"""Bytes of an answer: a million ids."""
TAIL_LINES = 15


def built() -> Path:
    """The program, built once for all processes of all runs that have the same sources. It lies where others
    cannot put one of theirs: in a folder of this user's own."""
    sources = sorted(path for path in SOURCES.iterdir() if path.is_file())
    digest = hashlib.sha256(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources))
    folder = Path(tempfile.gettempdir()) / f"drsm-gopod-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OriginalFailed(f"{folder}: expected a folder of this user's own; remove it")
    program = folder / "gopod"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _build(folder / "new")
            (folder / "new").rename(program)
    return program


def _build(program: Path) -> None:
    command = [str(GO), "build", "-o", str(program), "."]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OriginalFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


ONE_AT_A_TIME = {"GOMAXPROCS": "1"}
"""The module writes maps without a lock from several goroutines, as when it claims two chunks at once, and
Go's runtime ends a process in which two do so at the same moment. That is known (docs/migration.md), and no
test is about it."""


class OriginalFailed(Exception):
    """It could not be built, or ended, or did not answer in time, or refused a command."""


class Seen(NamedTuple):
    """Whom the Go module takes for the owner of an id."""

    name: str
    ip: str
    instance: str


class GoPod:
    """One life of a Go pod. Whatever it issues is in the ledger, whether or not somebody waits for it."""

    def __init__(self, who: Seen, process: asyncio.subprocess.Process, log: Path, ledger: Ledger) -> None:
        self.name, self.ip, self.instance = who
        self.asked: list[int] = []
        """Ids that the module has asked its callback for: it scans a chunk that it has claimed."""
        self._process, self._log, self._ledger = process, log, ledger
        self._commands = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._meant_to_end = False
        self._reader = asyncio.create_task(self._read(), name=f"read {who.name}")

    @classmethod
    async def start(
        cls,
        program: Path,
        name: str,
        *,
        ip: str,
        instance: str,
        log: Path,
        ledger: Ledger,
        environment: Mapping[str, str],
        options: Mapping[str, object],
    ) -> "GoPod":
        """A pod that is connected to MongoDB. Its first keepalive comes 5 s later."""
        given = {"name": name, "ip": ip, "instance": instance} | dict(options)
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                str(program),
                *(f"-{option}={value}" for option, value in given.items()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=LINE_MAX,
                env={**os.environ, **ONE_AT_A_TIME, **environment},
                start_new_session=True,
            )
        pod = cls(Seen(name, ip, instance), process, log, ledger)
        try:
            async with asyncio.timeout(PROCESS_SECONDS):
                await pod._started
        except BaseException:
            await pod.kill()
            raise
        return pod

    # --- Commands ------------------------------------------------------------------------------------------

    async def allocate(self, count: int = 1, timeout: float = SEEN_SECONDS) -> list[int]:
        """So many ids. Raises TimeoutError: the module looks for a number that it has not seen, for ever."""
        ids: list[int] = (await self.ask(f"allocate {count}", timeout))["ids"]
        return ids

    async def release(self, ids: Sequence[int]) -> None:
        self._ledger.release(ids)
        await self.ask(f"release {' '.join(map(str, ids))}")

    async def owners(self, ids: Sequence[int]) -> list[Seen | None]:
        """Whose the module thinks they are."""
        answer = await self.ask(f"owner {' '.join(map(str, ids))}")
        return [Seen(**owner) if owner else None for owner in answer["owners"]]

    async def owner(self, id_: int) -> Seen | None:
        (owner,) = await self.owners([id_])
        return owner

    async def delete_pod(self, instance: str) -> None:
        """As an AMF does when the NRF tells it that this instance is down."""
        await self.ask(f"delete-pod {instance}")

    async def run(self, rate: int) -> None:
        """Allocate so many ids a second, until `rest`."""
        await self.ask(f"run {rate}")

    async def rest(self) -> None:
        await self.ask("stop")

    async def ask(self, command: str, timeout: float = SEEN_SECONDS) -> dict[str, Any]:
        """The answer to a command."""
        if self._reader.done() or self._process.stdin is None:
            raise OriginalFailed(self._end())
        self._commands += 1
        number = self._commands
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(f"{command}\n".encode())
        async with asyncio.timeout(timeout):
            await self._process.stdin.drain()
            said: dict[str, Any] = await answer
        if said["event"] == "failed":
            raise OriginalFailed(f"{self.name}: {command[:80]}: {said['error']}")
        return said

    # --- Life and death ------------------------------------------------------------------------------------

    @property
    def crashed(self) -> str:
        """How it ended, if it did so by itself."""
        return self._end() if self._reader.done() and not self._meant_to_end else ""

    async def kill(self) -> None:
        """End it without a word (SIGKILL), also when it is paused. The module knows no other end."""
        self._meant_to_end = True
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
        await self._reader

    def pause(self) -> None:
        """Freeze it (SIGSTOP). Returns when all its threads stand still."""
        self._process.send_signal(signal.SIGSTOP)
        with suppress(ChildProcessError):  # it has ended
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Whatever state it is in, it is gone afterwards. Harmless for one that is."""
        if self._process.returncode is None:
            await self.kill()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._hear(json.loads(line))
        await self._process.wait()
        waits: list[asyncio.Future[Any]] = [self._started, *self._answers.values()]
        for waiting in waits:
            if not waiting.done():
                waiting.set_exception(OriginalFailed(self._end()))
                waiting.exception()  # perhaps nobody waits

    def _hear(self, said: dict[str, Any]) -> None:
        match said["event"]:
            case "started":
                self._started.set_result(None)
            case "allocated" | "issued":
                self._ledger.issue(said["ids"], self.name)
            case "asked":
                self.asked.append(said["id"])
        answer = self._answers.pop(said.get("command", 0), None)
        if answer is not None and not answer.done():
            answer.set_result(said)

    def _end(self) -> str:
        tail = "\n".join(self._log.read_text(errors="replace").rstrip().splitlines()[-TAIL_LINES:])
        return f"Go pod {self.name} ended with {self._process.returncode}. Its last words:\n{tail}"
