"""A pod's process, as whoever started it holds it: commands in, JSON lines out, SIGKILL at will."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

STOP_SECONDS = 5.0
LINES_MAX = 10_000
"""A demonstration or a test reads what its pods say; so much is kept for it."""


class PodSaidNo(Exception):
    """A pod ended, or did not say in time what was expected of it."""


class PodProcess:
    """One pod. `said` keeps every line; `heard` waits for the next one of a kind."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.said: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    @classmethod
    async def start(
        cls, name: str, *, nats: str, pool: str, contexts: Path, log: Path, **options: str
    ) -> "PodProcess":
        """Start a pod; it has joined once it said `joined`. Its standard error goes to `log`."""
        arguments = ["--nats", nats, "--name", name, "--pool", pool, "--contexts", str(contexts)]
        for option, value in options.items():
            arguments += [f"--{option}", value]
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "drsm_agent.demo.pod",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        return cls(name, process)

    async def tell(self, command: str) -> None:
        """Send one command line."""
        if self.process.stdin is None:
            raise PodSaidNo(f"{self.name} takes no commands")
        self.process.stdin.write(f"{command}\n".encode())
        await self.process.stdin.drain()

    async def ask(self, command: str, answer: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send a command and wait for the line that answers it."""
        seen = len(self.said)
        await self.tell(command)
        return await self.heard(answer, timeout=timeout, after=seen)

    async def heard(self, what: str, *, timeout: float = 30.0, after: int = 0) -> dict[str, Any]:
        """The first line of this kind among those after the first `after` ones."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.said[after:] if line["say"] == what), None)

        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(lambda: found() is not None or self._reader.done())
        except TimeoutError:
            pass
        if (line := found()) is None:
            state = f"ended with {self.process.returncode}" if self._reader.done() else "runs"
            raise PodSaidNo(f"{self.name} was expected to say {what!r} within {timeout:g} s; it {state}")
        return line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Ask it to leave; kill it if it does not. Harmless for one that is gone."""
        if self.process.returncode is None and self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        await self._reader

    async def _read(self) -> None:
        if self.process.stdout is None:
            return
        while (line := await self.process.stdout.readline()) and len(self.said) < LINES_MAX:
            async with self._news:
                self.said.append(json.loads(line))
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()
