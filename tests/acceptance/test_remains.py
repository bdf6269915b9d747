"""What is left of a dead pod, and for how long: its keepalive that Go pods see, and its session (R5)."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from drsm_agent import leader, mirrors, reaper
from drsm_agent.reign import Reign
from drsm_sdk.wire import messages as m
from tests.harness import (
    NONE_EXPIRES,
    POOL,
    SEEN_SECONDS,
    Domain,
    Requester,
    eventually,
    mongo_client,
    renewing,
)
from tests.sdk.fake_agent import SkippingClock

HOLD = 300.0 + 10.0
"""`A + W` of the default settings."""
OFTEN = 0.05
SLACK = 60.0
"""Seconds of which a test needs few: its clock skips, and goes on with the machine's."""


class Cleaning:
    """Those who remove what is left look often, and by a clock that a test can move on. They count from when
    they first see that it is time to count."""

    def __init__(self) -> None:
        self.clock = SkippingClock()
        self._looks = {"mirrors": 0, "sessions": 0}

    def looked(self, what: str) -> None:
        self._looks[what] += 1

    async def pass_by(self, seconds: float) -> None:
        """Let the time go by, with everything looked at before and after."""
        await self._look()
        self.clock.skipped += seconds
        await self._look()

    async def _look(self) -> None:
        """Twice: the first look may have begun before."""
        until = {what: looks + 2 for what, looks in self._looks.items()}
        await eventually(lambda: all(self._looks[what] >= until[what] for what in until))


@pytest.fixture
def cleaning(monkeypatch: pytest.MonkeyPatch) -> Cleaning:
    cleaning = Cleaning()

    class Mirrors(mirrors.Mirrors):
        def __init__(self, reign: Reign, *others: Any) -> None:
            super().__init__(replace(reign, clock=cleaning.clock), *others)

        async def _round(self) -> None:
            await super()._round()
            cleaning.looked("mirrors")

    class Reaper(reaper.Reaper):
        def __init__(self, reign: Reign, *others: Any) -> None:
            super().__init__(replace(reign, clock=cleaning.clock), *others)

        async def _purge(self) -> None:
            await super()._purge()
            cleaning.looked("sessions")

    monkeypatch.setattr(leader, "Mirrors", Mirrors)
    monkeypatch.setattr(leader, "Reaper", Reaper)
    monkeypatch.setattr(mirrors, "CHECK_INTERVAL", OFTEN)
    monkeypatch.setattr(reaper, "AUDIT_INTERVAL", OFTEN)
    return cleaning


async def owner_that_closed(asking: Requester, collection: Any) -> str:
    """A dead pod that owns a chunk, as nobody else lives; its session's `_id`. Its keepalive is there."""
    incarnation = (await asking.open("amf-1")).incarnation
    await asking.acquire("amf-1", incarnation)
    async with renewing(asking, ("amf-1", incarnation)), asyncio.timeout(SEEN_SECONDS):
        while await collection.find_one({"_id": "amf-1"}) is None:
            await asyncio.sleep(OFTEN)
    await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", incarnation), m.Empty)
    await asking.seen(lambda: asking.of(m.PodDown))
    return f"amf-1:{incarnation}"


async def have_claimed(asking: Requester) -> None:
    """Another pod comes, and the chunk is its."""
    heir = (await asking.open("amf-2")).incarnation
    await asking.renew("amf-2", heir)
    await asking.seen(lambda: asking.of(m.ChunkClaimed))


async def gone(collection: Any, key: str) -> None:
    async with asyncio.timeout(SEEN_SECONDS):
        while await collection.find_one({"_id": key}) is not None:
            await asyncio.sleep(OFTEN)


async def test_a_dead_pods_keepalive_stays_while_it_owns_a_chunk_and_then_for_a_hold(
    domain: Domain, cleaning: Cleaning
) -> None:
    """A Go pod that misses it takes the chunks, and knows of no hold: by then nobody may issue from them."""
    async with domain.served(**NONE_EXPIRES) as asking, mongo_client(domain) as client:
        keepalives = client[domain.database][POOL]
        await owner_that_closed(asking, keepalives)
        await cleaning.pass_by(3 * HOLD)
        assert await keepalives.find_one({"_id": "amf-1"})
        await have_claimed(asking)
        await cleaning.pass_by(HOLD - SLACK)
        assert await keepalives.find_one({"_id": "amf-1"})
        await cleaning.pass_by(SLACK)
        await gone(keepalives, "amf-1")


async def test_a_dead_session_is_kept_for_an_hour_and_a_hold_for_people_who_look_for_a_reason(
    domain: Domain, cleaning: Cleaning
) -> None:
    async with domain.served(**NONE_EXPIRES) as asking, mongo_client(domain) as client:
        sessions = client[domain.database]["drsm_sessions"]
        session = await owner_that_closed(asking, client[domain.database][POOL])
        await have_claimed(asking)
        await cleaning.pass_by(reaper.PURGE_AFTER + HOLD - SLACK)
        kept = await sessions.find_one({"_id": session})
        assert kept is not None
        assert (kept["state"], kept["reason"]) == ("dead", "closed")
        await cleaning.pass_by(SLACK)
        await gone(sessions, session)


async def test_a_dead_session_is_kept_for_as_long_as_a_chunk_names_it(
    domain: Domain, cleaning: Cleaning
) -> None:
    """It says which hold its chunks need: here the short one of a graceful close."""
    async with domain.served(**NONE_EXPIRES) as asking, mongo_client(domain) as client:
        sessions = client[domain.database]["drsm_sessions"]
        session = await owner_that_closed(asking, client[domain.database][POOL])
        await cleaning.pass_by(3 * reaper.PURGE_AFTER)
        assert await sessions.find_one({"_id": session})
        await have_claimed(asking)
        assert [claim.hold_ms for claim in asking.of(m.ChunkClaimed)] == [10_050]
        await gone(sessions, session)
