"""The relay on virtual time, while the change stream shows only as much as it may."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner
from drsm_agent.core.election import Election
from drsm_agent.core.writes import Outcome
from drsm_agent.errors import StoreUnavailable
from drsm_agent.feed import Feed
from drsm_agent.lead import Lead
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Batch
from drsm_agent.relay import POSITION_INTERVAL, SYNC_INTERVAL, Relay
from drsm_agent.store.memory import MemoryStore
from drsm_agent.store.stored import ensure_singletons
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.loop import Node, VirtualLoop, run
from tests.simulation.network import CALM_DELAY, AgentBus, Network, Packet, Weather
from tests.simulation.world import AgentChance

FORMER, TERM = 1, 2
SOON = 0.05
"""Virtual seconds in which everything happens that can."""
ALL = 1_000_000
BUSY = CALM_DELAY
"""Virtual seconds from one change to the next; until the server has confirmed an event, two come."""
CHANGES = 2500
OWNER = Owner("amf-1", "10.0.0.1", "i", 1)


class HeldBack(MemoryStore):
    """Its change stream shows the first `shown` changes. A write may take effect without an answer."""

    def __init__(self) -> None:
        super().__init__(["amfid"])
        self.shown = 0
        self.written = 0
        self.unanswered = False

    async def write(self, decided: Any) -> Outcome:
        outcome = await super().write(decided)
        self.written += outcome.changed
        if self.unanswered:
            raise StoreUnavailable("no answer")
        return outcome

    async def changes(
        self, *, after: int | None = None, token: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        seen = 0
        async with aclosing(super().changes(after=after, token=token)) as batches:
            async for batch in batches:
                for change in batch.changes:
                    while seen >= self.shown:
                        await asyncio.sleep(0.001)
                    seen += 1
                    yield Batch([change], change.token)


@dataclass(frozen=True, slots=True)
class Stage:
    store: HeldBack
    relay: Relay
    heard: list[str]
    """The subjects of what was said on NATS."""


@asynccontextmanager
async def leading(*, publishing: bool = True) -> AsyncIterator[Stage]:
    """A relay that publishes for the leader of TERM, or is about to; nothing of what is written from now on
    is shown yet."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    chance, node, heard = AgentChance(random.Random(1)), Node(loop, "agent"), list[str]()
    network = Network(node, random.Random(2), Weather())
    network.calm, network.heard = True, lambda packet: _note(heard, packet)
    bus, store, metrics = AgentBus(network, node), HeldBack(), Metrics()
    bus.connection.open()
    await ensure_singletons(store)
    feed = Feed(store, ["amfid"], loop.time, chance, metrics)
    election = Election("agent-2", 1000.0)
    taken = election.observed(None, loop.time(), FORMER)
    assert taken is not None
    election.won(taken, loop.time())
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(feed.run())
        relay = Relay(
            tasks=tasks,
            state=await feed.loaded(),
            feed=feed,
            store=store,
            bus=bus,
            lead=Lead(election, loop.time, chance),
            subjects=Subjects("drsm"),
            metrics=metrics,
            wall_clock=loop.time,
            definitions={"amfid": Definition(name="amfid")},
            history="h",
        )
        running = [following]
        if publishing:
            running.append(tasks.create_task(relay.run()))
        await asyncio.sleep(SOON)
        store.written = 0
        yield Stage(store, relay, heard)
        for task in running:
            task.cancel()
    await node.bury()


def _note(heard: list[str], packet: Packet) -> None:
    heard.append(packet.subject)


async def _keep_changing(store: HeldBack) -> None:
    for n in range(CHANGES):
        await store.write([writes.allocate("amfid", n, OWNER, f"{n:016x}", "r")])
        await asyncio.sleep(BUSY)


async def _done_soon(task: "asyncio.Future[Any]") -> bool:
    await asyncio.sleep(SOON)
    return task.done()


def test_a_barrier_does_not_take_an_earlier_touch_for_its_own() -> None:
    """Neither the last leader's, nor one of this leader that waits for nothing."""

    async def live() -> None:
        async with leading() as stage:
            await stage.store.write([writes.touch_stamp(FORMER, "agent-1", 7)])
            await stage.relay._move()
            barrier = asyncio.ensure_future(stage.relay.barrier())
            await asyncio.sleep(SOON)
            assert stage.store.written == 3
            stage.store.shown = 2
            assert not await _done_soon(barrier)
            stage.store.shown = 3
            assert await _done_soon(barrier)

    run(live())


def test_syncs_wait_until_the_table_has_passed_the_leaders_own_stamp() -> None:
    """Before, it may lack what the last leader has told of, and every demux would doubt itself."""

    async def live() -> None:
        async with leading() as stage:
            await asyncio.sleep(1.0)
            barrier = asyncio.ensure_future(stage.relay.barrier())
            assert not await _done_soon(barrier)
            assert stage.heard == []
            stage.store.shown = 1
            assert await _done_soon(barrier)
            assert "drsm.evt.amfid.sync" in stage.heard

    run(live())


def test_the_saved_position_does_not_go_back_to_what_a_late_table_shows() -> None:
    """What is published again meanwhile lies before the last leader's position. If this one ends there, a
    third agent, whose table has begun in between, could not go on from it."""

    async def live() -> None:
        async with leading() as stage:
            for n in range(2):
                await stage.store.write([writes.allocate("amfid", n, OWNER, f"{n:016x}", "r")])
            stage.store.shown = 2
            await asyncio.sleep(3 * POSITION_INTERVAL)
            assert "drsm.evt.amfid.chunk.allocated" in stage.heard
            assert await stage.store.read(writes.POSITION) == [writes.first_position().document]
            stage.store.shown = ALL
            await stage.relay.barrier()
            await asyncio.sleep(2 * POSITION_INTERVAL)
            assert await stage.store.read(writes.POSITION) != [writes.first_position().document]

    run(live())


def test_every_unknown_outcome_is_read_back_however_many_read_at_once() -> None:
    async def live() -> None:
        async with leading() as stage:
            for _ in range(2):
                stage.store.unanswered = True
                with pytest.raises(StoreUnavailable):
                    await stage.relay.commit([writes.stand_by()])
                stage.store.unanswered = False
                before = stage.store.written
                readers = [asyncio.ensure_future(stage.relay.read_back()) for _ in range(2)]
                stage.store.shown = 1000
                await asyncio.gather(*readers)
                assert stage.store.written > before
            before = stage.store.written
            await stage.relay.read_back()
            assert stage.store.written == before

    run(live())


def test_syncs_go_out_and_the_position_is_saved_however_fast_changes_come() -> None:
    """There is always one that is not published yet. Else every demux would doubt its table just when it
    changes most, and a standby keep all of it."""

    async def live() -> None:
        async with leading() as stage:
            stage.store.shown = ALL
            await stage.relay.barrier()
            stage.heard.clear()
            await _keep_changing(stage.store)
            assert stage.heard.count("drsm.evt.amfid.sync") >= CHANGES * BUSY // SYNC_INTERVAL
            assert await stage.store.read(writes.POSITION) != [writes.first_position().document]

    run(live())


def test_a_leader_takes_up_the_history_however_fast_changes_come() -> None:
    """Go pods write also while nobody leads; what they write meanwhile is published later."""

    async def live() -> None:
        async with leading(publishing=False) as stage:
            stage.store.shown = ALL
            changing = asyncio.ensure_future(_keep_changing(stage.store))
            await asyncio.sleep(SOON)
            published = asyncio.ensure_future(stage.relay.publish_log())
            assert await _done_soon(published)
            assert "drsm.evt.amfid.chunk.allocated" in stage.heard
            assert not changing.done()
            changing.cancel()

    run(live())
