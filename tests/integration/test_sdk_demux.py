"""A demux on a real NATS server, against a scripted agent: true tables, and knowing when they are not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from drsm_sdk import AgentUnavailable, BadRequest, Demux, changes
from drsm_sdk.wire import messages as wire
from tests.sdk.fake_agent import (
    DEADLINE,
    OTHER,
    POOL,
    SEEN_SECONDS,
    SILENCE,
    FakeAgent,
    SkippingClock,
    eventually,
    fake_agent,
)

THIRD = wire.OwnerRef("third", "10.0.0.8", "t", 2)
Connect = Callable[..., Demux]


@pytest.fixture
async def agent(nats_url: str, prefix: str) -> AsyncIterator[FakeAgent]:
    async with fake_agent(nats_url, prefix) as agent:
        agent.table.live.update({OTHER: None, THIRD: None})
        agent.put(OTHER, 1, 2)
        yield agent


@pytest.fixture
def clock() -> SkippingClock:
    return SkippingClock()


@pytest.fixture
def connect(nats_url: str, prefix: str, clock: SkippingClock) -> Connect:
    def connect(pool: str = POOL, timeout: float = SEEN_SECONDS) -> Demux:
        return Demux.connect(nats_url, pool, prefix=prefix, timeout=timeout, clock=clock)

    return connect


def name(demux: Demux, n: int) -> str | None:
    """Who owns chunk `n`."""
    owner = demux.owner(n * 16 + 3)
    return owner.name if owner is not None else None


async def test_a_demux_is_complete_once_entered_and_follows(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as demux:
        assert (name(demux, 1), name(demux, 7), demux.synced) == ("other", None, True)
        events = demux.events()
        await agent.give(THIRD, 7)
        assert isinstance(await anext(events), wire.ChunkAllocated)
        assert name(demux, 7) == "third"
        await agent.event(wire.PodDown(OTHER, "expired"))
        assert isinstance(await anext(events), wire.PodDown)
        owner = demux.owner(1 * 16)
        assert owner is not None
        assert owner.state == "down"
        assert [(pod.name, pod.state) for pod in demux.pods()] == [("other", "down"), ("third", "live")]


async def test_a_lost_event_is_healed_by_the_next_one(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as demux:
        events = demux.events()
        agent.chunks[8] = replace(agent.chunks[1], owner=THIRD)
        await agent.event(wire.ChunkAllocated(THIRD, (8,)), lost=True)
        await agent.give(THIRD, 9)
        assert isinstance(await anext(events), changes.Reloaded)
        assert (name(demux, 8), name(demux, 9)) == ("third", "third")


async def test_a_lost_event_is_healed_by_a_sync_when_nothing_follows(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as demux:
        agent.chunks[8] = replace(agent.chunks[1], owner=THIRD)
        await agent.event(wire.ChunkAllocated(THIRD, (8,)), lost=True)
        await agent.sync()
        await eventually(lambda: name(demux, 8) == "third")


async def test_a_wrong_table_at_the_right_version_is_healed(agent: FakeAgent, connect: Connect) -> None:
    """The checksum of the sync tells."""
    async with connect() as demux:
        agent.chunks[2] = replace(agent.chunks[2], owner=THIRD)
        await agent.sync()
        await eventually(lambda: name(demux, 2) == "third")


async def test_a_reset_is_followed_into_the_new_history(agent: FakeAgent, connect: Connect) -> None:
    """The database went back: versions may be lower than before."""
    async with connect() as demux:
        agent.table.version = 0
        del agent.chunks[2]
        await agent.reset("h2")
        await eventually(lambda: name(demux, 2) is None)
        await agent.give(THIRD, 5)
        await eventually(lambda: name(demux, 5) == "third")


async def test_events_during_a_snapshot_are_not_lost(agent: FakeAgent, connect: Connect) -> None:
    """Subscribed first: what comes before the snapshot's answer is kept and applied after it."""
    stale = agent.page()

    def late(verb: str, body: dict[str, Any]) -> Any:
        return [stale, wire.SnapshotEnd(stale.version, 1)] if verb == "snapshot" else None

    agent.script = late
    await agent.give(THIRD, 5)
    async with connect() as demux:
        agent.script = lambda verb, body: None
        await agent.sync()
        await eventually(lambda: name(demux, 5) == "third")


async def test_pages_of_two_agents_are_not_mixed(agent: FakeAgent, connect: Connect) -> None:
    whole = agent.page()
    first = replace(whole, last=False)
    second = replace(whole, page=1, version=(99, 0), chunks=(), definition=None)
    agent.script = lambda verb, body: (
        [first, second, wire.SnapshotEnd(second.version, 2)]
        if verb == "snapshot" and len(agent.asked(verb)) == 1
        else None
    )
    async with connect() as demux:
        assert name(demux, 1) == "other"
        assert len(agent.asked("snapshot")) >= 2


async def test_without_syncs_a_table_is_not_called_synced(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    """Never a stale answer without a way to know."""
    async with connect() as demux:
        assert demux.staleness < 5.0
        clock.skipped += 7.0
        assert not demux.synced
        assert demux.staleness >= 7.0
        await agent.sync()
        await eventually(lambda: demux.synced)


async def test_nonsense_on_the_subjects_harms_nobody(agent: FakeAgent, connect: Connect) -> None:
    """G8."""
    async with connect() as demux:
        subject = agent.subjects.event(POOL, "chunk.allocated")
        for data in (b"", b"\xc1", b"{", b"\x81\xa1v\x01", b"\x93\x01\x02\x03"):
            await agent.client.publish(subject, data)
        await agent.client.publish(agent.subjects.event(POOL, "made.up.later"), b"\x80")
        await agent.give(THIRD, 5)
        await eventually(lambda: name(demux, 5) == "third")


async def test_connecting_without_an_agent_says_so(nats_url: str, prefix: str) -> None:
    with pytest.raises(AgentUnavailable, match="no responders"):
        async with Demux.connect(nats_url, POOL, prefix=prefix, timeout=DEADLINE):
            pass


async def test_an_unknown_pool_is_a_bad_request(agent: FakeAgent, connect: Connect) -> None:
    agent.script = lambda verb, body: wire.Failure("unknown_pool", "no such pool")
    with pytest.raises(BadRequest, match="no such pool"):
        async with connect(timeout=60.0):
            pass


async def test_leaving_ends_the_readers_and_leaves_no_task(agent: FakeAgent, connect: Connect) -> None:
    before = asyncio.all_tasks()
    async with connect() as demux:
        agent.script = lambda verb, body: SILENCE
        events = demux.events()
    assert [event async for event in events] == []
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("drsm-")]
