"""What strangers can publish among the events, and what becomes of a demux and a pod that hear it.

NATS permissions keep strangers from it (docs/settings.md); these tests hold what is left without: nothing
ends, nothing grows, and all heals by the agent's next words, or after half a minute of them.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from drsm_agent.service import Agent
from drsm_sdk import Demux, Drsm, Pod, follow
from drsm_sdk.ambient import Chance, boottime
from drsm_sdk.changes import Change, Gained
from drsm_sdk.feed import Reader
from drsm_sdk.follow import BUFFER_BYTES_MAX, DISPUTED_MAX, EVENT_BYTES_MAX, Follower
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.rpc import TERM_BELIEVED, Rpc
from drsm_sdk.transport import Message
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects
from tests.harness import POOL, UNHURRIED, Domain, Requester, eventually, renewing, requester, within
from tests.integration.test_hostile import NONSENSE
from tests.sdk.fake_agent import SkippingClock

NOBODY = m.OwnerRef("nobody", "", "", 1)
GRANT = "0123456789abcdef"
U64_MAX = 2**64 - 1
LATEST = (U64_MAX, U64_MAX)
BODIES: list[m.EventBody] = [
    m.PodUp(NOBODY),
    m.PodDown(NOBODY, "expired"),
    m.ChunkAllocated(NOBODY, (0, 1, U64_MAX)),
    m.ChunkClaimed(NOBODY, NOBODY, (0, 1, U64_MAX), (GRANT,), U64_MAX),
    m.ChunkScanned(NOBODY, (0, U64_MAX)),
    m.ChunkReleased(NOBODY, (0, 1, U64_MAX)),
    m.Sync(U64_MAX, U64_MAX, U64_MAX),
    m.Reset("no reason"),
]


@dataclass(frozen=True, slots=True)
class Stage:
    """An agent, a pod that owns chunks, a demux with a clock that tests can move, and a stranger."""

    agent: Agent
    asking: Requester
    demux: Demux
    clock: SkippingClock
    incarnation: int
    owned: list[int] = field(default_factory=list)

    @property
    def head(self) -> m.EventHead:
        """Of the agent's newest event: all that a stranger can overhear."""
        return self.asking.events[-1][0]

    async def forge(self, head: m.EventHead, *bodies: m.EventBody) -> None:
        for body in bodies:
            data = codec.encode(codec.to_map(head) | codec.to_map(body))
            await self.asking.client.publish(
                self.asking.subjects.event(POOL, m.EVENT_VERBS[type(body)]), data
            )
        await self.asking.client.flush()

    def snapshots(self) -> float:
        """How many the agent was asked for."""
        return float(self.agent.metrics.requests.labels(verb="snapshot", outcome="ok")._value.get())

    async def acquire(self) -> int:
        """One more chunk for the pod; returns its number."""
        granted = await self.asking.acquire("amf-1", self.incarnation, request_id=f"r{len(self.owned)}")
        self.owned.extend(n for n, _ in granted.chunks)
        return self.owned[-1]

    async def heard(self) -> None:
        """Returns when the demux has read all that was said before: it knows of a chunk acquired since."""
        n = await self.acquire()
        await eventually(lambda: n in self.demux.chunks())

    def right(self) -> bool:
        """Whether the demux says what is true, and knows it."""
        alone = [pod.name for pod in self.demux.pods()] == ["amf-1"]
        owners = {n: owner.name for n, owner in self.demux.chunks().items()}
        return self.demux.synced and alone and owners == dict.fromkeys(self.owned, "amf-1")


@asynccontextmanager
async def overheard(domain: Domain) -> AsyncIterator[Stage]:
    """What is forged in the block must not be the last that the demux believes."""
    clock = SkippingClock()
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**UNHURRIED) as agent:
        pod = (await asking.open("amf-1")).incarnation
        async with (
            renewing(asking, ("amf-1", pod)),
            Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, clock=clock) as demux,
        ):
            stage = Stage(agent, asking, demux, clock, pod)
            await stage.heard()
            await eventually(stage.right)
            yield stage
            await eventually(stage.right)
            await stage.heard()


async def test_nonsense_among_the_events_is_one_line_in_the_log(
    domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    """On every event's subject, and on such as do not exist."""
    async with overheard(domain) as stage:
        with caplog.at_level(logging.INFO, "drsm_sdk"):
            for verb in (*m.EVENT_KINDS, "chunk", "chunk.x", "a.b.c.d"):
                for data in NONSENSE.values():
                    await stage.asking.client.publish(stage.asking.subjects.event(POOL, verb), data)
            await stage.asking.client.flush()
            await stage.heard()
        (record,) = [record for record in caplog.records if record.name == "drsm_sdk"]
        assert (record.levelname, record.getMessage()[:17]) == ("WARNING", "unreadable event ")


async def test_events_of_other_pools_and_histories_change_nothing(domain: Domain) -> None:
    """Said on this pool's subjects; of a fallen leader, or of one that never was."""
    async with overheard(domain) as stage:
        await stage.forge(replace(stage.head, pool="other", version=LATEST), *BODIES)
        await stage.forge(replace(stage.head, term=0, history="x", version=LATEST), *BODIES)
        await stage.heard()
        assert (stage.snapshots(), stage.right()) == (1, True)


async def test_an_event_after_a_gap_that_never_was_costs_a_snapshot_and_no_more(domain: Domain) -> None:
    """It is not kept for a snapshot that could lead up to it."""
    async with overheard(domain) as stage:
        before = stage.snapshots()
        for body in BODIES[:6]:
            await stage.forge(replace(stage.head, version=LATEST, prev=(U64_MAX, 0)), body)
        await stage.heard()  # as many snapshots as there were times at which something of it came
        await eventually(stage.right)
        taken = stage.snapshots()
        assert taken > before
        confirmed = len(stage.asking.of(m.Sync))
        await stage.asking.seen(lambda: len(stage.asking.of(m.Sync)) > confirmed)
        assert (stage.snapshots(), stage.right()) == (taken, True)


@pytest.mark.parametrize("term", [None, U64_MAX])
async def test_a_table_from_the_far_future_is_not_kept_for_ever(
    domain: Domain, term: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later event and snapshot is older than it: half a minute of syncs that say so are enough. With
    the highest of all terms, too."""
    async with overheard(domain) as stage:
        head = replace(stage.head, version=LATEST, prev=(0, 0), term=term or stage.head.term)
        await stage.forge(head, *BODIES)
        await eventually(lambda: not stage.right())
        await eventually(lambda: stage.demux._follower._disputed_since is not None)
        monkeypatch.setattr(follow, "DISPUTE_GAP_MAX", 2 * DISPUTED_MAX)  # as the clock jumps here
        stage.clock.skipped += DISPUTED_MAX + 1
        assert not stage.demux.synced


async def test_a_term_that_nobody_repeats_does_not_silence_the_agent(domain: Domain) -> None:
    """Said with another history: the snapshot that is due then is given by a leader of a lower term."""
    async with overheard(domain) as stage:
        await stage.forge(replace(stage.head, term=U64_MAX, history="x"), m.Reset("forged"))
        await eventually(lambda: not stage.demux.synced)
        stage.clock.skipped += TERM_BELIEVED + 1


async def test_a_pod_that_heard_of_a_term_that_never_was_goes_on(domain: Domain) -> None:
    """Its renewals are answered all the while; it must come to believe the answers again."""
    clock, pod = SkippingClock(), Pod("amf-1", "10.0.0.1", "")
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        domain.agent(**UNHURRIED),
        Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, clock=clock) as drsm,
    ):
        pool = await drsm.join(POOL)
        incarnation = drsm.incarnation
        (head, _) = asking.events[-1]
        for body in (*BODIES[:2], *BODIES[4:]):
            data = codec.encode(codec.to_map(replace(head, term=U64_MAX)) | codec.to_map(body))
            await asking.client.publish(asking.subjects.event(POOL, m.EVENT_VERBS[type(body)]), data)
        await eventually(lambda: drsm._rpc.term == U64_MAX)
        clock.skipped += TERM_BELIEVED + 1
        await eventually(lambda: drsm.state == "live" and pool.synced)
        assert drsm.incarnation == incarnation
        assert pool.valid(pool.allocate_nowait())


async def test_a_pod_takes_up_no_chunk_that_its_pool_does_not_have(domain: Domain) -> None:
    """A claim in its own name, by a stranger, of numbers beyond the pool's bits."""
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        domain.agent(**UNHURRIED),
        Drsm.connect(domain.nats_url, Pod("amf-1", "10.0.0.1", ""), prefix=domain.prefix) as drsm,
    ):
        pool = await drsm.join(POOL, in_use=lambda first, last: [])
        changes = pool.changes()
        (head, _), me = asking.events[-1], m.OwnerRef("amf-1", "", "", drsm.incarnation or 0)
        claim = m.ChunkClaimed(me, NOBODY, (5, 2**14, 2**63, U64_MAX), (GRANT,) * 4, 0)
        data = codec.encode(codec.to_map(head) | codec.to_map(claim))
        await asking.client.publish(asking.subjects.event(POOL, "chunk.claimed"), data)
        claimed = await within(_marked(changes))
        assert claimed.chunks == (5,)


async def _marked(changes: Reader[Change]) -> Gained:
    async for change in changes:
        if isinstance(change, Gained) and change.marked:
            return change
    raise AssertionError("no chunk was claimed")


@pytest.fixture
def follower() -> Callable[..., Follower]:
    """A follower that hears, and whose snapshots never come."""

    def follower(**options: Any) -> Follower:
        rpc = Rpc(NatsTransport("nats://127.0.0.1:1"), boottime, Chance())
        return Follower(rpc, Subjects(), POOL, clock=boottime, chance=Chance(), **options)

    return follower


async def test_what_waits_for_a_snapshot_is_bounded_in_bytes(follower: Callable[..., Follower]) -> None:
    """However large the events are, and however many; the newest are kept."""
    waiting = follower()
    head = m.EventHead(POOL, (5, 0), (4, 0), "a", 1, "h", 0)
    data = codec.encode(codec.to_map(head) | codec.to_map(m.PodDown(NOBODY, "x" * 60_000)))
    for _ in range(500):
        waiting._receive(Message("drsm.evt.amfid.pod.down", data))
    kept = sum(hearing.size for hearing in waiting._pending)
    assert kept == waiting._pending_bytes
    assert BUFFER_BYTES_MAX - len(data) < kept <= BUFFER_BYTES_MAX


async def test_an_event_that_is_too_large_is_not_read(follower: Callable[..., Follower]) -> None:
    """No agent sends one; its list would take up many times its size."""
    heard: list[m.EventBody] = []
    listening = follower(heard=lambda head, body: heard.append(body))
    head = m.EventHead(POOL, (5, 0), (4, 0), "a", 1, "h", 0)
    for count in (1000, EVENT_BYTES_MAX):
        allocated = m.ChunkAllocated(NOBODY, (1,) * count)
        data = codec.encode(codec.to_map(head) | codec.to_map(allocated))
        listening._receive(Message("drsm.evt.amfid.chunk.allocated", data))
    assert heard == [m.ChunkAllocated(NOBODY, (1,) * 1000)]
