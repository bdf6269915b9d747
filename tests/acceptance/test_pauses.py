"""A pod process that is stopped in the middle of issuing: over every id of every process, none twice."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.harness import POOL, Domain, within

SHORT = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "bits": 18, "block_bits": 8, "usage_lag_ms": 0}]}
SEEN_SECONDS = 60.0


class Issuer:
    """A process of `issuer`, and what it wrote down."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self._log = process, log

    def lines(self, kind: str) -> list[list[str]]:
        if not self._log.exists():
            return []
        text = self._log.read_text()
        whole = text[: text.rfind("\n") + 1]  # the last one may be half written
        return [words[1:] for line in whole.splitlines() if (words := line.split())[0] == kind]

    def ids(self) -> dict[int, str]:
        """Every id with its grant; an id that was written twice fails the test."""
        issued = [(int(id_), grant) for id_, grant in self.lines("id")]
        assert len(issued) == len(dict(issued))
        return dict(issued)

    async def until(self, kind: str, count: int) -> None:
        """Wait for so many lines of a kind."""
        async with asyncio.timeout(SEEN_SECONDS):
            while len(self.lines(kind)) < count:
                await asyncio.sleep(0.02)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def issuer(domain: Domain, name: str, folder: Path) -> AsyncIterator[Issuer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.acceptance.issuer",
        *(domain.nats_url, domain.prefix, POOL, name, str(folder)),
        stdin=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdin is not None
    try:
        yield Issuer(process, folder / f"{name}.ids")
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        assert await within(process.wait()) == 0


async def test_no_id_is_issued_twice_when_a_pod_stands_still_in_the_middle_of_issuing(
    domain: Domain, tmp_path: Path
) -> None:
    """Beyond its lease: its chunks are claimed, held, scanned, and issued from by the other. Then it goes on,
    as a new incarnation."""
    async with (
        domain.agent(**SHORT),
        issuer(domain, "amf-1", tmp_path) as stopped,
        issuer(domain, "amf-2", tmp_path) as other,
    ):
        await asyncio.gather(stopped.until("id", 300), other.until("id", 1))
        stopped.stop()
        await other.until("scanned", len({id_ >> 8 for id_ in stopped.ids()}))
        taken = [n for n, _ in other.lines("scanned")]
        async with asyncio.timeout(SEEN_SECONDS):
            while not any(str(id_ >> 8) in taken for id_ in other.ids()):
                await asyncio.sleep(0.05)
        stopped.go_on()
        await stopped.until("session", 2)
        so_far = len(stopped.lines("id")), len(other.lines("id"))
        await asyncio.gather(stopped.until("id", so_far[0] + 200), other.until("id", so_far[1] + 200))
        ids, others = stopped.ids(), other.ids()
        assert not ids.keys() & others.keys()
        assert not {(n >> 8, grant) for n, grant in ids.items()} & {(n >> 8, g) for n, g in others.items()}
        lives = [int(incarnation) for (incarnation,) in stopped.lines("session")]
        assert lives == sorted(set(lives))
