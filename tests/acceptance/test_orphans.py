"""Each of the ways of finding orphans is enough on its own."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest

from drsm_agent import reaper
from drsm_agent.core import events, placement
from drsm_agent.core.documents import Chunk, Owner
from drsm_agent.core.placement import Placed
from drsm_agent.feed import Entry
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import shown
from tests.harness import (
    NONE_EXPIRES,
    POOL,
    Domain,
    Requester,
    mongo_client,
    mongo_table,
    renewing,
    requester,
)

NEVER = 3600.0
ORPHANED = {"podId": "amf-1", "drsm.pod": "amf-1", "drsm.incarnation": 1}
"""Of a pod that there never was."""


def only(
    monkeypatch: pytest.MonkeyPatch, *, every: float = NEVER, wakes: Collection[str] | None = ()
) -> None:
    """Leave the reaper its first look, one each so many seconds, and those that events of these kinds cause;
    None means of all kinds."""
    note = reaper.Reaper.note

    def heard(self: reaper.Reaper, entry: Entry) -> None:
        note(self, replace(entry, events=[e for e in entry.events if wakes is None or e.kind in wakes]))

    monkeypatch.setattr(reaper.Reaper, "_until_next", lambda self: every)
    monkeypatch.setattr(reaper.Reaper, "note", heard)


async def orphaned(asking: Requester) -> int:
    """A closed pod's chunk with nobody alive."""
    dead = (await asking.open("amf-1")).incarnation
    ((n, _),) = (await asking.acquire("amf-1", dead)).chunks
    await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", dead), m.Empty)
    await asking.seen(lambda: asking.of(m.PodDown))
    return n


async def change(domain: Domain, n: int, fields: dict[str, Any]) -> None:
    """Behind the agent's back."""
    async with mongo_client(domain) as client:
        await client[domain.database][POOL].update_one({"_id": f"chunkid-{n}"}, {"$set": fields})


async def test_a_pod_that_comes_up_is_enough_and_the_operator_sees_orphans_until_then(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, wakes={events.UP})
    async with domain.served(**NONE_EXPIRES) as asking:
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
        async with domain.agent(**NONE_EXPIRES):
            heir = (await asking.open("amf-2")).incarnation
            await asking.renew("amf-2", heir)
            ((n, _),) = (await asking.acquire("amf-2", heir)).chunks
        await change(domain, n, ORPHANED)
        only(monkeypatch)
        async with domain.agent(**NONE_EXPIRES):
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-2"])
            assert (await mongo_table(domain))[n] == ("amf-2", heir)


async def test_pools_without_an_orphan_are_passed_over(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rule there is none, and what each living pod owns need not be counted at every event."""
    planned: list[int] = []

    def plan(orphans: list[Chunk], living: Mapping[Owner, int]) -> list[Placed]:
        planned.append(len(orphans))
        return placement.plan(orphans, living)

    monkeypatch.setattr(reaper, "plan", plan)
    async with domain.served(**NONE_EXPIRES) as asking:
        heir = (await asking.open("amf-2")).incarnation
        await asking.acquire("amf-2", heir)
        assert planned == []
        async with renewing(asking, ("amf-2", heir)):
            await orphaned(asking)
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
        assert planned
        assert set(planned) == {1}


async def test_the_slow_audit_is_enough(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events wake nobody: what was orphaned behind the agent's back is found by the audit alone."""
    only(monkeypatch, every=0.5)
    async with domain.served(**NONE_EXPIRES) as asking:
        heir = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-2", heir)):
            ((n, _),) = (await asking.acquire("amf-2", heir)).chunks
            await change(domain, n, ORPHANED)
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-2"])
            assert (await mongo_table(domain))[n] == ("amf-2", heir)


@pytest.mark.parametrize("kind", [events.CLAIMED, events.ALLOCATED, events.SCANNED, events.RELEASED])
async def test_any_event_of_a_chunk_is_enough(
    domain: Domain, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of another chunk: the table is looked at as a whole. The change that makes the orphan is the
    first kind, and wakes nobody in the other cases."""
    only(monkeypatch, wakes={kind})
    async with domain.served(**NONE_EXPIRES) as asking:
        heir = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-2", heir)):
            (orphan, _), (other, grant) = (await asking.acquire("amf-2", heir, 2)).chunks
            await change(domain, other, {"drsm.marked": True})
            await change(domain, orphan, ORPHANED)
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.owner.name == "amf-1"])
            listed = m.ChunkList("amf-2", heir, ((other, grant),))
            match kind:
                case events.ALLOCATED:
                    await asking.acquire("amf-2", heir, request_id="b")
                case events.SCANNED:
                    await asking.ask(asking.subjects.pool(POOL, "scanned"), listed, m.Cleared)
                case events.RELEASED:
                    await asking.ask(asking.subjects.pool(POOL, "scanned"), listed, m.Cleared)
                    await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
            await asking.seen(lambda: [c for c in asking.of(m.ChunkClaimed) if c.previous.name == "amf-1"])
            assert (await mongo_table(domain))[orphan] == ("amf-2", heir)
