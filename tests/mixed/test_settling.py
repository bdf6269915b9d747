"""After the keepalive of a name was deleted: Go pods claim by name alone, as soon as they hear of it."""

import pytest

from drsm_sdk.changes import Lost, SessionLost
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, QUICK, TEST_SECONDS, Fleet, chunks

pytestmark = pytest.mark.timeout(TEST_SECONDS)
CAREFUL_SECONDS = 4.9
"""Five seconds after the keepalive of a name was deleted, all Go pods have seen that; less the tick of a
clock."""


async def test_a_name_whose_keepalive_the_ttl_monitor_has_just_taken_gets_nothing_for_five_seconds(
    fleet: Fleet,
) -> None:
    """The other Go pods are claiming whatever has this name, each when it hears of the delete. A chunk that
    was granted before that would be theirs."""
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    await fleet.go("amf-1")
    former = await fleet.go("amf-2")
    old = await former.allocate(10)
    await fleet.renewed(former)
    await former.kill()
    (gone,) = await record.seen("the TTL monitor", lambda: record.deletes("amf-2"), GO_SEEN_SECONDS)
    before = len(record.grants("amf-2"))
    pod = await fleet.sdk("amf-2")
    new = await pod.allocate(10)
    first, *_ = record.grants("amf-2")[before:]
    assert (first.at - gone.at).total_seconds() >= CAREFUL_SECONDS
    (mirror,) = record.mirrors("amf-2", pod.drsm.incarnation)
    assert record.before(mirror, first)
    await record.renewed("amf-1", 2)
    owners = await fleet.owners()
    assert {owners[n] for n in chunks(new)} == {"amf-2"}
    assert {owners[n] for n in chunks(old)} == {"amf-1"}
    assert pod.of(SessionLost, Lost) == []


async def test_a_name_whose_mirror_the_agent_has_just_deleted_gets_nothing_for_five_seconds(
    fleet: Fleet,
) -> None:
    """The same for an SDK pod that comes back when its chunks were left to the Go pods just now."""
    await fleet.agent(**QUICK)
    record = await fleet.record()
    await fleet.go("amf-1")
    victim = await fleet.process("amf-2")
    await victim.allocate(10)
    await record.renewed("amf-1", 1)
    before = len(record.grants("amf-2"))
    await victim.kill()
    (gone,) = await record.seen("the mirror's delete", lambda: record.deletes("amf-2"), GO_SEEN_SECONDS)
    pod = await fleet.sdk("amf-2")
    new = await pod.allocate(10)
    first, *_ = record.grants("amf-2")[before:]
    assert (first.at - gone.at).total_seconds() >= CAREFUL_SECONDS
    await record.renewed("amf-1", 1)
    assert {(await fleet.owners())[n] for n in chunks(new)} == {"amf-2"}
    assert pod.of(SessionLost, Lost) == []
