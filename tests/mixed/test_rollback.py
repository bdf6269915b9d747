"""A Go pod under the name of an SDK pod that has left: the way back of a StatefulSet."""

from typing import Any

import pytest

from drsm_sdk.changes import Lost, SessionLost
from drsm_sdk.wire import messages as m
from tests.mixed.fleet import PATIENT, QUICK, TEST_SECONDS, Fleet, chunks, expect, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)
PLACE: dict[str, Any] = {"ip": "10.9.9.9", "instance": "nf"}
"""Of both pods: a mirror cannot be told from a Go pod's keepalive by who it says that it is."""


async def test_a_go_pod_that_takes_over_an_sdk_pods_name_address_and_instance_is_live(fleet: Fleet) -> None:
    """Whoever routes to it has to know that it lives, or drops its sessions for as long as it does."""
    await fleet.agent(**PATIENT)
    demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
    pod = await fleet.sdk("amf-1", **PLACE)
    await pod.allocate(10)
    await fleet.mirrored(pod)
    await pod.leave()
    go = await fleet.go("amf-1", **PLACE)
    (id_,) = await go.allocate(1)
    await record.renewed("amf-1", 1)
    await expect("a live Go pod", lambda: owner_of(demux, id_).state == "live")
    await record.renewed("amf-1", 6)
    assert owner_of(demux, id_).state == "live"
    assert [down.pod.incarnation for down in asking.of(m.PodDown) if down.pod.incarnation == 0] == []
    assert record.deletes("amf-1") == []


async def test_a_go_pod_keeps_its_chunks_where_the_sdk_pod_of_its_name_is_buried(fleet: Fleet) -> None:
    """Long after the SDK pod's `A + W` another SDK pod lives, and would take the chunks of a dead one. The
    Go pod allocates before its first keepalive: so long only the mirror tells that the name is in use."""
    await fleet.agent(**QUICK)
    record = await fleet.record()
    heir = await fleet.sdk("amf-9")
    pod = await fleet.sdk("amf-1", **PLACE)
    await pod.allocate(10)
    await fleet.mirrored(pod)
    go = await fleet.go("amf-1", **PLACE)
    await pod.leave()
    ids = await go.allocate(1500)
    await go.run(50)
    await record.renewed("amf-1", 6)
    first = next(change for change in record.grants("amf-1") if change.chunk in chunks(ids))
    assert [gone for gone in record.deletes("amf-1") if record.before(first, gone)] == []
    owners = await fleet.owners()
    assert {owners[n] for n in chunks(fleet.ledger.of("amf-1")) & chunks(ids)} == {"amf-1"}
    assert heir.of(SessionLost, Lost) == []
