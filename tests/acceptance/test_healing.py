"""A pod and the agent that disagree about chunks agree again: two renewals that differ, then one request."""

import asyncio

from nats.aio.msg import Msg

from drsm_sdk import Drsm, Pod
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    Domain,
    Requester,
    eventually,
    mongo_client,
    mongo_table,
    renewing,
    within,
)

TINY = {"pools": [{"name": POOL, "slots": 10, "usage_lag_ms": 0}]}
DIFFERENT_TWICE = ["differs", "differs"]


async def heard(asking: Requester) -> list[str]:
    """What becomes known between the pods and the agent, in the server's order: renewals, by whether their
    answer agrees with them, and that a pod asks what it holds."""
    said: list[str] = []
    renewals: dict[str, m.Renew] = {}

    async def note(message: Msg) -> None:
        if message.subject == asking.subjects.session("renew"):
            renewals[message.reply] = codec.unpack(m.Renew, message.data)
        elif message.subject == asking.subjects.session("chunks"):
            said.append("asks")
        elif renewal := renewals.pop(message.subject, None):
            same = codec.unpack(m.Renewed, message.data).held == renewal.held
            said.append("agrees" if same else "differs")

    await asking.client.subscribe(">", cb=note)
    await eventually(lambda: "agrees" in said)  # none is under way whose beginning was not heard
    return said


async def until_asked(said: list[str]) -> list[str]:
    """The last two renewals before the first question. There may be more that differ: of one that was sent
    before the answers to those before, or while the agent has granted what the pod has not heard of yet."""
    await eventually(lambda: "asks" in said)
    return said[: said.index("asks")][-2:]


def drsm_of(domain: Domain) -> Drsm:
    pod = Pod("amf-1", "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS)


async def test_a_chunk_whose_grant_was_never_heard_is_taken_up_and_issued_from(domain: Domain) -> None:
    async with domain.served(**TINY) as asking, drsm_of(domain) as drsm:
        pool = await drsm.join(POOL)
        await eventually(lambda: pool.stats.free >= pool.stats.wanted)
        said = await heard(asking)
        assert drsm.incarnation is not None
        granted = await asking.acquire("amf-1", drsm.incarnation, 1, "lost-answer")
        ((n, grant),) = granted.chunks
        await eventually(lambda: (n, grant, False) in pool.holdings())
        assert await until_asked(said) == DIFFERENT_TWICE
        issued = [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(40)]
        assert len(set(issued)) == 40
        assert n in {id_ >> 10 for id_ in issued}


async def test_a_chunk_that_vanished_from_the_database_is_dropped_and_never_issued_from(
    domain: Domain,
) -> None:
    async with domain.served(**TINY) as asking, drsm_of(domain) as drsm, mongo_client(domain) as client:
        pool = await drsm.join(POOL)
        id_ = await pool.allocate()
        n, grant = id_ >> 10, pool.grant(id_)
        await eventually(lambda: pool.stats.free >= pool.stats.wanted)
        said = await heard(asking)
        await client[domain.database][POOL].delete_one({"_id": f"chunkid-{n}"})
        await eventually(lambda: all(held[:2] != (n, grant) for held in pool.holdings()))
        assert await until_asked(said) == DIFFERENT_TWICE
        assert not pool.valid(id_)
        for _ in range(60):
            other = await pool.allocate(timeout=SEEN_SECONDS)
            assert pool.grant(other) != grant
        assert not pool.valid(id_)


async def test_doubled_and_late_requests_change_nothing(domain: Domain) -> None:
    async with domain.served(**TINY) as asking:
        mine = (await asking.open("amf-1")).incarnation
        async with renewing(asking, ("amf-1", mine)):
            answers = await asyncio.gather(*[asking.acquire("amf-1", mine, 2, "same") for _ in range(5)])
            assert len({answer.chunks for answer in answers}) == 1
            chunks = answers[0].chunks
            assert set(await mongo_table(domain)) == {n for n, _ in chunks}
            gone = m.ChunkList("amf-1", mine, chunks[:1])
            release = asking.subjects.pool(POOL, "release")
            scanned = asking.subjects.pool(POOL, "scanned")
            await asyncio.gather(*[asking.ask(release, gone, m.Released) for _ in range(3)])
            assert set(await mongo_table(domain)) == {chunks[1][0]}
            other = (await asking.open("amf-2")).incarnation
            async with renewing(asking, ("amf-2", other)):
                await asking.acquire("amf-2", other, 3, "other")
                table = await mongo_table(domain)
                for _ in range(3):
                    await asking.ask(release, gone, m.Released)
                    await asking.ask(scanned, gone, m.Cleared)
                    await within(asyncio.sleep(0))
                assert await mongo_table(domain) == table
