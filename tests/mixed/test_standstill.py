"""Go pods that stand still for longer than anybody waits for them, and then go on issuing from what others
have."""

import pytest

from drsm_sdk.changes import SessionLost
from drsm_sdk.wire import messages as m
from tests.mixed.fleet import GO_SEEN_SECONDS, QUICK, TEST_SECONDS, Fleet, chunks, expect, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_no_id_is_issued_twice_when_a_go_pod_stood_still_and_its_chunk_goes_back_to_it(
    fleet: Fleet,
) -> None:
    """It has no lease, so it goes on issuing from what was claimed meanwhile. The claimer holds such a
    chunk for an hour, and of one from which nothing was issued the Go pod is the owner again."""
    await fleet.agent(**QUICK)
    demux, asking = await fleet.demux(), await fleet.requester()
    go = await fleet.go("amf-1")
    old = chunks(await go.allocate(300))
    await fleet.renewed(go)
    pod = await fleet.sdk("amf-2")
    incarnation = pod.drsm.incarnation
    pod.run(300)
    go.pause()
    await fleet.until("a claim", lambda owners: {owners[n] for n in old} == {"amf-2"}, GO_SEEN_SECONDS)
    await goes_on(fleet, "amf-2", 2000)
    go.go_on()
    await go.run(100)
    await fleet.until("a chunk that is back", lambda owners: {owners[n] for n in old} == {"amf-1"})
    line = await fleet.told("go_pod_came_back")
    assert "amf-1" in line.values()
    assert str(min(old)) in str(line)
    await goes_on(fleet, "amf-1", 500)
    await fleet.agrees(demux)
    assert owner_of(demux, min(old) << 10 | 1).state == "live"
    assert (pod.drsm.incarnation, pod.of(SessionLost)) == (incarnation, [])
    assert (
        min(claim.hold_ms for claim in asking.of(m.ChunkClaimed) if claim.previous.name == "amf-1")
        >= 3_600_000
    )


async def test_a_chunk_that_two_sdk_pods_claimed_in_turn_is_not_issued_from_when_its_go_pod_comes_back(
    fleet: Fleet,
) -> None:
    """The claimer dies as well before the Go pod goes on: where a chunk came from is not forgotten with
    it."""
    await fleet.agent(**QUICK)
    go = await fleet.go("amf-1")
    old = chunks(await go.allocate(300))
    await fleet.renewed(go)
    victim = await fleet.process("amf-2")
    go.pause()
    await fleet.until("a claim", lambda owners: {owners[n] for n in old} == {"amf-2"}, GO_SEEN_SECONDS)
    heir = await fleet.sdk("amf-3")
    heir.run(300)
    await victim.kill()
    await fleet.until("another claim", lambda owners: {owners[n] for n in old} == {"amf-3"})
    await goes_on(fleet, "amf-3", 2000)
    go.go_on()
    await go.run(100)
    line = await fleet.told("go_pod_came_back")
    assert "amf-1" in line.values()
    assert str(min(old)) in str(line)
    await goes_on(fleet, "amf-1", 500)
    await goes_on(fleet, "amf-3", 2000)


async def goes_on(fleet: Fleet, name: str, count: int) -> None:
    """Wait until a pod has issued so many more ids."""
    issued = len(fleet.ledger.of(name))
    await expect(f"{count} more ids of {name}", lambda: len(fleet.ledger.of(name)) >= issued + count)
