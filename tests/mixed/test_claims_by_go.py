"""Go pods take from SDK pods what they should not: by a delete that was meant for another, or made by
hand."""

import pytest

from drsm_sdk.changes import Lost, SessionLost
from drsm_sdk.wire import messages as m
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, TEST_SECONDS, Fleet, SdkPod, chunks, expect, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.mark.parametrize("instance", ["nf", ""])
async def test_delete_pod_of_an_instance_that_sdk_pods_share_does_nothing_to_them(
    fleet: Fleet, instance: str
) -> None:
    """The pods of a network function share its instance. AMF calls it when the NRF says that the instance is
    down: it deletes all keepalives that say so, and Go pods then claim all their chunks."""
    await fleet.agent(**PATIENT)
    asking, record = await fleet.requester(), await fleet.record()
    caller = await fleet.go("amf-1", instance="nf-go")
    meant = await fleet.go("amf-4", instance=instance)
    pods = [await fleet.sdk(name, instance=instance) for name in ("amf-2", "amf-3")]
    for pod in pods:
        await pod.allocate(10)
        await fleet.mirrored(pod)
    await fleet.renewed(meant)
    lives = [pod.drsm.incarnation for pod in pods]
    await caller.delete_pod(instance)
    await asking.seen(lambda: asking.of(m.PodDown))
    await record.renewed("amf-1", 1)
    assert [record.deletes(name) for name in ("amf-2", "amf-3")] == [[], []]
    assert [(down.pod.name, down.reason) for down in asking.of(m.PodDown)] == [("amf-4", "deleted")]
    assert record.claims() == {}
    assert [pod.drsm.incarnation for pod in pods] == lives


async def test_an_sdk_pod_loses_the_chunks_that_go_pods_claim_and_not_its_session(fleet: Fleet) -> None:
    """An operator has deleted its mirror. What Go pods claimed it may not issue from; all else goes on.
    When the Go pod dies, the chunk is held for as long as the Go pod might come back."""
    await fleet.agent(**PATIENT)
    demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
    go = await fleet.go("amf-1")
    pod = await fleet.sdk("amf-2")
    ids = await pod.allocate(10)
    await fleet.mirrored(pod)
    await record.renewed("amf-1", 1)
    incarnation, before = pod.drsm.incarnation, await fleet.chunks_of("amf-2")
    await fleet.delete("amf-2")
    await fleet.until("a claim by the Go pod", lambda owners: {owners[n] for n in before} == {"amf-1"})
    await expect("a pod that heard of it", lambda: pod.of(Lost, SessionLost))
    assert (pod.of(SessionLost), lost_by(pod)) == ([], before)
    line = await fleet.told("claimed_by_go")
    assert "amf-2" in str(line)
    new = await pod.allocate(10)
    assert not chunks(new) & before
    assert pod.drsm.incarnation == incarnation
    await fleet.agrees(demux)
    assert (owner_of(demux, ids[0]).name, owner_of(demux, new[0]).name) == ("amf-1", "amf-2")
    await go.kill()
    claims = await asking.seen(
        lambda: [
            c for c in asking.of(m.ChunkClaimed) if c.previous.name == "amf-1" and set(c.chunks) & before
        ],
        GO_SEEN_SECONDS,
    )
    assert {claim.owner.incarnation for claim in claims} == {incarnation}
    assert min(claim.hold_ms for claim in claims) >= 3_600_000
    await fleet.until("a mirror's owner", lambda owners: set(owners.values()) == {"amf-2"})


async def test_of_several_chunks_only_that_is_lost_which_a_go_pod_claimed(fleet: Fleet) -> None:
    """Here the claim of one is written as a Go pod writes it; a real one claims all that it knows of."""
    await fleet.agent(**PATIENT)
    go = await fleet.go("amf-1")
    await fleet.renewed(go)
    pod = await fleet.sdk("amf-2")
    ids = await pod.allocate(1500)
    incarnation, n = pod.drsm.incarnation, ids[0] >> 10
    await fleet.change(f"chunkid-{n}", podId=go.name, podIp=go.ip, podInstance=go.instance)
    await expect("a pod that heard of it", lambda: pod.of(Lost, SessionLost))
    assert (pod.of(SessionLost), lost_by(pod)) == ([], {n})
    assert pod.drsm.incarnation == incarnation
    assert {pod.pool.valid(id_) for id_ in ids if id_ >> 10 != n} == {True}
    assert {pod.pool.valid(id_) for id_ in ids if id_ >> 10 == n} == {False}


def lost_by(pod: SdkPod) -> set[int]:
    return {n for lost in pod.heard if isinstance(lost, Lost) for n in lost.chunks}
