"""No agent is there for a mixed fleet: for longer than a Go keepalive lasts, or than a mirror."""

import pytest

from drsm_agent.core import keepalives
from drsm_sdk.changes import Lost, SessionLost
from drsm_sdk.wire import messages as m
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, QUICK, TEST_SECONDS, Fleet, chunks, expect

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_no_id_is_issued_twice_when_the_agent_is_away_until_mirrors_expire_and_go_pods_claim(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody prolongs the mirrors, by which time the SDK pod's lease has run out, too. What Go pods claimed
    is theirs; the session lives on, and gets other chunks."""
    monkeypatch.setattr(keepalives, "TTL_MONITOR", 1.0)  # as here it looks each second
    agent = await fleet.agent(**QUICK)
    demux, record = await fleet.demux(), await fleet.record()
    await fleet.go("amf-1")
    pod = await fleet.sdk("amf-2")
    await pod.allocate(10)
    await fleet.mirrored(pod)
    await record.renewed("amf-1", 1)
    incarnation, before = pod.drsm.incarnation, await fleet.chunks_of("amf-2")
    await fleet.stop(agent)
    await record.seen("the TTL monitor", lambda: record.deletes("amf-2"), GO_SEEN_SECONDS)
    await fleet.until("a claim by the Go pod", lambda owners: {owners[n] for n in before} == {"amf-1"})
    await fleet.agent(**QUICK)
    await expect("a pod that heard of it", lambda: pod.of(Lost, SessionLost))
    assert (pod.of(SessionLost), pod.drsm.incarnation) == ([], incarnation)
    assert not chunks(await pod.allocate(10)) & before
    await fleet.agrees(demux)


async def test_nothing_moves_while_the_agent_is_away_for_longer_than_a_go_keepalive_lasts(
    fleet: Fleet,
) -> None:
    """Who renewed meanwhile was never silent, and mirrors reach further than that. Both go on from stock."""
    agent = await fleet.agent(**PATIENT)
    demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
    go, pod = await fleet.go("amf-1"), await fleet.sdk("amf-2")
    await go.allocate(10)
    await pod.allocate(10)
    await fleet.renewed(go)
    incarnation = pod.drsm.incarnation
    await fleet.stop(agent)
    await go.run(20)
    pod.run(20)
    await record.renewed("amf-1", 6)
    await fleet.agent(**PATIENT)
    issued = len(fleet.ledger.of("amf-2"))
    await expect("a pod that goes on", lambda: len(fleet.ledger.of("amf-2")) >= issued + 100)
    await record.renewed("amf-1", 2)
    assert (record.claims(), asking.of(m.PodDown)) == ({}, [])
    assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])
    await go.rest()
    await pod.rest()
    await fleet.agrees(demux)
