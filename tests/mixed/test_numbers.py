"""Chunk numbers beside Go pods, which never forget one: whatever number a Go pod has ever seen, it does not
try again, and when it has seen all it looks for another one for ever."""

import asyncio
from typing import Any

import pytest

from drsm_sdk.wire import messages as m
from tests.harness import NONE_EXPIRES, POOL, SEEN_SECONDS, Failed, Requester
from tests.mixed.fleet import TEST_SECONDS, Fleet
from tests.mixed.original import GoPod

pytestmark = pytest.mark.timeout(TEST_SECONDS)
NUMBERS = 16
SIXTEEN: dict[str, Any] = {"pools": [{"name": POOL, "bits": 14, "usage_lag_ms": 0}]} | NONE_EXPIRES
GO_SIXTEEN: dict[str, Any] = {"bits": 14}


class Holder:
    """A bare SDK pod that takes chunks and gives them back."""

    def __init__(self, asking: Requester, incarnation: int) -> None:
        self._asking, self._incarnation = asking, incarnation
        self._requests = 0

    @classmethod
    async def open(cls, asking: Requester) -> "Holder":
        incarnation = (await asking.open("amf-2")).incarnation
        await asking.renew("amf-2", incarnation)
        return cls(asking, incarnation)

    async def take(self) -> tuple[int, str]:
        self._requests += 1
        while True:
            try:
                granted = await self._asking.acquire("amf-2", self._incarnation, 1, f"r{self._requests}")
            except Failed as failed:
                if failed.failure.reason != "settling":  # as for 5 s after an agent has begun to look
                    raise
                await asyncio.sleep(0.1)
            else:
                (chunk,) = granted.chunks
                return chunk

    async def take_all(self) -> list[tuple[int, str]]:
        """Until the pool is exhausted."""
        taken: list[tuple[int, str]] = []
        try:
            while len(taken) <= NUMBERS:
                taken.append(await self.take())
        except Failed as failed:
            if failed.failure.error != "pool_exhausted":
                raise
        return taken

    async def give_back(self, *taken: tuple[int, str]) -> None:
        subject = self._asking.subjects.pool(POOL, "release")
        answer = await self._asking.ask(subject, m.ChunkList("amf-2", self._incarnation, taken), m.Released)
        assert set(answer.released) == {n for n, _ in taken}


async def test_a_go_pod_still_finds_numbers_after_sdk_pods_have_given_many_back(fleet: Fleet) -> None:
    """Numbers are granted again as soon as they are free, lowest first, also by the next leader: so Go pods
    get to know no more of them than are in use at a time."""
    agent = await fleet.agent(**SIXTEEN)
    go = await fleet.go("amf-1", **GO_SIXTEEN)
    await go.allocate(1)
    await fleet.renewed(go)
    holder = await Holder.open(await fleet.requester())
    numbers = set()
    for change_of_leader in (False, True):
        if change_of_leader:
            await fleet.stop(agent)
            await fleet.agent(**SIXTEEN)
        for _ in range(NUMBERS):
            two = [await holder.take(), await holder.take()]
            numbers |= {n for n, _ in two}
            await holder.give_back(*two)
    await found_by(go, 2000)
    assert len(numbers) == 2


async def test_no_number_is_granted_for_the_first_time_once_go_pods_know_three_quarters(fleet: Fleet) -> None:
    """The rest is theirs, as they have no other. Who asks hears that the pool is exhausted, and the log
    names the way out; what was used before is granted all the same."""
    await fleet.agent(**SIXTEEN)
    go = await fleet.go("amf-1", **GO_SIXTEEN)
    await go.allocate(1)
    await fleet.renewed(go)
    holder = await Holder.open(await fleet.requester())
    taken = await holder.take_all()
    assert len(await fleet.owners()) == NUMBERS * 3 // 4
    await fleet.told("go_numbers_run_out")
    await holder.give_back(taken[3])
    assert (await holder.take())[0] == taken[3][0]
    await found_by(go, 2000)


async def found_by(go: GoPod, count: int) -> None:
    """It allocates so many ids."""
    try:
        await go.allocate(count)
    except TimeoutError:
        raise AssertionError(f"{go.name} looks for {count} ids since {SEEN_SECONDS:g} s") from None
