"""Go pods before their first keepalive, which comes after five seconds: they own chunks from the first
moment on."""

import asyncio

import pytest

from drsm_sdk.wire import messages as m
from tests.harness import POOL, Requester
from tests.mixed.fleet import (
    GO_SEEN_SECONDS,
    GO_SILENCE,
    PATIENT,
    QUICK,
    TEST_SECONDS,
    Fleet,
    answered,
    expect,
    owner_of,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_a_go_pod_is_unknown_until_its_first_keepalive_and_then_live(fleet: Fleet) -> None:
    """It allocates from its first moment on. Who took it for down would not route to it; and all who look see
    the same, as it follows from the documents."""
    await fleet.agent(**PATIENT)
    demux, asking = await fleet.demux(), await fleet.requester()
    go = await fleet.go("amf-1")
    (id_,) = await go.allocate(1)
    await expect("the owner of a Go pod's id", lambda: demux.owner(id_))
    states = {*(await states_of(asking, id_)), owner_of(demux, id_).state}
    assert states == {"unknown"}
    await expect("a live Go pod", lambda: owner_of(demux, id_).state == "live")
    assert set(await states_of(asking, id_)) == {"live"}
    assert asking.of(m.PodDown) == []


async def states_of(asking: Requester, id_: int) -> list[str]:
    """What the agent says of an owner, in each of the ways to ask."""
    answer = await answered(asking, id_)
    pods = await asking.ask(asking.subjects.pool(POOL, "pods"), m.Empty(), m.Pods)
    snapshot = [owner for page in await asking.snapshot() for owner in page.owners]
    return [
        answer.state,
        *(pod.state for pod in pods.pods if pod.pod.name == answer.name),
        *(owner.state for owner in snapshot if owner.name == answer.name),
    ]


async def test_a_go_pod_that_ends_before_its_first_keepalive_is_down_after_twenty_five_seconds(
    fleet: Fleet,
) -> None:
    """Nothing that could be deleted has ever told of it. A document that stands for it does, so that a
    demux that comes later knows as well; and an SDK pod gets the chunk."""
    await fleet.agent(**QUICK)
    demux, record = await fleet.demux(), await fleet.record()
    go = await fleet.go("amf-1")
    (id_,) = await go.allocate(1)
    await go.kill()
    killed = asyncio.get_running_loop().time()
    await expect("the owner of a Go pod's id", lambda: demux.owner(id_))
    assert owner_of(demux, id_).state == "unknown"
    await expect("a Go pod that is down", lambda: owner_of(demux, id_).state == "down", GO_SEEN_SECONDS)
    assert asyncio.get_running_loop().time() - killed >= GO_SILENCE - 1
    assert record.mirrors("amf-1", 0)
    assert owner_of(await fleet.demux(), id_).state == "down"
    await fleet.sdk("amf-2")
    await fleet.until("the chunk at the SDK pod", lambda owners: owners[id_ >> 10] == "amf-2")


async def test_other_go_pods_claim_from_one_that_ended_before_its_first_keepalive(fleet: Fleet) -> None:
    """They act on deletes alone, and here is nothing to delete: without an agent its chunks are lost."""
    await fleet.agent(**PATIENT)
    heir = await fleet.go("amf-1")
    await fleet.renewed(heir)
    go = await fleet.go("amf-2")
    await go.allocate(1)
    await go.kill()
    await fleet.until(
        "all at the other Go pod", lambda owners: set(owners.values()) == {"amf-1"}, GO_SEEN_SECONDS
    )
