"""Two live pods that were configured with one name: no id twice, and no storm."""

import asyncio
import contextlib
import logging
from collections import Counter

import pytest

from drsm_sdk import Drsm, DrsmError, Pod
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.harness import POOL, Domain, within

REQUESTS_PER_SECOND = 20
"""Of one pod: two renewals, a hundred ids (ten chunks), a snapshot with each new history; with room."""
TINY = {"pools": [{"name": POOL, "slots": 10, "usage_lag_ms": 0}]}


async def test_two_pods_of_one_name_share_no_id_and_open_ever_more_seldom(
    domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    """Each waits 1, 2, 4 s ...: in 8 s neither opens more than four times after its first."""
    caplog.set_level(logging.INFO, "drsm_sdk")
    opens: list[str] = []
    asked: Counter[str] = Counter()
    issued: dict[int, list[int]] = {1: [], 2: []}

    async def issue(number: int, drsm: Drsm) -> None:
        pool = await drsm.join(POOL, timeout=15)
        while True:
            with contextlib.suppress(DrsmError):
                issued[number].append(await pool.allocate(timeout=1))
            await asyncio.sleep(0.01)

    async with domain.served(**TINY) as asking:

        async def note(message: object) -> None:
            opens.append(codec.unpack(m.Open, message.data).request_id)  # type: ignore[attr-defined]

        async def count(message: object) -> None:
            asked[message.subject] += 1  # type: ignore[attr-defined]

        await asking.client.subscribe(asking.subjects.session("open"), cb=note)
        await asking.client.subscribe(f"{domain.prefix}.rpc.>", cb=count)
        await asking.client.flush()
        pods = [Pod("amf-1", f"10.0.0.{i}", f"i{i}") for i in (1, 2)]
        clients = [Drsm.connect(domain.nats_url, pod, prefix=domain.prefix) for pod in pods]
        async with clients[0], clients[1]:
            tasks = [asyncio.create_task(issue(number, client)) for number, client in enumerate(clients, 1)]
            try:
                await within(asyncio.wait(tasks, timeout=8.0))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    both = issued[1] + issued[2]
    assert issued[1]
    assert issued[2]
    assert len(both) == len(set(both))
    assert 3 <= len(opens) <= 2 * (1 + 4), "each first open, then after 1, 2 and 4 s, with jitter"
    assert sum(asked.values()) <= 2 * 8 * REQUESTS_PER_SECOND
    assert "superseded" in caplog.text
