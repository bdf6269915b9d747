"""A request that comes again while the database has not said what became of the first one."""

import asyncio
from collections.abc import Sequence

from drsm_agent.core.table import SESSIONS
from drsm_agent.core.writes import Insert, Write
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
