"""A temporary directory and the processes that live in it: gone together, however the owner ends.

The cleaning is not done here but by the undertaker, for a normal end just as for a SIGKILL of this
process: one way out, taken by every run, instead of a second one that only accidents would try.
"""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from drsm_agent.embedded import undertaker
from drsm_agent.embedded.errors import EmbeddedError

UNDERTAKER_SECONDS = 30.0


class Scratch:
    """`async with Scratch() as scratch:`; after it no process and no file of it is left.

    After an exception the logs are kept, and a note on the exception says where.
    """

    def __init__(self) -> None:
        self._children: list[asyncio.subprocess.Process] = []
        self._names: set[str] = set()

    async def __aenter__(self) -> Self:
        self._undertaker = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", undertaker.__file__, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        self.path = await self._told_path()
        self.data = self.path / "data"
        self.data.mkdir()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception)  # cancellation and Ctrl-C are no failures
        if failed and error is not None:
            error.add_note(f"The servers' logs are kept in {self.path}")
        await self._close(keep=failed)

    async def spawn(self, argv: Sequence[str], log: Path) -> asyncio.subprocess.Process:
        """Start a marked process in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        with log.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                cwd=self.path,
                env={**os.environ, undertaker.MARK: str(self.path)},
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def unique(self, name: str) -> str:
        """The name itself, or with a number when this scratch has seen it: logs and data are not mixed."""
        number, free = 1, name
        while free in self._names:
            number, free = number + 1, f"{name}-{number + 1}"
        self._names.add(free)
        return free

    async def _told_path(self) -> Path:
        stdout = self._undertaker.stdout
        assert stdout is not None  # noqa: S101 - opened as a pipe above
        async with asyncio.timeout(UNDERTAKER_SECONDS):
            line = await stdout.readline()
        if not line:
            code = await self._undertaker.wait()
            raise EmbeddedError(f"No temporary directory: its keeper ended with code {code}, see its message above")
        return Path(os.fsdecode(line.removesuffix(b"\n")))

    async def _close(self, *, keep: bool) -> None:
        """Tell the undertaker to begin, which is done in one step, and wait until it and all children are gone."""
        stdin = self._undertaker.stdin
        assert stdin is not None  # noqa: S101 - opened as a pipe above
        if keep:
            stdin.write(undertaker.KEEP)
        stdin.close()
        if await self._undertaker.wait() != 0:  # it was killed: do its work
            await asyncio.to_thread(undertaker.bury, self.path, keep=keep)
        for child in self._children:
            await child.wait()
