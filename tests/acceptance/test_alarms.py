"""What an operator should look at is logged once and counted for as long as it lasts, by a real agent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from drsm_agent import alarms, leader
from drsm_agent.core import usage
from drsm_agent.service import Agent
from drsm_sdk import Drsm, Pod
from drsm_sdk.wire import messages as m
from tests.harness import NONE_EXPIRES, ONE_LEAD, POOL, SEEN_SECONDS, Domain, Requester, eventually, requester

SMALL = {"name": POOL, "bits": 10, "block_bits": 3, "usage_lag_ms": 0}


@asynccontextmanager
async def watched(domain: Domain) -> AsyncIterator[tuple[Agent, list[Any], Requester]]:
    """An agent with its metrics and what it logs, in one lead."""
    with capture_logs() as logs:
        async with requester(domain.nats_url, domain.prefix) as asking:
            async with domain.agent(pools=[SMALL], **ONE_LEAD, **NONE_EXPIRES) as agent:
                yield agent, logs, asking


def said(logs: list[Any], event: str) -> list[dict[str, Any]]:
    return [entry for entry in logs if entry["event"] == event]


def measured(agent: Agent, name: str) -> float | None:
    return agent.metrics.registry.get_sample_value(name, {"pool": POOL})


async def test_a_pod_that_never_releases_an_id_is_told_of_and_one_that_does_is_not(domain: Domain) -> None:
    async with watched(domain) as (agent, logs, _):
        async with (
            Drsm.connect(domain.nats_url, Pod("amf-1", "10.0.0.1", "i"), prefix=domain.prefix) as leaking,
            Drsm.connect(domain.nats_url, Pod("amf-2", "10.0.0.2", "i"), prefix=domain.prefix) as tidy,
        ):
            pools = [await drsm.join(POOL) for drsm in (leaking, tidy)]
            pools[1].release(await pools[1].allocate())
            for pool in pools:
                for _ in range(8 * usage.ONLY_ALLOCATES_CHUNKS):
                    await pool.allocate(timeout=SEEN_SECONDS)
            await eventually(lambda: said(logs, "only_allocates"))
            await eventually(lambda: measured(agent, "drsm_pods_only_allocating") == 1)
        await eventually(lambda: measured(agent, "drsm_pods_only_allocating") == 0)
        (entry,) = said(logs, "only_allocates")
        assert (entry["pool"], entry["pod"], entry["log_level"]) == (POOL, "amf-1", "warning")
        assert "does the application?" in entry["action"]


async def test_chunks_that_nobody_scans_are_told_of(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the grace beyond the hold is nothing, or the test would take a minute."""
    monkeypatch.setattr(usage, "MARK_GRACE", 0.0)
    async with watched(domain) as (agent, logs, asking):
        heir = Drsm.connect(domain.nats_url, Pod("amf-2", "10.0.0.2", "i"), prefix=domain.prefix)
        async with heir:
            await heir.join(POOL)  # without a scan
            async with Drsm.connect(
                domain.nats_url, Pod("amf-1", "10.0.0.1", "i"), prefix=domain.prefix
            ) as leaving:
                await (await leaving.join(POOL)).allocate()
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
            await eventually(lambda: said(logs, "marked_chunks_pile_up"))
            assert (measured(agent, "drsm_marked_overdue") or 0) >= 1
        (entry,) = said(logs, "marked_chunks_pile_up")
        assert (entry["pool"], entry["log_level"]) == (POOL, "warning")
        assert "drsm chunks --marked" in entry["action"]


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> list[alarms.Alarms]:
    """Who looks, once for each look; the one at the start of a lead is the last for an hour."""
    looks: list[alarms.Alarms] = []

    class Alarms(alarms.Alarms):
        async def look(self) -> None:
            await super().look()
            looks.append(self)

    monkeypatch.setattr(leader, "Alarms", Alarms)
    monkeypatch.setattr(alarms, "LOOK_INTERVAL", 3600.0)
    monkeypatch.setattr(alarms, "LOOK_INTERVAL_MAX", 3600.0)
    return looks


async def test_events_however_many_cause_no_look(domain: Domain, looking: list[alarms.Alarms]) -> None:
    """Over many pools and pods it takes longer than all that has to be done at an event."""
    async with watched(domain) as (agent, _, asking):
        pod = (await asking.open("amf-1")).incarnation
        for n in range(5):
            await asking.acquire("amf-1", pod, request_id=f"r-{n}")
        await asking.seen(lambda: len(asking.of(m.ChunkAllocated)) == 5)
        assert len(looking) == 1
        assert measured(agent, "drsm_chunks") == 0


async def test_others_have_their_turn_after_each_pool_of_a_look(
    domain: Domain, looking: list[alarms.Alarms]
) -> None:
    """Requests do not wait for gauges."""
    async with domain.agent(pools=[{"name": name, "bits": 12} for name in ("amfid", "tmsi", "seid")]):
        await eventually(lambda: looking)
        turns = sum(1 for _ in looking[0].look().__await__())
    assert turns == 3
