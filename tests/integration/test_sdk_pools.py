"""Pods of several pools, on the real agent."""

from contextlib import AsyncExitStack

import pytest

from drsm_sdk import BadRequest, Drsm, Pod
from tests.harness import POOL, SEEN_SECONDS, Domain


async def test_a_pool_taken_off_the_list_keeps_the_pod_out_of_no_other(domain: Domain) -> None:
    """Its session ends later, and the next one is opened by agents that do not know the pool."""
    both = [{"name": POOL}, {"name": "gone"}]
    async with AsyncExitStack() as stack:
        async with domain.agent(pools=both):
            connected = Drsm.connect(domain.nats_url, Pod("amf-1", "10.0.0.1", "i"), prefix=domain.prefix)
            drsm = await stack.enter_async_context(connected)
            pool, gone = await drsm.join(POOL), await drsm.join("gone")
        async with domain.agent(pools=both[:1], settings_revision=2):
            assert drsm._session.life is not None
            drsm._session.end(drsm._session.life, "expired")
            with pytest.raises(BadRequest) as refused:
                await gone.allocate(timeout=SEEN_SECONDS)
            assert refused.value.error == "unknown_pool"
            assert await pool.allocate(timeout=SEEN_SECONDS)
            await stack.aclose()
