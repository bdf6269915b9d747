"""How long nobody serves when a leader ends, to the letter: real agents on virtual time, where nothing else
takes time but the network.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.harness import POOL
from tests.simulation.loop import VirtualLoop, run
from tests.simulation.standing import Standing

AFTER_A_CRASH = 1.0
"""Seconds beyond `T` until another agent serves."""
AFTER_SIGTERM = 0.5
MOMENTS = 20
"""The leader ends at so many moments of its lease, each in a world of its own."""


@contextmanager
def timed(loop: VirtualLoop, most: float) -> Iterator[None]:
    began = loop.time()
    yield
    assert loop.time() - began <= most


async def _ends(seed: int, leader_ttl: float, *, crash: bool) -> None:
    standing = Standing(seed, [{"name": POOL}], leader_ttl=leader_ttl, liveness_ttl=max(3.0, leader_ttl))
    try:
        first = await standing.start("first")
        await first.leader.leading.wait()
        second = await standing.start("second")
        await asyncio.sleep(1 + leader_ttl * seed / MOMENTS)
        assert not second.leader.leading.is_set()
        node, _, task = standing.agents["first"]
        with timed(standing.loop, leader_ttl + AFTER_A_CRASH if crash else AFTER_SIGTERM):
            if crash:
                node.kill()
            else:
                task.cancel()
            await second.leader.leading.wait()
    finally:
        await standing.end()


@pytest.mark.parametrize("leader_ttl", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("crash", [True, False], ids=["crash", "SIGTERM"])
def test_whenever_a_leader_ends_another_serves_in_time(leader_ttl: float, crash: bool) -> None:
    """Within `T` and a second after a crash, within half a second after SIGTERM."""
    for seed in range(MOMENTS):
        run(_ends(seed, leader_ttl, crash=crash))
