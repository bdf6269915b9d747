"""An SDK pod is gone and only Go pods remain: they claim its chunks once its mirror goes, and only then."""

import asyncio
from functools import partial
from typing import Any

import pytest

from drsm_agent import mirrors
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, TEST_SECONDS, Fleet, expect, looked_at, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)
SOON_SECONDS = 30.0
HOLD_SECONDS = 20.0
TWENTY: dict[str, Any] = PATIENT | {"allocation_ttl": HOLD_SECONDS}


async def test_when_the_last_sdk_pod_leaves_in_good_order_go_pods_have_its_chunks_within_seconds(
    fleet: Fleet,
) -> None:
    """It issues nothing any more, so nobody needs to wait; and each chunk is claimed once."""
    await fleet.agent(**PATIENT)
    demux, record = await fleet.demux(), await fleet.record()
    go = await fleet.go("amf-1")
    pod = await fleet.sdk("amf-2")
    ids = await pod.allocate(1500)
    await fleet.mirrored(pod)
    await record.renewed("amf-1", 1)
    left = await fleet.chunks_of("amf-2")
    await pod.leave()
    await fleet.until("all at the Go pod", lambda owners: set(owners.values()) == {"amf-1"}, SOON_SECONDS)
    assert {n: owners for n, owners in record.claims().items() if n in left} == {n: ["amf-1"] for n in left}
    await fleet.agrees(demux)
    await fleet.known_to(go, ids, {"amf-1"})
    await expect("a scan by the Go pod", lambda: go.asked)


async def test_the_chunks_of_an_sdk_pod_that_died_are_left_to_go_pods_once_nobody_can_issue_from_them(
    fleet: Fleet,
) -> None:
    """It may only be cut off, and go on issuing for `A`. Go pods know no hold, so that the agent keeps the
    mirror for as long; then it goes, though chunks name it, and long before it would expire."""
    await fleet.agent(**TWENTY)
    record = await fleet.record()
    await fleet.go("amf-1")
    victim = await fleet.process("amf-2")
    await victim.allocate(10)
    await record.renewed("amf-1", 1)
    clock = asyncio.get_running_loop()
    await victim.kill()
    killed = clock.time()
    await fleet.until(
        "all at the Go pod", lambda owners: set(owners.values()) == {"amf-1"}, HOLD_SECONDS + SOON_SECONDS / 2
    )
    assert clock.time() - killed >= HOLD_SECONDS


async def test_the_end_of_a_go_pod_of_its_name_shows_nobody_the_death_of_an_sdk_pod_that_may_still_issue(
    fleet: Fleet,
) -> None:
    """Its Go namesake goes on renewing after the SDK pod's death, and then ends too; an AMF that hears of it
    calls `DeletePod`. What names the pod stays until nobody can issue from it."""
    await fleet.agent(**TWENTY)
    record, demux = await fleet.record(), await fleet.demux()
    peer, namesake = await fleet.go("amf-1"), await fleet.go("amf-2", instance="nf-2")
    await namesake.allocate(10)
    await fleet.renewed(namesake)
    victim = await fleet.process("amf-2")
    ids = await victim.allocate(10)
    clock = asyncio.get_running_loop()
    await victim.kill()
    killed = clock.time()
    await expect("its death", lambda: owner_of(demux, ids[0]).state == "down", SOON_SECONDS)
    await record.renewed("amf-2", 1)
    await looked_at(
        "the answer to it",
        partial(fleet.keepalive, "amf-2"),
        lambda keepalive: keepalive["podInstance"].startswith("drsm:"),
    )
    await namesake.kill()
    await peer.delete_pod("nf-2")
    assert record.deletes("amf-2") == []
    await fleet.until(
        "all at the peer", lambda owners: set(owners.values()) == {"amf-1"}, HOLD_SECONDS + GO_SEEN_SECONDS
    )
    assert clock.time() - killed >= HOLD_SECONDS


async def test_a_setting_leaves_the_chunks_of_a_dead_sdk_pod_to_go_pods_sooner(fleet: Fleet) -> None:
    """For who would rather pay with an id per chunk and five seconds than have sessions that nobody
    serves."""
    await fleet.agent(**PATIENT, go_claims_after=2.0)
    record = await fleet.record()
    await fleet.go("amf-1")
    victim = await fleet.process("amf-2")
    await victim.allocate(10)
    await record.renewed("amf-1", 1)
    await victim.kill()
    await fleet.until("all at the Go pod", lambda owners: set(owners.values()) == {"amf-1"}, SOON_SECONDS)


async def test_a_go_pod_that_did_not_hear_of_the_delete_is_shown_it_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go pods remember no place in the stream of changes: what happens while they are not connected they
    never hear of. (The one that lives here at the delete is a demux, which claims nothing.)"""
    monkeypatch.setattr(mirrors, "SHOWN_AGAIN", 3.0)
    await fleet.agent(**PATIENT, go_claims_after=2.0)
    record = await fleet.record()
    demux = await fleet.go("amf-demux", demux=True)
    await fleet.renewed(demux)
    victim = await fleet.process("amf-2")
    await victim.allocate(10)
    await victim.kill()
    await record.seen("the mirror's delete", lambda: record.deletes("amf-2"), SOON_SECONDS)
    await fleet.go("amf-1")
    await fleet.until("all at the Go pod", lambda owners: set(owners.values()) == {"amf-1"}, GO_SEEN_SECONDS)
