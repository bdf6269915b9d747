"""Neighbouring changes go out as one event only if they are written as neighbours."""

import asyncio
from itertools import groupby

from drsm_sdk.wire import messages as m
from tests.harness import POOL, UNHURRIED, Domain, Requester


def owners_in_turn(events: list[m.ChunkAllocated] | list[m.ChunkClaimed]) -> list[str]:
    """The owners in the order of the events, each run of the same one counted once."""
    return [name for name, _ in groupby(event.owner.name for event in events)]


async def opened(asking: Requester, *names: str) -> list[tuple[str, int]]:
    return [(name, (await asking.open(name)).incarnation) for name in names]


async def test_claims_of_one_new_owner_are_neighbours(domain: Domain) -> None:
    """A thousand claims shared in turn by two pods would be a thousand events for every consumer."""
    async with domain.served(**UNHURRIED) as asking:
        dead, *living = await opened(asking, "amf-1", "amf-2", "amf-3")
        for pod in living:
            await asking.renew(*pod)
        await asking.acquire(*dead, count=20)
        await asking.ask(asking.subjects.session("close"), m.SessionRef(*dead), m.Empty)
        await asking.seen(lambda: sum(len(e.chunks) for e in asking.of(m.ChunkClaimed)) == 20)
        assert sorted(owners_in_turn(asking.of(m.ChunkClaimed))) == ["amf-2", "amf-3"]


async def test_chunks_granted_to_one_pod_are_neighbours(domain: Domain) -> None:
    """Also when several pods' requests share one write."""
    async with domain.served(**UNHURRIED) as asking:
        pods = await opened(asking, "amf-1", "amf-2", "amf-3")
        for pod in pods:
            await asking.ask(asking.subjects.session("join"), m.Join(*pod, (POOL,)), m.Joined)
        await asyncio.gather(*[asking.acquire(*pod, count=20) for pod in pods])
        events = asking.of(m.ChunkAllocated)
        assert sum(len(event.chunks) for event in events) == 60
        assert len(owners_in_turn(events)) == 3
