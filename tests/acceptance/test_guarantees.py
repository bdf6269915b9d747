"""G4 and G5 on real servers: announced before used, and tables that end up equal to MongoDB's."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping

import nats
import pytest
from nats.aio.msg import Msg

from drsm_agent import service
from drsm_agent.bus.nats_bus import NatsBus
from drsm_agent.embedded import Stack
from drsm_sdk import Demux
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import Subjects
from tests.harness import (
    NONE_EXPIRES,
    ONE_LEAD,
    POOL,
    SEEN_SECONDS,
    Domain,
    Failed,
    Requester,
    demuxes_equal_mongodb,
    mongo_client,
    requester,
    within,
)

PODS, ACQUIRES = 30, 10
STORM_SECONDS = 60.0
"""For some thousand requests: a bound against hanging, as `SEEN_SECONDS` is for one."""


class SlowEvents(NatsBus):
    """The real bus, except that events leave late: an answer that does not wait for them overtakes them."""

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        if ".evt." in subject:
            await asyncio.sleep(0.02)
        await super().publish(subject, data, headers, reply)


@pytest.mark.parametrize("bus", [NatsBus, SlowEvents])
async def test_no_reply_precedes_the_event_that_names_the_owner(
    domain: Domain, bus: type[NatsBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: events and replies are recorded by one subscription, which sees them in the server's order."""
    monkeypatch.setattr(service, "NatsBus", bus)
    client = await nats.connect(domain.nats_url)
    subjects = Subjects(domain.prefix)
    recorded: list[Msg] = []
    answered = asyncio.Event()

    async def record(message: Msg) -> None:
        recorded.append(message)
        answered.set()

    patient = ONE_LEAD | NONE_EXPIRES
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**patient):
        await client.subscribe(f"{domain.prefix}.>", cb=record)
        await client.flush()
        pods = [(f"amf-{i}", (await asking.open(f"amf-{i}")).incarnation) for i in range(PODS)]
        for round_ in range(ACQUIRES):
            for name, incarnation in pods:
                request = m.Acquire(name, incarnation, 2, f"{name}-{round_}")
                reply = f"{domain.prefix}.reply.{name}.{round_}"
                data = codec.encode(codec.to_map(request))
                await asking.client.publish(subjects.pool(POOL, "acquire"), data, reply=reply)
        async with asyncio.timeout(STORM_SECONDS):
            while sum(".reply." in message.subject for message in recorded) < PODS * ACQUIRES:
                answered.clear()
                await answered.wait()
    await client.close()
    announced: set[int] = set()
    replies = 0
    for message in recorded:
        if message.subject == subjects.event(POOL, "chunk.allocated"):
            announced |= set(codec.unpack(m.ChunkAllocated, message.data).chunks)
        elif ".reply." in message.subject:
            granted = {n for n, _ in codec.unpack(m.Acquired, message.data).chunks}
            assert granted
            assert granted <= announced
            replies += 1
    assert replies == PODS * ACQUIRES


class Storm:
    """Bare pods that acquire and release as they like, some of which fall silent for ever."""

    def __init__(self, asking: Requester, seed: int) -> None:
        self._asking, self._random = asking, random.Random(seed)
        self._held: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
        self.done = 0

    async def pod(self, name: str, operations: int, *, dies_after: int | None = None) -> None:
        key = (name, (await self._asking.open(name, request_id=f"{name}-{self.done}")).incarnation)
        renewing = asyncio.create_task(self._renew(key))
        try:
            for number in range(operations):
                if number == dies_after:
                    return
                await self._one(key, number)
                self.done += 1
            await asyncio.Event().wait()
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _one(self, key: tuple[str, int], number: int) -> None:
        held = self._held[key]
        if held and self._random.random() < 0.4:
            listed = m.ChunkList(*key, tuple(held[:1]))
            await self._asking.ask(self._asking.subjects.pool(POOL, "release"), listed, m.Released)
            del held[:1]
            return
        request = m.Acquire(*key, self._random.randint(1, 3), f"{key[0]}-{key[1]}-{number}")
        acquired = await self._asking.ask(self._asking.subjects.pool(POOL, "acquire"), request, m.Acquired)
        held.extend(acquired.chunks)

    async def _renew(self, key: tuple[str, int]) -> None:
        while True:
            await self._asking.renew(*key)
            await asyncio.sleep(0.5)


async def test_after_a_storm_every_demux_equals_mongodb(domain: Domain) -> None:
    """G5: 2,000 acquires and releases of 25 pods, five of which die on the way and three come back."""
    async with domain.served() as asking, connected(domain) as early, asyncio.TaskGroup() as tasks:
        storm = Storm(asking, seed=20)
        living = [tasks.create_task(storm.pod(f"amf-{i}", 90)) for i in range(20)]
        dying = [tasks.create_task(storm.pod(f"smf-{i}", 90, dies_after=40)) for i in range(5)]
        await within(asyncio.wait(dying), STORM_SECONDS)
        living += [tasks.create_task(storm.pod(f"smf-{i}", 20)) for i in range(3)]
        async with connected(domain) as late:
            await asking.seen(lambda: storm.done >= 20 * 90 + 5 * 40 + 3 * 20, STORM_SECONDS)
            await asking.seen(lambda: len(asking.of(m.PodDown)) >= 5)
            await no_orphans(asking)
            await demuxes_equal_mongodb(domain, early, late)
            assert early.chunks()
        for task in living:
            task.cancel()
        assert storm.done >= 2000
        assert {event.pod.name for event in asking.of(m.PodDown)} == {f"smf-{i}" for i in range(5)}
        assert asking.of(m.ChunkClaimed)


def connected(domain: Domain) -> Demux:
    return Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS)


async def no_orphans(asking: Requester) -> None:
    """Wait until every chunk has a living owner."""
    async with asyncio.timeout(SEEN_SECONDS):
        while (await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)).pools[0].orphans:
            seen = len(asking.events)
            await asking.seen(lambda: len(asking.events) > seen)  # noqa: B023


async def test_a_thousand_pods_that_start_at_once_are_served_in_a_few_round_trips(
    domain: Domain,
) -> None:
    """Requests of one moment share one bulk write: sessions, first requests and chunks."""
    async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:  # all in this one process
        before = await mongo_commands(domain)
        names = [f"amf-{i}" for i in range(1000)]
        opened = await asyncio.gather(*[asking.open(name, timeout=SEEN_SECONDS) for name in names])
        incarnations = {answer.incarnation for answer in opened}
        acquired = await asyncio.gather(
            *[
                asking.acquire(n, o.incarnation, 1, n, timeout=SEEN_SECONDS)
                for n, o in zip(names, opened, strict=True)
            ]
        )
        after = await mongo_commands(domain)
        assert len(incarnations) == 1000
        assert len({n for answer in acquired for n, _ in answer.chunks}) == 1000
        assert after - before < 100


async def mongo_commands(domain: Domain) -> int:
    """Inserts and updates that MongoDB was sent, as commands."""
    async with mongo_client(domain) as client:
        commands = (await client.admin.command("serverStatus"))["metrics"]["commands"]
        return int(commands["insert"]["total"]) + int(commands["update"]["total"])


async def test_a_request_that_waits_for_the_store_holds_up_no_other() -> None:
    """MongoDB stands still: one pod's acquire waits, while another's question is answered at once."""
    async with Stack() as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:
            pod = (await asking.open("amf-1")).incarnation
            await asking.renew("amf-1", pod)
            member = stack.mongo.members[0]
            member.pause()
            request = m.Acquire("amf-1", pod, 1, "waits")
            subject = asking.subjects.pool(POOL, "acquire")
            answered = 0
            try:
                waiting = asyncio.create_task(asking.ask(subject, request, m.Acquired))
                while answered < 20 and not waiting.done():  # the agent waits only so long
                    pools = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
                    assert pools.leader.term == 1
                    answered += 1
                assert answered > 1
            finally:
                member.resume()
            await asyncio.wait([waiting])
            assert (await _until_served(asking, subject, request)).chunks


async def test_a_store_that_stays_away_is_a_typed_error_within_the_requests_deadline() -> None:
    """`store_unavailable` and `retry`, while the agent still leads; and the same request then succeeds."""
    async with Stack() as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:
            pod = (await asking.open("amf-1")).incarnation
            await asking.renew("amf-1", pod)
            member = stack.mongo.members[0]
            member.pause()
            try:
                request = m.Acquire("amf-1", pod, 1, "again")
                subject = asking.subjects.pool(POOL, "acquire")
                failed = await _failure(asking, subject, request)
                assert (failed.failure.error, failed.failure.retry) == ("store_unavailable", True)
            finally:
                member.resume()
            acquired = await _until_served(asking, subject, request)
            assert len(acquired.chunks) == 1
            # The write thought lost may still come late: then the pod owns a chunk that it has not heard
            # of, and this list is how it learns of it. It never belongs to anybody else.
            ref = m.SessionRef("amf-1", pod)
            before = (await asking.renew("amf-1", pod)).held[POOL][0]
            listed = await asking.ask(asking.subjects.session("chunks"), ref, m.SessionChunks)
            assert {(POOL, *chunk, None) for chunk in acquired.chunks} <= set(listed.chunks)
            assert before <= len(listed.chunks) <= (await asking.renew("amf-1", pod)).held[POOL][0] <= 2


async def _failure(asking: Requester, subject: str, request: m.Acquire) -> Failed:
    try:
        await asking.ask(subject, request, m.Acquired, SEEN_SECONDS)
    except Failed as error:
        return error
    raise AssertionError("the request was served although the store stands still")


async def _until_served(asking: Requester, subject: str, request: m.Acquire) -> m.Acquired:
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            try:
                return await asking.ask(subject, request, m.Acquired)
            except Failed:
                continue
