"""What a pod and a demux do without asking anyone. Each sample is the mean of many calls in a row."""

import asyncio
import random
from collections import deque
from timeit import Timer
from typing import Any

from drsm_sdk import Demux, Drsm, Pod
from tests.bench.measure import Measured, Row, in_turns
from tests.bench.setting import START_SECONDS, Setting, served
from tests.bench.victim import own
from tests.harness import POOL, renewing

WITH_GC = "import gc; gc.enable()"  # `timeit` turns it off, applications do not
TABLE = 1000
"""Chunks in the table that a demux looks up in, each id in another one."""


async def pair(setting: Setting) -> list[Row]:
    """`allocate_nowait` and `release`, beside the containers that hold ids in any allocator."""
    turns, rounds = setting.scale.turns, setting.scale.rounds
    async with served(setting) as here:
        pod = Pod("pod-1", "10.0.0.1", "bench")
        connecting = Drsm.connect(here.domain.nats_url, pod, prefix=here.domain.prefix, timeout=START_SECONDS)
        async with connecting as drsm:
            pool = await drsm.join(POOL)
            ours = _timed("release(allocate())", turns, allocate=pool.allocate_nowait, release=pool.release)
            bare = "id_ = free.popleft(); used[id_] = 0.0; del used[id_]; free.append(id_)"
            raw = _timed(bare, turns, free=deque(range(1000)), used={})
            samples, beside = await in_turns(rounds, ours, raw)
    against = "bare deque and dict"
    return [Row(what="allocate + release", samples=samples, against=against, raw=beside, go="337 ns")]


async def lookup(setting: Setting) -> list[Row]:
    """`Demux.owner`, beside the dict that it looks into."""
    turns, rounds = max(setting.scale.turns // TABLE, 1), setting.scale.rounds
    async with served(setting) as here:
        incarnation = await own(here.asking, "pod-1", TABLE)
        connecting = Demux.connect(
            here.domain.nats_url, POOL, prefix=here.domain.prefix, timeout=START_SECONDS
        )
        async with renewing(here.asking, ("pod-1", incarnation)), connecting as demux:
            table = demux.chunks()
            ids = [(n << 10) + 7 for n in random.sample(sorted(table), TABLE)]
            ours = _timed("for id_ in ids: owner(id_)", turns, TABLE, ids=ids, owner=demux.owner)
            raw = _timed("for id_ in ids: get(id_ >> 10)", turns, TABLE, ids=ids, get=table.get)
            samples, beside = await in_turns(rounds, ours, raw)
    return [Row(what="owner lookup", samples=samples, against="bare dict.get", raw=beside, go="18 ns")]


def _timed(statement: str, turns: int, calls: int = 1, **names: Any) -> Measured:
    """Seconds per call of a statement that makes `calls` of them."""
    timer = Timer(statement, WITH_GC, globals=names)

    async def sample() -> float:
        await asyncio.sleep(0)  # renewals and events go on between two samples
        return timer.timeit(turns) / (turns * calls)

    return sample
