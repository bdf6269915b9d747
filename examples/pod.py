"""A network function's pod: allocates ids, keeps a context for each, releases the oldest ones.

Settings are environment variables, see README.md. It starts before NATS and the agent are there, lives on
through their restarts, and leaves in good order on SIGTERM.
"""

import asyncio
import os
import signal
import sqlite3
import sys
from contextlib import closing, suppress

from drsm_sdk import AgentUnavailable, Drsm, DrsmError, Pod, Pool, PoolEmpty, PoolExhausted, SessionLost
from drsm_sdk import changes as change

NATS_URL = os.environ.get("DRSM_NATS_URL", "nats://127.0.0.1:4222")
PREFIX = os.environ.get("DRSM_SUBJECT_PREFIX", "drsm")
POOL = os.environ.get("POOL", "amfid")
IDS_PER_SECOND = float(os.environ.get("IDS_PER_SECOND", "5"))
CONTEXTS_MAX = int(os.environ.get("CONTEXTS_MAX", "50"))
CONTEXTS_FILE = os.environ.get("CONTEXTS_FILE", "contexts.sqlite")
RETRY_SECONDS = 1.0
LOCKED_SECONDS = 0.5  # well below the pool's `W`
REPORT_SECONDS = 5.0


class Contexts:
    """The network function's own database, shared by its pods: which ids are in use, oldest first.

    The scan of a dead pod's chunk asks it, so an id must be in here within the pool's usage lag `W`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._run("CREATE TABLE IF NOT EXISTS context (nr INTEGER PRIMARY KEY, id INTEGER UNIQUE)")

    def add(self, id_: int) -> None:
        self._run("INSERT INTO context (id) VALUES (?)", id_)

    def remove(self, id_: int) -> None:
        self._run("DELETE FROM context WHERE id = ?", id_)

    def in_use(self, first: int = 0, last: int = 2**63 - 1) -> list[int]:
        return self._run("SELECT id FROM context WHERE id BETWEEN ? AND ? ORDER BY nr", first, last)

    def _run(self, statement: str, *values: int) -> list[int]:
        with closing(sqlite3.connect(self._path, timeout=LOCKED_SECONDS)) as db, db:
            return [row[0] for row in db.execute(statement, values)]


async def serve() -> None:
    while True:
        try:
            contexts = Contexts(CONTEXTS_FILE)
            async with Drsm.connect(NATS_URL, Pod.from_env(), prefix=PREFIX) as drsm:
                pool = await drsm.join(POOL, in_use=contexts.in_use)
                print(f"joined {POOL} as {drsm.pod.name}, incarnation {drsm.incarnation}")
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(tell(pool))
                    tasks.create_task(report(drsm, pool))
                    tasks.create_task(work(pool, contexts))
        except (AgentUnavailable, sqlite3.OperationalError) as error:
            # Not there yet: containers start in any order. Or the file is locked.
            print(f"waiting: {error}")
        await asyncio.sleep(RETRY_SECONDS)


async def work(pool: Pool, contexts: Contexts) -> None:
    while True:
        try:
            id_ = await pool.allocate(timeout=1.0)
            try:
                await asyncio.to_thread(contexts.add, id_)
            except sqlite3.OperationalError:  # it would not be in there within `W`: it was never issued
                with suppress(DrsmError):  # lost in this very moment
                    pool.release(id_)
        except (PoolEmpty, PoolExhausted, AgentUnavailable, SessionLost) as error:
            print(f"no id: {error}")  # the SDK works on it; contexts that are still ours go on
            await asyncio.sleep(RETRY_SECONDS)
        try:
            await forget_oldest(pool, contexts)
        except sqlite3.OperationalError as error:
            print(f"no context forgotten: {error}")  # locked; another time
        await asyncio.sleep(1 / IDS_PER_SECOND)


async def forget_oldest(pool: Pool, contexts: Contexts) -> None:
    """Of our contexts. Ours are those whose ids are: a dead pod's too once its chunk is claimed for us, but
    none of a chunk that we lost, as its new owner serves them."""
    ours = [id_ for id_ in await asyncio.to_thread(contexts.in_use) if pool.valid(id_)]
    for id_ in ours[:-CONTEXTS_MAX]:
        await asyncio.to_thread(contexts.remove, id_)
        with suppress(DrsmError):  # lost in this very moment
            pool.release(id_)


async def tell(pool: Pool) -> None:
    async for news in pool.changes():
        match news:
            case change.Gained(chunks=chunks, marked=False):
                print(f"gained chunks {list(chunks)}")
            case change.Gained(chunks=chunks, hold=hold):
                print(f"claimed chunks {list(chunks)}: their contexts are ours, no new id for {hold:.0f} s")
            case change.Scanned(chunk=n, in_use=in_use, freed=freed):
                print(f"scanned chunk {n}: {in_use} ids in use, {freed} to be issued")
            case change.SessionLost(reason=reason, chunks=chunks):
                print(f"session lost ({reason}): the contexts of chunks {list(chunks)} are not ours any more")
            case change.Lost(chunks=chunks):
                print(f"lost: the contexts of chunks {list(chunks)} are not ours any more")
            case change.SessionRenewed(incarnation=incarnation):
                print(f"session renewed, incarnation {incarnation}")
            case _:
                print(news)


async def report(drsm: Drsm, pool: Pool) -> None:
    while True:
        stats = pool.stats
        print(f"{drsm.state}: {stats.issued} ids issued, {stats.free} in stock, {stats.chunks} chunks")
        await asyncio.sleep(REPORT_SECONDS)


async def main() -> None:
    serving = asyncio.create_task(serve())
    for number in (signal.SIGTERM, signal.SIGINT):  # to cancel is to leave `async with`, which says goodbye
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving
    print("left")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DrsmError as error:
        sys.exit(f"pod: {error}")
