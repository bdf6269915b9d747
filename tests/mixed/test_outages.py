"""The leader of a mixed fleet is killed, and MongoDB stands still."""

import asyncio
from pathlib import Path

import pytest

from drsm_agent.embedded import Stack
from drsm_agent.service import running
from drsm_sdk.changes import Lost, SessionLost
from drsm_sdk.wire import messages as m
from tests.acceptance.test_ownership import agent_process
from tests.harness import PROCESS_SECONDS, Domain, requester, within
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, TEST_SECONDS, Fleet, expect, fleet_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)
PAUSE_SECONDS = 8.0
"""Longer than the agent, and pods without it, wait for MongoDB; not as long as its drivers do."""


async def test_no_id_is_issued_twice_when_a_leader_is_killed_together_with_a_go_pod(fleet: Fleet) -> None:
    """The standby sees the silence through, and each chunk is claimed once. All others go on issuing."""
    async with (
        agent_process(fleet.domain) as leader,
        requester(fleet.domain.nats_url, fleet.domain.prefix) as asking,
    ):
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)  # a pod waits only so long for a leader
        async with running(fleet.domain.settings()) as standby:
            demux, record = await fleet.demux(), await fleet.record()
            go, dying = await fleet.go("go-1"), await fleet.go("go-2")
            pod = await fleet.sdk("sdk-1")
            await dying.allocate(1500)
            await go.run(100)
            pod.run(100)
            await fleet.renewed(dying)
            await fleet.mirrored(pod)
            incarnation, left = pod.drsm.incarnation, await fleet.chunks_of("go-2")
            leader.kill()
            await dying.kill()
            await within(standby.leader.leading.wait())
            await fleet.until(
                "chunks of living pods alone",
                lambda owners: set(owners.values()) == {"go-1", "sdk-1"},
                GO_SEEN_SECONDS,
            )
            issued = len(fleet.ledger)
            await expect("both go on", lambda: len(fleet.ledger) >= issued + 1000)
            await go.rest()
            await pod.rest()
            claims = record.claims()
            assert {n: len(claims[n]) for n in left} == dict.fromkeys(left, 1)
            assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])
            assert record.deletes("sdk-1") == []
            await fleet.agrees(demux)
            await pod.leave()


async def test_both_kinds_go_on_after_mongodb_stood_still_and_no_id_is_issued_twice(
    program: Path, tmp_path: Path
) -> None:
    """Requests of both hang meanwhile, and what became of their writes is unknown; nobody is dead for
    that."""
    async with Stack() as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        async with fleet_of(domain, stack.scratch, program, tmp_path) as fleet:
            await fleet.agent(**PATIENT)
            demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
            go, pod = await fleet.go("amf-1"), await fleet.sdk("amf-2")
            await go.run(500)
            pod.run(500)
            await fleet.renewed(go)
            await fleet.mirrored(pod)
            incarnation = pod.drsm.incarnation
            (member,) = stack.mongo.members
            member.pause()
            await asyncio.sleep(PAUSE_SECONDS)
            member.resume()
            issued = {name: len(fleet.ledger.of(name)) for name in ("amf-1", "amf-2")}
            await expect(
                "both go on",
                lambda: all(len(fleet.ledger.of(name)) >= n + 3000 for name, n in issued.items()),
                PROCESS_SECONDS,
            )
            await record.renewed("amf-1", 2)
            await go.rest()
            await pod.rest()
            assert (record.claims(), asking.of(m.PodDown)) == ({}, [])
            assert (pod.drsm.incarnation, pod.of(SessionLost, Lost)) == (incarnation, [])
            await fleet.agrees(demux)
