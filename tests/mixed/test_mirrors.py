"""What Go pods see of SDK pods, in time and for long enough."""

import time
from datetime import UTC, datetime
from functools import partial

import pytest

from drsm_agent import service
from drsm_sdk.changes import Lost, SessionLost
from tests.mixed.fleet import PATIENT, TEST_SECONDS, Fleet
from tests.mixed.record import Record

pytestmark = pytest.mark.timeout(TEST_SECONDS)
HOUR = 3600.0
LEASE_SECONDS = 300.0
"""`A` by default; here `W` is 0."""


@pytest.mark.parametrize("ahead", [-HOUR, HOUR], ids=["slow", "fast"])
async def test_an_agents_wall_clock_decides_nothing_about_when_a_mirror_expires(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """MongoDB compares `expireAt` with its own. An hour too early, and each mirror is deleted as soon as it
    is written, again and again, while the pod lives; an hour too late, and nobody notices a death."""
    wrong = partial(service.Agent, wall_clock=lambda: time.time() + ahead)
    monkeypatch.setattr(service, "Agent", wrong)
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    await fleet.go("amf-1")
    pod = await fleet.sdk("amf-2")
    await pod.allocate(10)
    await fleet.mirrored(pod)
    await record.renewed("amf-1", 3)
    assert (record.deletes("amf-2"), record.claims()) == ([], {})
    assert pod.of(SessionLost, Lost) == []
    left = (
        (await fleet.keepalive("amf-2"))["expireAt"].replace(tzinfo=UTC) - datetime.now(UTC)
    ).total_seconds()
    assert LEASE_SECONDS < left <= 4 * LEASE_SECONDS


async def test_a_pod_has_its_mirror_before_its_first_chunk_in_each_life(fleet: Fleet) -> None:
    """As long as the name has none, or one of the life before, a late delete of that one takes the chunks
    of the new life, too: Go pods go by the name."""
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    go = await fleet.go("amf-1")
    await fleet.renewed(go)
    lives = []
    for _ in range(2):
        pod = await fleet.sdk("amf-2")
        await pod.allocate(10)
        await fleet.mirrored(pod)
        lives.append(pod.drsm.incarnation)
        await pod.leave()
    for incarnation in lives:
        assert record.mirrors("amf-2", incarnation), f"no mirror of incarnation {incarnation}"
        mirrored = record.changes.index(record.mirrors("amf-2", incarnation)[0])
        assert mirrored < first_chunk(record, incarnation)


def first_chunk(record: Record, incarnation: int | None) -> int:
    """When it was first granted one, or was given one by a claim."""
    return next(
        i
        for i, change in enumerate(record.changes)
        if change.owner and change.fields.get("drsm", {}).get("incarnation") == incarnation
    )
