"""A process that can be started, stopped, killed, paused and started again."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from drsm_agent.embedded.scratch import Scratch

STOP_SECONDS = 10.0
TAIL_LINES = 15


class Process:
    """One process of a scratch: a `home` directory, a log beside it, and a `pid` once it was started.

    `argv` and `environment` (added to our own) may be changed between two starts.
    """

    def __init__(
        self,
        scratch: Scratch,
        name: str,
        argv: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = scratch.home(name)
        self.name = self.home.name
        self.log = scratch.path / f"{self.name}.log"
        self.argv = list(argv)
        self.environment = dict(environment or {})
        self._scratch = scratch
        self._child: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The id of the newest life of this process."""
        return self._born.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; below 0 the signal that ended it."""
        return self._born.returncode

    async def start(self) -> None:
        """Start it, or start it again after its end; its log goes on."""
        if self._child is not None and self._child.returncode is None:
            raise RuntimeError(f"{self.name} runs already (pid {self.pid}): stop or kill it first")
        self._child = await self._scratch.spawn(self._command(), self.log, self.environment)

    async def wait(self) -> int:
        """Wait until it has ended."""
        return await self._born.wait()

    async def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Ask it to end (SIGTERM), wake it for that when it is paused, and kill it at the timeout."""
        # SIGTERM comes last: before it sends another signal, Popen looks whether the process has ended, and
        # takes the exit code away from asyncio, which then reports 255.
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout):
                await self.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End it without a word (SIGKILL), also when it is paused."""
        self._signal(signal.SIGKILL)
        await self.wait()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): its connections stay open and nothing answers.

        Returns when all its threads stand still, a moment after the signal was sent.
        """
        self._signal(signal.SIGSTOP)
        with suppress(ChildProcessError):  # it has ended
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    async def restart(self) -> None:
        """Kill it if it still runs, and start it again as before."""
        await self.kill()
        await self.start()

    def log_since(self, position: int) -> str:
        """What it has written from this byte on."""
        with self.log.open("rb") as log:
            log.seek(position)
            return log.read().decode(errors="replace")

    def log_tail(self) -> str:
        """The last lines it has written."""
        return "\n".join(self.log_since(0).rstrip().splitlines()[-TAIL_LINES:])

    def _command(self) -> list[str]:
        return self.argv

    @property
    def _born(self) -> asyncio.subprocess.Process:
        if self._child is None:
            raise RuntimeError(f"{self.name} was not started yet: await start() first")
        return self._child

    def _signal(self, number: signal.Signals) -> None:
        """Signal it if it still lives; to be late for a process that has ended is no fault."""
        if self._born.returncode is None:
            self._born.send_signal(number)
