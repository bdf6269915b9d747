"""Two live pods that were configured with one name: no id twice, and no storm."""

import asyncio
import contextlib
import logging
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from nats.aio.msg import Msg

from drsm_sdk import Drsm, DrsmError, Pod
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.harness import POOL, SEEN_SECONDS, Domain, eventually

REQUESTS_PER_SECOND = 20
"""Of one pod: two renewals, a hundred ids (one chunk), a snapshot with each new history; with room."""
OPENS = 5
"""Of both pods: one of them has then opened at least three times, and waited twice in between."""
FIGHT_SECONDS = 0.9 * (1 + 2)
"""What it waits at least, with jitter."""
SHORT: dict[str, Any] = {
    "liveness_ttl": 2.5,
    "allocation_ttl": 3.5,
    "pools": [{"name": POOL, "slots": 100, "usage_lag_ms": 0}],
}


class Issued:
    """The ids of both pods, none of which is ever released."""

    def __init__(self) -> None:
        self.of: dict[int, list[int]] = {1: [], 2: []}

    @property
    def all(self) -> list[int]:
        return self.of[1] + self.of[2]

    def in_use(self, first: int, last: int) -> list[int]:
        return [id_ for id_ in self.all if first <= id_ <= last]

    def chunks_of_both(self) -> set[int]:
        """From which both have issued: the one after the other."""
        one, two = [{id_ >> 10 for id_ in self.of[number]} for number in (1, 2)]
        return one & two

    async def issue(self, number: int, drsm: Drsm) -> None:
        pool = await drsm.join(POOL, in_use=self.in_use, timeout=SEEN_SECONDS)
        while True:
            with contextlib.suppress(DrsmError):
                self.of[number].append(await pool.allocate(timeout=1))
            await asyncio.sleep(0.01)


async def test_two_pods_of_one_name_share_no_id_and_open_ever_more_seldom(
    domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    """Each waits 1, 2, 4 s ..., so that five opens take three seconds at the least. Once one has left, the
    other gets its chunks, and issues what the scan says to be free."""
    caplog.set_level(logging.INFO, "drsm_sdk")
    opens: set[str] = set()
    asked: Counter[str] = Counter()
    issued = Issued()

    async def count(message: Msg) -> None:
        asked[message.subject] += 1
        if message.subject == asking.subjects.session("open"):
            opens.add(codec.unpack(m.Open, message.data).request_id)

    async with domain.served(**SHORT) as asking, AsyncExitStack() as stack:
        await asking.client.subscribe(asking.subjects.all_requests, cb=count)
        await asking.client.flush()
        pods = [Pod("amf-1", f"10.0.0.{i}", f"i{i}") for i in (1, 2)]
        staying, leaving = [
            Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS) for pod in pods
        ]
        began = asyncio.get_running_loop().time()
        await stack.enter_async_context(staying)
        async with leaving:
            tasks = [asyncio.create_task(issued.issue(i, pod)) for i, pod in ((1, staying), (2, leaving))]
            for task in tasks:
                stack.callback(task.cancel)
            await eventually(lambda: len(opens) >= OPENS and issued.of[1] and issued.of[2])
            lasted = asyncio.get_running_loop().time() - began
            assert not any(task.done() for task in tasks)
            assert lasted >= FIGHT_SECONDS
            assert sum(asked.values()) <= 2 * lasted * REQUESTS_PER_SECOND
            tasks[1].cancel()
        await eventually(issued.chunks_of_both)
        so_far = len(issued.all)
        await eventually(lambda: len(issued.all) > so_far + 50)
    assert len(issued.all) == len(set(issued.all))
    assert "superseded" in caplog.text
