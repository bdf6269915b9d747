"""The original's own acceptance list, line by line, on real servers; a killed pod is a killed process."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import DuplicateKeyError

from drsm_agent.demo.process import PodProcess
from drsm_sdk import Demux, Drsm, Owner, Pod, Pool
from drsm_sdk.wire import messages as m
from tests.harness import (
    NONE_EXPIRES,
    POOL,
    SEEN_SECONDS,
    Domain,
    Failed,
    eventually,
    mongo_client,
    within,
)


@asynccontextmanager
async def pod(domain: Domain, name: str, ip: str = "10.0.0.1") -> AsyncIterator[Pool]:
    """A pod of this test's process that has joined the pool."""
    identity = Pod(name=name, ip=ip, instance=f"nf-{name}")
    connecting = Drsm.connect(domain.nats_url, identity, prefix=domain.prefix, timeout=SEEN_SECONDS)
    async with connecting as drsm:
        yield await drsm.join(POOL)


def demux_of(domain: Domain) -> Demux:
    return Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS)


@asynccontextmanager
async def pod_process(domain: Domain, name: str, folder: Path) -> AsyncIterator[PodProcess]:
    """A pod that can be killed."""
    process = await PodProcess.start(
        name,
        nats=domain.nats_url,
        pool=POOL,
        contexts=folder / "contexts.sqlite",
        log=folder / f"{name}.log",
        prefix=domain.prefix,
    )
    try:
        await process.heard("joined")
        yield process
    finally:
        await process.stop()


async def event(events: AsyncIterator[Any], kind: type[Any]) -> Any:
    """The next event of a kind."""

    async def find() -> Any:
        async for found in events:
            if isinstance(found, kind):
                return found
        raise AssertionError("the events ended")

    return await within(find())


async def test_pods_discover_each_other(domain: Domain) -> None:
    """Whoever joins knows who is there, and is known to those who were."""
    async with (
        domain.agent(),
        pod(domain, "amf-1", "10.0.0.1") as one,
        pod(domain, "amf-2", "10.0.0.2") as two,
    ):
        async with demux_of(domain) as demux:
            consumers: list[Pool | Demux] = [one, two, demux]
            await eventually(lambda: all(len(consumer.pods()) == 2 for consumer in consumers))
            for consumer in consumers:
                assert [(owner.name, owner.ip, owner.state) for owner in consumer.pods()] == [
                    ("amf-1", "10.0.0.1", "live"),
                    ("amf-2", "10.0.0.2", "live"),
                ]


async def test_an_allocation_is_notified_to_the_others(domain: Domain) -> None:
    """By an event, before the id can be used; the others then map it to its owner."""
    async with domain.agent(), demux_of(domain) as demux, pod(domain, "amf-2") as other:
        events = demux.events()
        async with pod(domain, "amf-1") as pool:
            id_ = pool.allocate_nowait()
            while (allocated := await event(events, m.ChunkAllocated)).owner.name != "amf-1":
                pass
            assert id_ >> 10 in allocated.chunks
            for seen_by in (demux, pool):
                owner = owner_of(seen_by, id_)
                assert (owner.name, owner.state) == ("amf-1", "live")
            await eventually(lambda: other.owner(id_))
            assert owner_of(other, id_).name == "amf-1"


async def test_pod_down_is_detected(domain: Domain, tmp_path: Path) -> None:
    """A SIGKILL is seen as `pod.down` of just that incarnation, also when nobody is there to claim."""
    async with domain.agent(), demux_of(domain) as demux, pod_process(domain, "amf-1", tmp_path) as victim:
        id_ = (await victim.ask("allocate 10", "allocated"))["first"]
        incarnation = (await victim.heard("joined"))["incarnation"]
        events = demux.events()
        victim.kill()
        down = await event(events, m.PodDown)
        assert (down.pod.name, down.pod.incarnation, down.reason) == ("amf-1", incarnation, "expired")
        assert owner_of(demux, id_).state == "down"


async def test_a_claim_changes_the_owner_and_the_others_learn_it_by_notification(
    domain: Domain, tmp_path: Path
) -> None:
    """Each chunk of the dead pod is claimed once, by a survivor that is told so."""
    async with (
        domain.agent(),
        demux_of(domain) as demux,
        pod(domain, "amf-2") as survivor,
        pod_process(domain, "amf-1", tmp_path) as victim,
    ):
        id_ = (await victim.ask("allocate 10", "allocated"))["first"]
        incarnation = (await victim.heard("joined"))["incarnation"]
        events, changes = demux.events(), survivor.changes()
        victim.kill()
        claimed = await event(events, m.ChunkClaimed)
        assert id_ >> 10 in claimed.chunks
        assert (claimed.owner.name, claimed.previous.incarnation) == ("amf-2", incarnation)
        change = await within(anext(changes))
        assert change.marked
        assert set(change.chunks) == set(claimed.chunks)
        for seen_by in (demux, survivor):
            owner = owner_of(seen_by, id_)
            assert (owner.name, owner.state) == ("amf-2", "live")


async def test_a_late_starter_learns_what_was_there_before(domain: Domain) -> None:
    """A demux and a pod that start last know every owner from the snapshot."""
    async with domain.agent(), pod(domain, "amf-1") as pool:
        ids = [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(1500)]
        async with demux_of(domain) as demux, pod(domain, "amf-2") as late:
            for consumer in (demux, late):
                assert {owner_of(consumer, id_).name for id_ in ids} == {"amf-1"}


async def test_two_allocators_that_pick_the_same_number_get_different_chunks(domain: Domain) -> None:
    """The insert succeeds for one of them; the other gets another chunk, at the cost of one more round."""
    async with domain.served(**NONE_EXPIRES) as asking, mongo_client(domain) as client:
        collection = client[domain.database][POOL]
        incarnation = (await asking.open("amf-1")).incarnation
        await asking.renew("amf-1", incarnation)
        granted: set[int] = set()
        conflicts = 0
        for start in itertools.count(0, 64):
            rival = [_go_chunk(n) for n in range(start, start + 64)]
            inserted, acquired = await asyncio.gather(
                _insert(collection, rival), asking.acquire("amf-1", incarnation, 32, f"r{start}")
            )
            numbers = {n for n, _ in acquired.chunks}
            assert len(numbers) == 32
            assert not numbers & inserted
            assert not numbers & granted
            granted |= numbers
            conflicts += 64 - len(inserted)
            if conflicts or start > 6400:
                break
        assert conflicts
        owners = {doc["_id"]: doc["podId"] async for doc in collection.find({"type": "chunk"})}
        assert {int(key[8:]) for key, owner in owners.items() if owner == "amf-1"} == granted


def _go_chunk(n: int) -> dict[str, Any]:
    """A chunk as Go DRSM writes it."""
    key = f"chunkid-{n}"
    identity = {"podId": "go-amf", "podInstance": "nf", "podIp": "10.9.9.9"}
    return {"_id": key, "type": "chunk", "chunkId": key} | identity


async def _insert(collection: Any, documents: list[dict[str, Any]]) -> set[int]:
    """Insert one by one, as Go pods do; the numbers that nobody had taken."""
    inserted = set()
    for document in documents:
        try:
            await collection.insert_one(document)
            inserted.add(int(document["_id"][8:]))
        except DuplicateKeyError:
            continue
    return inserted


async def test_a_demux_cannot_allocate(domain: Domain) -> None:
    """It has no method for it, opens no session, and asks for nothing but snapshots."""
    allocating = {"allocate", "allocate_nowait", "release", "join", "acquire"}
    assert not allocating & set(dir(Demux))
    async with domain.served() as asking:
        asked: list[str] = []

        async def note(message: Any) -> None:
            asked.append(message.subject)

        await asking.client.subscribe(f"{domain.prefix}.rpc.>", cb=note)
        await asking.client.flush()
        async with demux_of(domain) as demux:
            assert demux.owner(1) is None
        await asking.client.flush()
        own = {subject for subject in asked if not subject.endswith("agent.probe")}
        assert own == {asking.subjects.pool(POOL, "snapshot")}
        with pytest.raises(Failed, match="session_lost"):
            await asking.acquire("demux", 1)


async def test_identity_is_ip_and_name_and_incarnation(domain: Domain) -> None:
    """A pod that comes back under its name with another address is another owner, and whole in events."""
    async with domain.agent(), demux_of(domain) as demux:
        async with pod(domain, "amf-1", "10.0.0.1") as pool:
            id_ = await pool.allocate()
            await eventually(lambda: demux.owner(id_))
            first = owner_of(demux, id_)
        async with pod(domain, "amf-1", "10.0.0.2") as pool:
            id_ = await pool.allocate()
            await eventually(lambda: demux.owner(id_))
            second = owner_of(demux, id_)
            own = pool.owner(id_)
    assert (first.name, first.ip, first.instance) == ("amf-1", "10.0.0.1", "nf-amf-1")
    assert (second.name, second.ip, second.instance) == ("amf-1", "10.0.0.2", "nf-amf-1")
    assert second.incarnation > first.incarnation
    assert own == second


def owner_of(consumer: Demux | Pool, id_: int) -> Owner:
    """The owner, which there must be."""
    owner = consumer.owner(id_)
    assert owner is not None
    return owner


async def test_more_than_1000_ids_make_a_new_chunk(domain: Domain) -> None:
    """A chunk has 1024 numbers, of which 1000 are issued; id 0 never is."""
    async with domain.agent(), pod(domain, "amf-1") as pool, demux_of(domain) as demux:
        ids = [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(2500)]
        assert len(set(ids)) == 2500
        assert 0 not in ids
        assert max(id_ & 1023 for id_ in ids) == 999
        assert len({id_ >> 10 for id_ in ids}) >= 3
        await eventually(lambda: all(demux.owner(id_) for id_ in ids))
        assert {owner_of(demux, id_).name for id_ in ids} == {"amf-1"}
