"""Go pods that stood still and come back when the hold of their chunks is over: here one second, not an
hour."""

from dataclasses import asdict
from typing import Any

import pytest

from drsm_sdk.changes import Scanned
from drsm_sdk.wire import messages as m
from tests.harness import POOL, Requester, renewing
from tests.mixed.fleet import GO_SEEN_SECONDS, QUICK, TEST_SECONDS, Fleet, chunks, expect

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_a_chunk_that_an_sdk_pod_has_issued_from_is_held_anew_when_its_go_pod_comes_back(
    fleet: Fleet,
) -> None:
    """Here the hold is too short. Both have issued from it by then, and the log says which chunks those
    are; from then on the SDK pod issues nothing before it has asked again what is in use."""
    await fleet.agent(**QUICK, go_hold=1.0)
    asking = await fleet.requester()
    go = await fleet.go("amf-1")
    (n,) = chunks(await go.allocate(300))
    await fleet.renewed(go)
    pod = await fleet.sdk("amf-2")
    go.pause()
    await expect("a scan", lambda: n in [done.chunk for done in pod.heard if isinstance(done, Scanned)], 60)
    ids: list[int] = []
    while n not in chunks(ids):
        assert len(ids) < 20_000
        ids += await pod.allocate(100)
    go.go_on()
    line = await fleet.told("go_pod_came_back")
    assert "amf-1" in line.values()
    assert str(n) in str(line)
    first, second = await asking.seen(
        lambda: len(found := [c for c in asking.of(m.ChunkClaimed) if n in c.chunks]) == 2 and found
    )
    assert (second.owner, second.previous) == (first.owner, first.owner)
    assert second.grants != first.grants
    assert second.hold_ms > 0
    assert (await fleet.owners())[n] == "amf-2"


async def test_a_chunk_whose_go_pod_has_come_back_is_not_given_back(fleet: Fleet) -> None:
    """Its number would be free, and the next one to get it would hold nothing and remember nothing, while
    the Go pod issues from it."""
    await fleet.agent(**QUICK, go_hold=1.0)
    asking = await fleet.requester()
    go = await fleet.go("amf-1")
    (n,) = chunks(await go.allocate(300))
    await fleet.renewed(go)
    life = "amf-2", (await asking.open("amf-2")).incarnation
    async with renewing(asking, life):
        go.pause()
        await asking.seen(lambda: claims_of(asking, n), GO_SEEN_SECONDS)
        assert await asked(asking, life, "scanned", n) == {"cleared": (n,)}
        go.go_on()
        await asking.seen(lambda: [up for up in asking.of(m.PodUp) if up.pod.incarnation == 0][1:])
        await asked(asking, life, "scanned", n)
        assert await asked(asking, life, "release", n) == {"released": ()}
        assert n in await fleet.owners()


def claims_of(asking: Requester, n: int) -> list[m.ChunkClaimed]:
    return [claim for claim in asking.of(m.ChunkClaimed) if n in claim.chunks]


async def asked(asking: Requester, life: tuple[str, int], verb: str, n: int) -> dict[str, Any]:
    """What the agent answers to a pod about a chunk, by the grant that it was told last."""
    claim = claims_of(asking, n)[-1]
    chunk = (n, claim.grants[claim.chunks.index(n)])
    kind: type[m.Cleared | m.Released] = m.Cleared if verb == "scanned" else m.Released
    answer = await asking.ask(asking.subjects.pool(POOL, verb), m.ChunkList(*life, (chunk,)), kind)
    return asdict(answer)
