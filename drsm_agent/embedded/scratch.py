"""A temporary directory and the processes that live in it: gone together, however the owner ends.

The cleaning is not done here but by the undertaker, for a normal end just as for a SIGKILL of this
process: one way out, taken by every run, instead of a second one that only accidents would try.
"""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from drsm_agent.embedded import undertaker
from drsm_agent.embedded.errors import EmbeddedError

UNDERTAKER_SECONDS = 30.0


class Scratch:
    """`async with Scratch() as scratch:`; after it no process and no file of it is left.

    After an exception the logs are kept, and a note on the exception says where.
    """

    path: Path
    """The directory; logs lie in it, everything else in `data` below it."""

    data: Path

    def __init__(self) -> None:
        self._children: list[asyncio.subprocess.Process] = []
        self._names: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._undertaker = await _start_undertaker()
        try:
            self.path = await self._told_path()
            self.data = self.path / "data"
            self.data.mkdir()
        except BaseException:
            self._lifeline.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception)  # cancellation and Ctrl-C are no failures
        await self._close(keep=failed)
        if error is not None and failed:
            error.add_note(f"The servers' logs are kept in {self.path}")

    async def spawn(
        self, argv: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        """Start a marked process in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        with log.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                env={**os.environ, **environment, undertaker.MARK: str(self.path)},
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def home(self, name: str) -> Path:
        """A new directory of this name, or with a number when there is one: two of a kind are never mixed."""
        self._names[name] += 1
        home = self.data / (name if self._names[name] == 1 else f"{name}-{self._names[name]}")
        home.mkdir()
        return home

    @property
    def _lifeline(self) -> asyncio.StreamWriter:
        """What the undertaker waits for the end of."""
        return cast("asyncio.StreamWriter", self._undertaker.stdin)

    async def _told_path(self) -> Path:
        stdout = cast("asyncio.StreamReader", self._undertaker.stdout)
        async with asyncio.timeout(UNDERTAKER_SECONDS):
            line = await stdout.readline()
        if not line:
            code = await self._undertaker.wait()
            raise EmbeddedError(
                f"Expected the path of a new temporary directory, but {undertaker.__file__} ended with "
                f"code {code}. Its message is above; is the place for temporary files (TMPDIR) writable?"
            )
        return Path(os.fsdecode(line.removesuffix(b"\n")))

    async def _close(self, *, keep: bool) -> None:
        """Begin the cleaning, which takes no await and so cannot be interrupted; then wait for its end."""
        if keep:
            self._lifeline.write(undertaker.KEEP)
        self._lifeline.close()
        if await self._undertaker.wait() != 0:  # it was killed: do its work
            await asyncio.to_thread(undertaker.bury, self.path, keep=keep)
        for child in self._children:
            await child.wait()


async def _start_undertaker() -> asyncio.subprocess.Process:
    """Start it without a mark: a scratch within a marked process must outlive that one's burial."""
    unmarked = {name: value for name, value in os.environ.items() if name != undertaker.MARK}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", undertaker.__file__),
        stdin=PIPE,
        stdout=PIPE,
        env=unmarked,
        start_new_session=True,
    )
