"""A request that comes again while the database has not said what became of the first one."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from drsm_agent.core.lease import Leases
from drsm_agent.core.table import SESSIONS, Table
from drsm_agent.core.writes import Insert, Write
from drsm_agent.errors import StoreUnavailable
from drsm_agent.feed import HASHES
from drsm_agent.flight import PASSENGERS_MAX
from drsm_agent.sessions import IN_DOUBT_MAX, Sessions
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import Open, PodRef
from tests.harness import POOL
from tests.simulation.loop import run
from tests.simulation.standing import Standing

WORLDS = 8


def test_a_session_whose_insert_comes_late_is_the_one_that_the_repeat_opens() -> None:
    """After the agent has looked for it in vain. Two would be two answers to one request."""
    tries = [run(_opened_late(seed)) for seed in range(WORLDS)]
    assert max(tries) > 1  # in some of these worlds the first insert came so late


async def _opened_late(seed: int) -> int:
    """How often the session was inserted, or tried to be."""
    standing = Standing(seed, [{"name": POOL}])
    inserts = 0

    def first_insert(writes: Sequence[Write]) -> bool:
        nonlocal inserts
        inserts += (inserting := any(isinstance(w, Insert) and w.space == SESSIONS for w in writes))
        return inserting and inserts == 1

    try:
        agent = await standing.start("agent")
        await agent.leader.leading.wait()
        standing.database.calm, standing.database.fates = False, ("late",)
        standing.database.doubts = first_insert  # type: ignore[method-assign]
        async with standing.pod("amf-1") as drsm:
            await drsm.join(POOL)
            await asyncio.sleep(60)
            (session,) = standing.database.documents(SESSIONS)
            assert int(session["incarnation"]) == drsm.incarnation
            return inserts
    finally:
        await standing.end()


def test_sessions_in_doubt_are_remembered_up_to_a_bound_and_the_newest_of_them() -> None:
    """Of pods that ask again and again, each time anew, while nothing is answered."""
    store, flights = Unanswered(), IN_DOUBT_MAX // PASSENGERS_MAX + 2

    async def live() -> None:
        async with asyncio.TaskGroup() as tasks:
            sessions = store.sessions(tasks)
            for flight in range(flights):
                await _opened_together(sessions, [f"{flight}-{n}" for n in range(PASSENGERS_MAX)])
            assert len(sessions._in_doubt) == IN_DOUBT_MAX
            newest, oldest = f"{flights - 1}-0", "0-0"
            before = dict(store.inserted)
            await _opened_together(sessions, [newest, oldest])
            assert store.inserted[newest] == before[newest]
            assert store.inserted[oldest] > before[oldest]
            assert len(sessions._in_doubt) == IN_DOUBT_MAX

    run(live())


async def _opened_together(sessions: Sessions, requests: Sequence[str]) -> None:
    """Requests of one flight, which hear that there was no answer."""
    opening = [Open(PodRef("amf-1", "10.0.0.1", "i"), (POOL,), request) for request in requests]
    heard = await asyncio.gather(*map(sessions.open, opening), return_exceptions=True)
    assert {type(one) for one in heard} == {StoreUnavailable}


class Unanswered:
    """A store that answers nothing, and what is in front of it. `inserted` is by request: the incarnation
    that was last."""

    def __init__(self) -> None:
        self.inserted: dict[str, int] = {}
        self._incarnation = 0

    def sessions(self, tasks: asyncio.TaskGroup) -> Sessions:
        table, definitions = Table([POOL], 1, HASHES), {POOL: Definition(name=POOL)}
        reign: dict[str, Any] = dict.fromkeys(
            ("liveness", "clock", "metrics", "use", "grants", "hearing"), None
        )
        reign |= {"table": table, "pool": table.pools.__getitem__, "definitions": definitions}
        reign |= {"relay": self, "lead": self, "leases": Leases(3.0, 300.0, 3.0)}
        parts: tuple[Any, Any] = SimpleNamespace(**reign), None
        return Sessions(*parts, tasks)

    # --- as the relay ---

    async def read_back(self) -> None:
        """The table shows nothing of it."""

    async def commit(self, decided: Sequence[Insert]) -> None:
        for write in decided:
            self.inserted[write.document["request_id"]] = int(write.document["incarnation"])
        raise StoreUnavailable("no answer")

    # --- as the lead ---

    term = 1

    def next_incarnation(self) -> int:
        self._incarnation += 1
        return self.term << 32 | self._incarnation
