"""Go pods and SDK pods that allocate, die and claim at the same time."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from drsm_sdk.changes import Lost, SessionLost
from tests.mixed.fleet import (
    GO_SEEN_SECONDS,
    PATIENT,
    QUICK,
    TEST_SECONDS,
    Fleet,
    expect,
    owner_of,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_both_kinds_allocate_at_once_and_each_knows_whose_the_others_ids_are(fleet: Fleet) -> None:
    """Who picks the number of a chunk first has it, whoever he is; `_id` decides."""
    await fleet.agent(**PATIENT)
    demux = await fleet.demux()
    gos = [await fleet.go(f"go-{i}") for i in range(2)]
    pods = [await fleet.sdk(f"sdk-{i}") for i in range(2)]
    for go in gos:
        await go.run(2000)
    for pod in pods:
        pod.run(2000)
    names = [one.name for one in gos] + [one.name for one in pods]
    await expect(
        "10,000 ids of each", lambda: min(len(fleet.ledger.of(name)) for name in names) >= 10_000, 60
    )
    await asyncio.gather(*[go.rest() for go in gos], *[pod.rest() for pod in pods])
    await fleet.agrees(demux)
    shown = {name: fleet.ledger.of(name)[::500] for name in names}
    for name, ids in shown.items():
        assert {owner_of(demux, id_).name for id_ in ids} == {name}
        for pod in pods:
            assert {owner_of(pod.pool, id_).name for id_ in ids} == {name}
        for go in gos:
            await fleet.known_to(go, ids, {name})


async def test_of_a_pod_that_is_killed_on_either_side_each_chunk_is_claimed_once_by_who_may(
    fleet: Fleet,
) -> None:
    """A Go pod's by the Go pods that see its keepalive expire, or by an SDK pod; an SDK pod's by an SDK
    pod, at once, and by no Go pod. All others go on issuing meanwhile."""
    await fleet.agent(**PATIENT)
    demux, record = await fleet.demux(), await fleet.record()
    go, dying = await fleet.go("go-1"), await fleet.go("go-2")
    pod, victim = await fleet.sdk("sdk-1"), await fleet.process("sdk-2")
    incarnation = pod.drsm.incarnation
    await dying.allocate(2500)
    await victim.allocate(1500)
    await fleet.renewed(dying)
    await go.run(100)
    pod.run(100)
    of_go, of_sdk = await fleet.chunks_of("go-2"), await fleet.chunks_of("sdk-2")
    await asyncio.gather(dying.kill(), victim.kill())
    await fleet.until(
        "chunks of living pods alone",
        lambda owners: set(owners.values()) <= {"go-1", "sdk-1"},
        GO_SEEN_SECONDS,
    )
    await go.rest()
    await pod.rest()
    claims = record.claims()
    assert {n: owners for n, owners in claims.items() if n in of_sdk} == {n: ["sdk-1"] for n in of_sdk}
    assert {n: len(owners) for n, owners in claims.items() if n in of_go} == dict.fromkeys(of_go, 1)
    assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])
    await fleet.agrees(demux)


async def test_go_pods_and_the_agent_claim_at_the_same_moment_and_each_chunk_has_one_new_owner(
    fleet: Fleet,
) -> None:
    """Here the keepalive of a dead Go pod goes just when the agent says that it is silent."""
    await fleet.agent(**QUICK)
    demux, record = await fleet.demux(), await fleet.record()
    heirs = [await fleet.go(f"go-{i}") for i in range(2)]
    pod = await fleet.sdk("sdk-1")
    dying = await fleet.go("go-9")
    await dying.allocate(60_000, timeout=60)
    await fleet.renewed(dying)
    await record.renewed("go-9", 1)
    left = await fleet.chunks_of("go-9")
    assert len(left) == 60
    await dying.kill()
    await fleet.change("go-9", expireAt=datetime.now(UTC) + timedelta(hours=1))
    await fleet.told("go_pod_silent", GO_SEEN_SECONDS)
    await fleet.collection.delete_one({"_id": "go-9"})
    await fleet.until(
        "chunks of living pods alone", lambda owners: "go-9" not in owners.values(), GO_SEEN_SECONDS
    )
    for heir in heirs:
        await record.renewed(heir.name, 1)
    claims = record.claims()
    assert {n: len(claims[n]) for n in left} == dict.fromkeys(left, 1)
    assert pod.of(SessionLost, Lost) == []
    await fleet.agrees(demux)
