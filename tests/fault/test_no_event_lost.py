"""Every transition that MongoDB saw reaches a consumer, whatever happens between leader and NATS (G5).

The recorder is connected to the servers themselves, and MongoDB's change stream is read beside the agent. A
bridge on nats-py as it is lost 161 of 1951 events in such a black hole.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from drsm_sdk.wire import messages as m
from drsm_sdk.wire.messages import Version
from tests.fault.faults import BOTH, NATS, SHORT, Strike, leader_cut, leader_killed, leader_paused
from tests.fault.link import Link
from tests.fault.world import DATABASE, PREFIX, World
from tests.harness import POOL, Requester, requester

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
"""nats-py forgets the connection on which a paused server did not greet it; the collector closes it."""

Key = tuple[str, int] | None
Transitions = dict[int, list[Key]]
ENOUGH = 40
"""Transitions without which nothing would have been tested."""
SETTLE_SECONDS = 15.0


class Truth:
    """Each chunk's owners one after the other, None while it is free, from MongoDB's change stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.owners: Transitions = defaultdict(list)

    async def read(self) -> None:
        """All that is in the stream by now; it goes on by itself when the primary changes."""
        while (change := await self._stream.try_next()) is not None:
            n = int(change["documentKey"]["_id"].removeprefix("chunkid-"))
            match change["operationType"]:
                case "insert" | "replace":
                    chunk = change["fullDocument"]
                    self.owners[n].append((chunk["podId"], int(chunk["drsm"]["incarnation"])))
                case "delete":
                    self.owners[n].append(None)
                case "update" if "podId" in (new := change["updateDescription"]["updatedFields"]):
                    self.owners[n].append((new["podId"], _incarnation(new)))


def _incarnation(updated: dict[str, Any]) -> int:
    """A claim sets the sub-document as a whole, or its fields."""
    whole = updated.get("drsm")
    return int(whole["incarnation"] if whole else updated["drsm.incarnation"])


@asynccontextmanager
async def truth(w: World) -> AsyncIterator[Truth]:
    chunks = [{"$match": {"documentKey._id": {"$regex": "^chunkid-"}}}]
    async with await w.client[DATABASE][POOL].watch(chunks, max_await_time_ms=100) as stream:
        yield Truth(stream)


def heard(recorded: Requester) -> Transitions:
    """The same from the events, by the consumer's rule: what is not above the version held is dropped. (An
    event for many chunks may be sent again in another cut, so the same owner twice counts once.)"""
    owners: Transitions = defaultdict(list)
    held: Version = (0, 0)
    for head, body in recorded.events:
        if head.version <= held or isinstance(body, m.Sync):
            continue
        held = head.version
        match body:
            case m.ChunkAllocated(owner=owner, chunks=chunks) | m.ChunkClaimed(owner=owner, chunks=chunks):
                now: Key = (owner.name, owner.incarnation)
            case m.ChunkReleased(chunks=chunks):
                now = None
            case _:
                continue
        for n in chunks:
            if owners[n][-1:] != [now]:
                owners[n].append(now)
    return owners


def lost(true: Transitions, seen: Transitions) -> list[str]:
    """Chunks whose owners were not told as MongoDB had them; the first may be older."""
    return [
        f"chunk {n}: {owners}, told {seen.get(n)}"
        for n, owners in true.items()
        if seen.get(n, [])[-len(owners) :] != owners
    ]


FAULTS: dict[str, Strike] = {
    "black hole to NATS": leader_cut(NATS, Link.cut),
    "black hole to both": leader_cut(BOTH, Link.cut),
    "killed": leader_killed,
    "paused and back": leader_paused,
}


@pytest.mark.parametrize("name", FAULTS)
async def test_consumers_hear_every_transition_over_a_change_of_leader(broken: World, name: str) -> None:
    """The next leader goes on from the saved position, in the same history: nobody needs a snapshot."""

    async def strike(w: World) -> None:
        await asyncio.sleep(SHORT)  # transitions before the fault, with a position saved among them
        await FAULTS[name](w)

    async with requester(broken.nats[2].url, PREFIX) as recorded, truth(broken) as told:
        await told.read()
        told.owners.clear()
        row = await broken.strike(f"no event lost: {name}", strike)
        broken.churn.going.clear()
        await broken.churn.resting.wait()
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await told.read()
                while missing := lost(told.owners, heard(recorded)):
                    await asyncio.sleep(0.1)
                    await told.read()
        except TimeoutError:
            raise AssertionError(f"{len(missing)} chunks: {missing[:5]}") from None
        finally:
            broken.churn.going.set()
    assert sum(map(len, told.owners.values())) >= ENOUGH
    assert row.leaders >= 1
    assert len({head.history for head, _ in recorded.events}) == 1
    assert not recorded.of(m.Reset)
