"""Pods as processes of their own: `python -m tests.bench.<module>`, lines of JSON on its output.

A child ends when its input does, so none outlives the process that started it.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
SAY_SECONDS = 60.0
END_SECONDS = 20.0


class Child:
    """A running child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._input = cast("asyncio.StreamWriter", process.stdin)
        self._output = cast("asyncio.StreamReader", process.stdout)

    async def says(self) -> Any:
        """The next line that it says."""
        async with asyncio.timeout(SAY_SECONDS):
            line = await self._output.readline()
        if not line:
            raise RuntimeError(f"a child ended with {await self._process.wait()}; what it said is above")
        return json.loads(line)

    def go(self) -> None:
        """Let it begin."""
        self._input.write(b"go\n")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    async def end(self) -> None:
        if self._process.returncode is None:
            self._input.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def child(module: str, **options: object) -> AsyncIterator[Child]:
    """A child that has said that it is ready."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"tests.bench.{module}", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,  # a terminal's Ctrl-C is for the parent, whose end ends this one
    )
    running = Child(process)
    try:
        await running.says()
        yield running
    finally:
        await running.end()


def say(what: object) -> None:
    """A child's line for its parent."""
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


async def told() -> str:
    """The next line of the parent; empty when there will be no more."""
    return await asyncio.to_thread(sys.stdin.readline)
