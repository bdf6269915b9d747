"""How a pod asks for chunks and gives them back: one request at a time, and none of them too soon."""

import asyncio
from collections.abc import Callable

import pytest

from drsm_sdk import Drsm, Pod, demand, supply
from drsm_sdk.testing import Definition, Domain, MemoryTransport
from drsm_sdk.transport import Message
from tests.sdk.fake_agent import SkippingClock, eventually

POOL = "amfid"
SMALL = Definition(name=POOL, bits=16, block_bits=4, slots=10)
AMF_1 = Pod("amf-1", "10.0.0.1", "i")


class Slow(MemoryTransport):
    """Answers to requests for chunks take some turns of the loop; counts how many are under way."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain._bus, "amf-1")
        self.asked = self.under_way = self.most = 0

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        if not subject.endswith(".acquire"):
            return await super().request_many(subject, data, timeout, done)
        self.asked += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(10):
                await asyncio.sleep(0)
            await super().request_many(subject, data, timeout, done)
        finally:
            self.under_way -= 1


async def test_however_many_wait_for_ids_one_request_for_chunks_is_under_way() -> None:
    """All callers wait on the same one."""
    async with Domain(SMALL) as domain:
        transport = Slow(domain)
        async with Drsm.connect("memory", AMF_1, transport=transport) as drsm:
            pool = await drsm.join(POOL)
            for _ in range(5):
                ids = await asyncio.gather(*[pool.allocate(timeout=10.0) for _ in range(100)])
                assert len(set(ids)) == 100
        assert transport.asked > 5
        assert transport.most == 1


async def test_chunks_go_back_by_themselves_once_they_were_empty_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not before: the next burst would ask for them again. (No pace is seen at which to want more.)"""
    monkeypatch.setattr(demand.Rate, "sample", lambda self, now, total: None)
    looked: list[supply.Supply] = []
    look = supply.Supply._retire

    def looks(self: supply.Supply) -> None:
        look(self)
        looked.append(self)

    monkeypatch.setattr(supply, "TICK", 0.01)
    monkeypatch.setattr(supply.Supply, "_retire", looks)
    clock = SkippingClock()
    async with Domain(SMALL) as domain, domain.drsm(AMF_1, clock=clock) as drsm:

        async def pass_by(seconds: float) -> None:
            """Let the time go by, and have the pod look twice since: the first look may have begun before."""
            clock.skipped += seconds
            looked.clear()
            await eventually(lambda: drsm.state == "live" and len(looked) >= 2)

        pool = await drsm.join(POOL)
        for id_ in [await pool.allocate(timeout=10.0) for _ in range(60)]:
            pool.release(id_)
        await eventually(lambda: pool.stats.free >= pool.stats.wanted)
        held = pool.stats.chunks
        await pass_by(50.0)
        assert pool.stats.chunks == held >= 6
        await pass_by(15.0)
        assert pool.stats.chunks < held
        assert pool.stats.free >= SMALL.slots
