"""An SDK pod under the name of a Go pod that has just ended, as when a StatefulSet is migrated, or of one
that lives."""

import pytest

from drsm_sdk.changes import Lost, SessionLost
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, TEST_SECONDS, Fleet, expect, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_an_sdk_pod_that_takes_over_a_go_pods_name_keeps_its_chunks_and_gets_the_old_ones(
    fleet: Fleet,
) -> None:
    """The name's keepalive is never gone, not for a moment: what was the Go pod's becomes the SDK pod's
    mirror. Else the other Go pods would claim the chunks of both."""
    await fleet.agent(**PATIENT)
    demux, record = await fleet.demux(), await fleet.record()
    peer = await fleet.go("amf-1")
    former = await fleet.go("amf-2", instance="nf")
    old = await former.allocate(1500)
    await fleet.renewed(former)
    await former.kill()
    pod = await fleet.sdk("amf-2", instance="nf")
    incarnation = pod.drsm.incarnation
    ids = await pod.allocate(500)
    await record.seen(
        "a mirror in the Go keepalive's place",
        lambda: record.mirrors("amf-2", incarnation) or record.deletes("amf-2"),
        GO_SEEN_SECONDS,
    )
    assert record.deletes("amf-2") == []
    await expect(
        "all ids of the name at the SDK pod",
        lambda: {owner_of(demux, id_).incarnation for id_ in old + ids} == {incarnation},
        GO_SEEN_SECONDS,
    )
    assert [change.kind for change in record.mirrors("amf-2", incarnation)] == ["update"]
    assert (await fleet.keepalive("amf-2"))["podInstance"] == f"drsm:amf-2:{incarnation}"
    assert {owner for owners in record.claims().values() for owner in owners} <= {"amf-2"}
    assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])
    await fleet.known_to(peer, old + ids, {"amf-2"})


async def test_delete_pod_of_the_go_pod_that_had_the_name_does_nothing_to_the_sdk_pod(fleet: Fleet) -> None:
    """An AMF calls it once the NRF tells it that the instance is down, which is when the SDK pod has taken
    the name over; the Go pod is still told to live then."""
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    peer = await fleet.go("amf-1")
    former = await fleet.go("amf-2", instance="nf-2")
    await former.allocate(1500)
    await fleet.renewed(former)
    await former.kill()
    pod = await fleet.sdk("amf-2", instance="nf-2")
    ids = await pod.allocate(500)
    incarnation = pod.drsm.incarnation
    assert (await fleet.keepalive("amf-2"))["drsm"]["go"]["down"] is False
    await peer.delete_pod("nf-2")
    await fleet.known_to(peer, ids, {"amf-2"})
    assert (await fleet.keepalive("amf-2"))["podInstance"] == f"drsm:amf-2:{incarnation}"
    assert record.deletes("amf-2") == []
    assert {owner for owners in record.claims().values() for owner in owners} <= {"amf-2"}
    assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])


async def test_a_go_pod_and_an_sdk_pod_of_one_name_both_keep_what_they_have_and_the_log_says_what_to_do(
    fleet: Fleet,
) -> None:
    """Somebody has started both. The Go pod goes on renewing, so it is no dead one to take over from, and its
    peers would claim from both if its keepalive went away."""
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    await fleet.go("amf-1")
    go = await fleet.go("amf-2")
    theirs = await go.allocate(10)
    await fleet.renewed(go)
    pod = await fleet.sdk("amf-2")
    ours = await pod.allocate(10)
    line = await fleet.told("go_namesake")
    assert "amf-2" in line.values()
    await go.run(50)
    pod.run(50)
    await record.renewed("amf-2", 6)
    await go.rest()
    assert (record.deletes("amf-2"), record.claims()) == ([], {})
    assert pod.of(SessionLost, Lost) == []
    assert {owner.ip for owner in await go.owners(theirs + ours) if owner} == {go.ip, pod.drsm.pod.ip}
    assert len(fleet.lines("go_namesake")) == 1
