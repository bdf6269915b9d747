"""What is made of documents of Go pods that say something else than others, or less, or nothing."""

from functools import partial

import pytest

from drsm_sdk import Demux
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import shown
from tests.harness import POOL
from tests.mixed.fleet import (
    GO_SEEN_SECONDS,
    PATIENT,
    QUICK,
    TEST_SECONDS,
    Fleet,
    answered,
    chunks,
    expect,
    owner_of,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def routed_to(demux: Demux, id_: int, ip: str) -> bool:
    owner = owner_of(demux, id_)
    return (owner.ip, owner.state) == (ip, "live")


async def test_the_ids_of_a_go_pod_that_restarts_at_another_address_are_routed_there(fleet: Fleet) -> None:
    """Within the 20 s of its keepalive nothing is deleted and nobody claims. It knows nothing of its old
    chunks, but its name has them, and only its keepalive tells where it is now."""
    await fleet.agent(**PATIENT)
    demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
    first = await fleet.go("amf-1", ip="10.0.0.1")
    (old,) = await first.allocate(1)
    await fleet.renewed(first)
    await first.kill()
    second = await fleet.go("amf-1", ip="10.0.0.2")
    (new,) = await second.allocate(1)
    await fleet.renewed(second)
    late = await fleet.demux()
    for id_ in (old, new):
        await expect("routes to the new address", partial(routed_to, demux, id_, "10.0.0.2"))
        await expect("routes to the new address", partial(routed_to, late, id_, "10.0.0.2"))
        assert (await answered(asking, id_)).ip == "10.0.0.2"
    assert asking.of(m.PodDown) == []
    assert record.deletes("amf-1") == []


async def test_chunks_of_an_older_module_that_lack_address_and_instance_are_seen_and_claimed(
    fleet: Fleet,
) -> None:
    """A Go pod reads them as what is missing being empty. To an agent that did not, their numbers were
    free, and their sessions nobody's."""
    chunk = {"_id": "chunkid-5", "type": "chunk", "chunkId": "chunkid-5", "podId": "amf-old"}
    await fleet.collection.insert_one(chunk)
    await fleet.agent(**QUICK)
    demux, asking = await fleet.demux(), await fleet.requester()
    go = await fleet.go("amf-1")
    await fleet.sdk("amf-2")
    id_ = 5 << 10 | 7
    assert (owner_of(demux, id_).name, owner_of(demux, id_).ip) == ("amf-old", "")
    await fleet.renewed(go)
    assert await go.owner(id_) == ("amf-old", "", "")
    await asking.seen(
        lambda: [c for c in asking.of(m.ChunkClaimed) if 5 in c.chunks and c.owner.name == "amf-2"],
        GO_SEEN_SECONDS,
    )


async def test_what_a_go_pod_does_not_say_of_its_stock_is_shown_as_unknown(fleet: Fleet) -> None:
    """Zeros would say that it has issued nothing."""
    await fleet.agent(**PATIENT)
    asking = await fleet.requester()
    go, pod = await fleet.go("amf-1"), await fleet.sdk("amf-2")
    ids = await go.allocate(1)
    await fleet.renewed(go)
    answer = await asking.ask(asking.subjects.pool(POOL, "pods"), m.Empty(), m.Pods)
    uses = {state.pod.name: state.use for state in answer.pods}
    assert uses["amf-1"] is None
    assert uses[pod.name] is not None
    (row,) = [row for row in (await shown(fleet.domain, "pods")).rows if row[1] == "amf-1"]
    assert row[3] == "live"
    assert row[6:8] == ["1", "0"]
    assert row[8:] == ["-"] * len(row[8:])
    assert chunks(ids) == await fleet.chunks_of("amf-1")
