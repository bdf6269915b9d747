"""Every transition that MongoDB saw reaches a consumer, whatever happens between leader and NATS (G5).

The recorder is connected to the servers themselves, and MongoDB's change stream is read beside the agent. A
bridge on nats-py as it is lost 161 of 1951 events in such a black hole.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from drsm_sdk.wire import messages as m
from drsm_sdk.wire.messages import Version
from tests.fault.faults import FAULTS
from tests.fault.world import DATABASE, POOLS, PREFIX, TEST_SECONDS, World
from tests.harness import Requester, requester

pytestmark = [
    pytest.mark.timeout(TEST_SECONDS),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
"""nats-py forgets the connection on which a paused server did not greet it; the collector closes it."""

Key = tuple[str, int] | None
Transitions = dict[tuple[str, int], list[Key]]
"""By pool and number, a chunk's owners one after the other, None while it is free."""
ENOUGH = 500
"""Transitions of each pool before a fault and again since, without which little would have been tested."""
SETTLE_SECONDS = 15.0
ENOUGH_SECONDS = 30.0
"""Bound for them to have happened: six clients make a thousand in a second, and wait 5 s for an answer from
an agent that lost the lead."""


class Truth:
    """The transitions by MongoDB's change stream, from the moment on at which it was opened."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.owners: Transitions = defaultdict(list)

    def transitions(self) -> dict[str, int]:
        """How many there were of each pool."""
        return {
            pool: sum(len(owners) for (its, _), owners in self.owners.items() if its == pool)
            for pool in POOLS
        }

    async def until_more(self, than: dict[str, int]) -> None:
        """Reads until each pool has had `ENOUGH` more."""
        async with asyncio.timeout(ENOUGH_SECONDS):
            while any(now < than[pool] + ENOUGH for pool, now in self.transitions().items()):
                await self.read(at_most=ENOUGH)

    async def read(self, at_most: int | None = None) -> None:
        """What is in the stream by now; it goes on by itself when the primary changes."""
        changes = count() if at_most is None else range(at_most)
        for _ in changes:
            if (change := await self._stream.try_next()) is None:
                return
            n = change["ns"]["coll"], int(change["documentKey"]["_id"].removeprefix("chunkid-"))
            match change["operationType"]:
                case "insert" | "replace":
                    chunk = change["fullDocument"]
                    self.owners[n].append((chunk["podId"], int(chunk["drsm"]["incarnation"])))
                case "delete":
                    self.owners[n].append(None)
                case "update" if "drsm" in (new := change["updateDescription"]["updatedFields"]):
                    # Not by `podId`: it stays the same where a pod claims what was its own before.
                    self.owners[n].append((new["drsm"]["pod"], int(new["drsm"]["incarnation"])))
                case "update":
                    assert not {"podId", "drsm.pod", "drsm.incarnation"} & new.keys(), new


@asynccontextmanager
async def truth(w: World) -> AsyncIterator[Truth]:
    chunks = [{"$match": {"documentKey._id": {"$regex": "^chunkid-"}}}]
    async with await w.client[DATABASE].watch(chunks, max_await_time_ms=100) as stream:
        yield Truth(stream)


def heard(recorded: Requester) -> Transitions:
    """The same from one pool's events, by the consumer's rule: what is not above the version held is dropped.
    (An event for many chunks may be sent again in another cut, so the same owner twice counts once.)"""
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
            if owners[head.pool, n][-1:] != [now]:
                owners[head.pool, n].append(now)
    return owners


def lost(true: Transitions, seen: Transitions) -> list[str]:
    """Chunks whose owners were not told as MongoDB had them; the first may be older."""
    return [
        f"chunk {n}: {owners}, told {seen.get(n)}"
        for n, owners in true.items()
        if seen.get(n, [])[-len(owners) :] != owners
    ]


LEADER_GONE = (
    "leader cut from NATS",
    "leader cut from both",
    "leader killed",
    "leader paused and back",
)


@pytest.mark.parametrize("name", LEADER_GONE)
async def test_consumers_hear_every_transition_over_a_change_of_leader(broken: World, name: str) -> None:
    """Of a pool of each kind. The next leader goes on from the saved position, in the same history: nobody
    needs a snapshot."""

    before: dict[str, int] = {}

    async def strike(w: World) -> None:
        await told.until_more(told.transitions())
        await w.position_saved()  # after both agents had a table: the next leader need not begin anew
        before.update(told.transitions())
        await FAULTS[name].strike(w)

    async with AsyncExitStack() as entered:
        url = broken.nats[2].url
        recorded = [await entered.enter_async_context(requester(url, PREFIX, pool)) for pool in POOLS]
        told = await entered.enter_async_context(truth(broken))
        await entered.enter_async_context(broken.busier())
        row = await broken.strike(f"no event lost: {name}", replace(FAULTS[name], strike=strike))
        await told.until_more(before)
        await broken.rest()
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await told.read()
                while missing := lost(told.owners, _all_heard(recorded)):
                    await asyncio.sleep(0.1)
                    await told.read()
        except TimeoutError:
            raise AssertionError(f"{len(missing)} chunks: {missing[:5]}") from None
    assert row.leaders >= 1
    for events in recorded:
        assert len({head.history for head, _ in events.events}) == 1
        assert not events.of(m.Reset)


def _all_heard(recorded: list[Requester]) -> Transitions:
    return {n: owners for events in recorded for n, owners in heard(events).items()}
