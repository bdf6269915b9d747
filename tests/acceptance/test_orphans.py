"""Each of the three ways of finding orphans is enough on its own."""

import pytest

from drsm_agent import reaper
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import shown
from tests.harness import POOL, Domain, Requester, mongo_client, mongo_table, renewing, requester

NEVER = 3600.0


def only(monkeypatch: pytest.MonkeyPatch, *, every: float = NEVER, events: bool = False) -> None:
    """Leave the reaper its first look, one each so many seconds, and those that events cause, if they may."""
    monkeypatch.setattr(reaper.Reaper, "_until_next", lambda self: every)
    if not events:
        monkeypatch.setattr(reaper.Reaper, "note", lambda self, entry: None)


async def orphaned(asking: Requester) -> int:
    """A closed pod's chunk with nobody alive."""
    dead = (await asking.open("amf-1")).incarnation
    ((n, _),) = (await asking.acquire("amf-1", dead)).chunks
    await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", dead), m.Empty)
    await asking.seen(lambda: asking.of(m.PodDown))
    return n


async def test_a_pod_that_comes_up_is_enough_and_the_operator_sees_orphans_until_then(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, events=True)
    async with domain.served() as asking:
        n = await orphaned(asking)
        rows = (await shown(domain, "orphans")).rows
        assert [(row[0], row[1], row[4]) for row in rows] == [(POOL, str(n), "amf-1")]
        heir = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-2", heir)):
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
            assert (await shown(domain, "orphans")).rows == []
            assert (await mongo_table(domain))[n] == ("amf-2", heir)


async def test_the_start_of_a_lead_is_enough(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reaper hears of no event at all and its audit never comes: only its first look is left."""
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent():
            heir = (await asking.open("amf-2")).incarnation
            await asking.renew("amf-2", heir)
            ((n, _),) = (await asking.acquire("amf-2", heir)).chunks
        async with mongo_client(domain) as client:
            change = {"$set": {"podId": "amf-1", "drsm.pod": "amf-1", "drsm.incarnation": 1}}
            await client[domain.database][POOL].update_one({"_id": f"chunkid-{n}"}, change)
        only(monkeypatch)
        async with domain.agent():
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-2"])
            assert (await mongo_table(domain))[n] == ("amf-2", heir)


async def test_the_slow_audit_is_enough(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events wake nobody: what was orphaned behind the agent's back is found by the audit alone."""
    only(monkeypatch, every=0.5)
    async with domain.served() as asking, mongo_client(domain) as client:
        heir = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-2", heir)):
            ((n, _),) = (await asking.acquire("amf-2", heir)).chunks
            change = {"$set": {"podId": "amf-1", "drsm.pod": "amf-1", "drsm.incarnation": 1}}
            await client[domain.database][POOL].update_one({"_id": f"chunkid-{n}"}, change)
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-2"])
            assert (await mongo_table(domain))[n] == ("amf-2", heir)
