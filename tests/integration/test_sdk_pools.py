"""Pods of several pools, on the real agent."""

from contextlib import AsyncExitStack

import pytest

from drsm_sdk import BadRequest, Drsm, Pod
from drsm_sdk.wire import messages as m
from tests.harness import POOL, SEEN_SECONDS, Domain, Failed, requester


async def test_a_pool_taken_off_the_list_keeps_the_pod_out_of_no_other(domain: Domain) -> None:
    """Its session ends later, and the next one is opened by agents that do not know the pool."""
    both = [{"name": POOL}, {"name": "gone"}]
    async with AsyncExitStack() as stack:
        async with domain.agent(pools=both):
            connected = Drsm.connect(
                domain.nats_url,
                Pod("amf-1", "10.0.0.1", "i"),
                prefix=domain.prefix,
                timeout=SEEN_SECONDS,
            )
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


async def test_a_session_joins_at_most_as_many_pools_as_one_may_be_opened_with(domain: Domain) -> None:
    names = [POOL, *(f"pool-{i}" for i in range(m.POOLS_PER_SESSION_MAX))]
    async with (
        domain.agent(pools=[{"name": name} for name in names]),
        requester(domain.nats_url, domain.prefix) as asking,
    ):
        pod = (await asking.open("amf-1", pools=tuple(names[:-1]))).incarnation
        subject = asking.subjects.session("join")
        again = await asking.ask(subject, m.Join("amf-1", pod, tuple(names[:2])), m.Joined)
        assert [definition.name for definition in again.definitions] == names[:2]
        with pytest.raises(Failed, match="expected at most 64 of one session, found 65"):
            await asking.ask(subject, m.Join("amf-1", pod, (names[-1],)), m.Joined)
