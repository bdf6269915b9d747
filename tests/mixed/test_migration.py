"""From Go pods to SDK pods."""

import pytest

from drsm_sdk.changes import SessionLost
from tests.mixed.fleet import QUICK, TEST_SECONDS, Fleet, SdkPod
from tests.mixed.migration import BOTH, RATE, SAME, all_at, issued

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@BOTH
async def test_a_go_fleet_is_replaced_by_sdk_pods_one_by_one(fleet: Fleet, names: list[str]) -> None:
    """Every id that was ever issued is routed to a living SDK pod in the end, and no session was lost."""
    await fleet.agent(**QUICK)
    demux = await fleet.demux()
    old = [await fleet.go(name) for name in SAME]
    for go in old:
        await fleet.renewed(go)
        await go.run(RATE)
        await issued(fleet, go.name)
    pods: list[SdkPod] = []
    for go, name in zip(old, names, strict=True):
        await go.kill()
        pods.append(await fleet.sdk(name))
        pods[-1].run(RATE)
        await issued(fleet, name)
    await all_at(fleet, demux, {(pod.name, pod.drsm.incarnation, "live") for pod in pods})
    assert [pod.of(SessionLost) for pod in pods] == [[], [], []]
    await fleet.agrees(demux)
