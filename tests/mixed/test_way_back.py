"""From SDK pods to Go pods."""

import pytest

from tests.mixed.fleet import QUICK, TEST_SECONDS, Fleet
from tests.mixed.migration import BOTH, RATE, SAME, all_at, issued
from tests.mixed.original import GoPod

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@BOTH
async def test_an_sdk_fleet_is_replaced_by_go_pods_one_by_one(fleet: Fleet, names: list[str]) -> None:
    """The way back, each pod at the address and with the instance of the one before it. In the end every id
    is routed to a living Go pod, and the Go pods agree about that."""
    await fleet.agent(**QUICK)
    demux = await fleet.demux()
    old = [await fleet.sdk(name) for name in SAME]
    for pod in old:
        await fleet.mirrored(pod)
        pod.run(RATE)
        await issued(fleet, pod.name)
    gos: list[GoPod] = []
    for pod, name in zip(old, names, strict=True):
        await pod.leave()
        gos.append(await fleet.go(name, ip=pod.drsm.pod.ip, instance=pod.drsm.pod.instance))
        await gos[-1].run(RATE)
        await issued(fleet, name)
    await all_at(fleet, demux, {(go.name, 0, "live") for go in gos})
    for go in gos:
        await go.rest()
    await fleet.agrees(demux)
    await fleet.known_to(gos[0], fleet.ledger.of_each_chunk(), set(names))
