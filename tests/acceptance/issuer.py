"""A pod process that does nothing but issue ids, each written down with its grant as soon as it is issued.

`python -m tests.acceptance.issuer NATS PREFIX POOL NAME FOLDER`. Its log has a line per id, and one for
each session. Until it is told to end (its standard input ends), it goes on.
"""

import asyncio
import sys
from pathlib import Path

from drsm_sdk import Drsm, DrsmError, Pod
from drsm_sdk import changes as change
from tests.harness import SEEN_SECONDS

PAUSE = 0.005
"""Seconds between two ids: a stop hits it in the middle of issuing, and a chunk lasts some seconds."""


class Log:
    """Lines that are written at once, so that none is lost when the process is killed or stopped."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._file = (folder / f"{name}.ids").open("a", buffering=1)

    def write(self, *words: object) -> None:
        self._file.write(" ".join(map(str, words)) + "\n")

    def in_use(self, first: int, last: int) -> set[int]:
        """What any process has issued in a range: nothing is ever released here."""
        text = "".join(path.read_text() for path in self._folder.glob("*.ids"))
        issued = {int(line.split()[1]) for line in text.splitlines() if line.startswith("id ")}
        return {id_ for id_ in issued if first <= id_ <= last}


async def run(nats: str, prefix: str, name: str, where: tuple[str, Path]) -> None:
    pool_name, folder = where
    log = Log(folder, name)
    pod = Pod(name, "127.0.0.1", "issuer")
    async with Drsm.connect(nats, pod, prefix=prefix, timeout=SEEN_SECONDS) as drsm:
        pool = await drsm.join(pool_name, in_use=log.in_use)
        log.write("session", drsm.incarnation)

        async def tell() -> None:
            async for news in pool.changes():
                if isinstance(news, change.SessionRenewed):
                    log.write("session", news.incarnation)
                if isinstance(news, change.Scanned):
                    log.write("scanned", news.chunk, news.in_use)

        async def issue() -> None:
            while True:
                try:
                    id_ = pool.allocate_nowait()
                    grant = pool.grant(id_)
                except DrsmError:
                    pass
                else:
                    log.write("id", id_, grant)
                await asyncio.sleep(PAUSE)

        working = [asyncio.create_task(tell()), asyncio.create_task(issue())]
        await asyncio.to_thread(sys.stdin.read)
        for task in working:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[4], (sys.argv[3], Path(sys.argv[5]))))
