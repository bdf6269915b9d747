"""A pod on a real NATS server, against a scripted agent: what is issued, and what is refused, when."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from drsm_sdk import (
    AgentUnavailable,
    BadRequest,
    Drsm,
    Failed,
    NotAllocated,
    NotOwner,
    Pod,
    Pool,
    PoolEmpty,
    PoolExhausted,
    SessionLost,
    changes,
)
from drsm_sdk.client import OnSilence
from drsm_sdk.rpc import Answer
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition
from tests.sdk.fake_agent import (
    DEADLINE,
    OTHER,
    POOL,
    SEEN_SECONDS,
    SILENCE,
    FakeAgent,
    SkippingClock,
    eventually,
    fake_agent,
)

POD = Pod("amf-1", "10.0.0.1", "i")
Connect = Callable[..., Drsm]


@pytest.fixture
async def agent(nats_url: str, prefix: str) -> AsyncIterator[FakeAgent]:
    async with fake_agent(nats_url, prefix) as agent:
        yield agent


@pytest.fixture
def clock() -> SkippingClock:
    return SkippingClock()


@pytest.fixture
def connect(nats_url: str, prefix: str, clock: SkippingClock) -> Connect:
    def connect(*, on_silence: OnSilence = "continue") -> Drsm:
        return Drsm.connect(
            nats_url, POD, prefix=prefix, timeout=SEEN_SECONDS, on_silence=on_silence, clock=clock
        )

    return connect


def only(verb: str, answer: Any) -> Callable[[str, dict[str, Any]], Any]:
    """A script that gives `answer` to one verb, and leaves the rest to the agent."""
    return lambda said, body: answer if said == verb else None


async def next_of(reader: Any, kind: type, chunk: int | None = None) -> Any:
    """The next change of a kind, about a chunk."""
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            change = await anext(reader)
            if isinstance(change, kind) and (chunk is None or chunk in getattr(change, "chunks", ())):
                return change


async def drain(pool: Pool, timeout: float) -> None:
    """Allocate until it fails."""
    while True:
        await pool.allocate(timeout=timeout)


async def taken(pool: Pool, count: int) -> list[Any]:
    return [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(count)]


async def supplied(pool: Pool) -> None:
    """Wait until no request for a chunk is under way; the first lacks id 0, so a pod asks for another."""
    await eventually(lambda: pool.stats.chunks == 2)


# --- issuing ----------------------------------------------------------------------------------------


async def test_ids_can_be_allocated_right_after_joining(agent: FakeAgent, connect: Connect) -> None:
    """And the pod knows at once that they are its own."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        id_ = pool.allocate_nowait()
        owner = pool.owner(id_)
        assert owner is not None
        assert (owner.name, owner.incarnation, drsm.state) == ("amf-1", drsm.incarnation, "live")
        assert pool.valid(id_)
        assert pool.grant(id_) == agent.chunks[id_ >> 4].grant
        assert [pod.name for pod in pool.pods()] == ["amf-1"]


async def test_a_pool_refills_before_it_runs_out_and_no_id_comes_twice(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        ids = await taken(pool, 300)
        assert len(set(ids)) == 300
        assert 0 not in ids
        assert all(agent.chunks[id_ >> 4].owner.incarnation == drsm.incarnation for id_ in ids)


async def test_waiting_callers_share_one_request(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        await supplied(pool)
        before = len(agent.asked("acquire"))
        ids = await asyncio.gather(*[pool.allocate(timeout=SEEN_SECONDS) for _ in range(100)])
        assert len(set(ids)) == 100
        asked = {body["request_id"] for body in agent.asked("acquire")[before:]}
        assert len(asked) <= 12  # not one per caller


async def test_an_exhausted_pool_is_an_error_at_once_by_the_agents_verdict(
    agent: FakeAgent, connect: Connect
) -> None:
    agent.table.capacity = 1
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        ids = await taken(pool, 9)  # id 0 is never issued
        started = time.monotonic()
        with pytest.raises(PoolExhausted):
            await pool.allocate(timeout=60.0)
        assert time.monotonic() - started < SEEN_SECONDS
        with pytest.raises(PoolEmpty):
            pool.allocate_nowait()
        pool.release(ids[4])
        assert pool.allocate_nowait() == ids[4]


async def test_joining_an_exhausted_pool_succeeds(agent: FakeAgent, connect: Connect) -> None:
    """The pod can still be given dead pods' chunks."""
    agent.table.capacity = 0
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        assert pool.stats.chunks == 0


async def test_a_waiter_gets_an_id_that_another_caller_releases(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        asked = asyncio.Event()

        def silent(verb: str, body: dict[str, Any]) -> Any:
            if verb != "acquire":
                return None
            asked.set()
            return SILENCE

        agent.script = silent
        ids = [pool.allocate_nowait() for _ in range(pool.stats.free)]
        await asked.wait()  # one request at a time: whatever was asked before is answered by now
        ids += [pool.allocate_nowait() for _ in range(pool.stats.free)]
        waiting = asyncio.ensure_future(pool.allocate(timeout=SEEN_SECONDS))
        await asyncio.sleep(0.05)
        pool.release(ids[0])
        assert await waiting == ids[0]


async def test_a_pool_that_is_gone_is_told_to_who_waits_for_an_id_of_it(
    agent: FakeAgent, connect: Connect
) -> None:
    """The session goes on: its other pools are there. "Try again" would be wrong."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        await supplied(pool)
        agent.script = only("acquire", wire.Failure("unknown_pool", "no pool amfid"))
        for _ in range(pool.stats.free):
            pool.allocate_nowait()
        await eventually(lambda: "no pool amfid" in pool.trouble())
        with pytest.raises(BadRequest, match="no pool amfid") as refused:
            await pool.allocate(timeout=0.1)
        assert refused.value.error == "unknown_pool"
        assert drsm.state == "live"


async def test_silence_of_the_agent_is_told_at_the_deadline(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        agent.script = only("acquire", wire.Failure("store_unavailable", "no primary", retry=True))
        with pytest.raises((AgentUnavailable, PoolEmpty)):
            await drain(pool, 0.3)


async def test_an_unanswered_request_for_chunks_is_repeated_as_the_same(
    agent: FakeAgent, connect: Connect
) -> None:
    """Its first answer may just be lost: the same request_id gets the same chunks."""
    unavailable = wire.Failure("store_unavailable", "no primary", retry=True)
    agent.script = lambda verb, body: (
        unavailable if verb == "acquire" and len(agent.asked(verb)) < 4 else None
    )
    async with connect() as drsm:
        await drsm.join(POOL)
        assert len({body["request_id"] for body in agent.asked("acquire")[:4]}) == 1


async def test_release_of_foreign_or_unissued_ids_is_refused(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        with pytest.raises(NotOwner):
            pool.release(100_000)
        with pytest.raises(NotAllocated):
            pool.release(next(iter(agent.chunks)) * 16 + 5)
        with pytest.raises(NotOwner):
            pool.grant(100_000)
        assert not pool.valid(100_000)


# --- leases -----------------------------------------------------------------------------------------


async def test_a_suspect_pod_goes_on_issuing_from_stock_but_asks_for_nothing(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        await supplied(pool)
        agent.script = lambda verb, body: SILENCE
        clock.skipped += 100.0
        assert drsm.state == "suspect"
        before = len(agent.asked("acquire"))
        for _ in range(pool.stats.free):
            pool.allocate_nowait()
        with pytest.raises(AgentUnavailable):
            await pool.allocate(timeout=0.2)
        assert len(agent.asked("acquire")) == before


async def test_a_pod_that_stops_on_silence_issues_nothing_while_suspect(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    async with connect(on_silence="stop") as drsm:
        pool = await drsm.join(POOL)
        agent.script = lambda verb, body: SILENCE
        clock.skipped += 100.0
        with pytest.raises(AgentUnavailable, match="liveness"):
            pool.allocate_nowait()
        agent.script = lambda verb, body: None
        assert await pool.allocate(timeout=SEEN_SECONDS)


async def test_a_lapsed_pod_issues_nothing_until_a_renewal_is_answered(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    """Also after a long pause of the process: the deadline is looked at with each id."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        id_ = pool.allocate_nowait()
        agent.script = lambda verb, body: SILENCE
        clock.skipped += 1000.0
        assert (drsm.state, pool.valid(id_)) == ("lapsed", False)
        with pytest.raises(AgentUnavailable, match="allocation"):
            pool.allocate_nowait()
        agent.script = lambda verb, body: None
        assert await pool.allocate(timeout=SEEN_SECONDS)
        assert (drsm.state, pool.valid(id_)) == ("live", True)


async def test_an_id_taken_during_a_pause_is_put_back(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    """R4: the lease is looked at again, as the last step, after the id was taken."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        issued, free = pool.stats.issued, pool.stats.free
        readings = iter([0.0, 1000.0])

        def paused() -> float:
            return SkippingClock.__call__(clock) + next(readings, 0.0)

        pool._clock = paused
        with pytest.raises(AgentUnavailable):
            pool.allocate_nowait()
        assert (pool.stats.issued, pool.stats.free) == (issued, free)


async def test_an_answer_to_an_early_renewal_counts_from_its_own_sending(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    """However late it comes: here the answers to all that was sent before come after a minute."""
    began = clock()
    heard_at: list[float] = []

    def late(verb: str, body: dict[str, Any]) -> Any:
        if verb == "session.renew":
            if clock.skipped:
                return SILENCE
            heard_at.append(clock())
            clock.skipped += 60.0
        return None

    async with connect() as drsm:
        await drsm.join(POOL)
        leases = drsm._session.life.leases if drsm._session.life else None
        assert leases is not None
        agent.timing = replace(agent.timing, allocation=1000.0)
        agent.script = late
        await eventually(lambda: leases.allocation_until >= began + 1000.0)
        assert leases.allocation_until <= heard_at[0] + 1000.0


async def test_answers_of_a_lower_term_than_seen_are_dropped(agent: FakeAgent, connect: Connect) -> None:
    """A fallen leader's answer is no answer."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        new, old = replace(agent.stamp, term=5), agent.stamp
        agent.stamp = new
        await eventually(lambda: drsm._rpc.term == 5)
        agent.stamp = old
        agent.table.capacity = 0
        with pytest.raises((AgentUnavailable, PoolEmpty)):  # and not PoolExhausted
            await drain(pool, 0.5)


# --- losing the session -----------------------------------------------------------------------------


async def test_a_verdict_ends_issuing_tells_the_ids_and_leads_to_a_new_session(
    agent: FakeAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        reader = pool.changes()
        ids = [pool.allocate_nowait() for _ in range(3)]
        first = drsm.incarnation
        assert first is not None
        agent.ended[first] = "expired"
        told = await next_of(reader, changes.SessionLost)
        assert (told.reason, told.issued) == ("expired", changes.ranges(ids))
        assert drsm.alarms == 1  # with a lease that still ran: clocks cannot differ by so much
        assert "clocks differ" in caplog.text
        assert not pool.valid(ids[0])
        with pytest.raises(NotOwner):
            pool.release(ids[0])
        renewed = await next_of(reader, changes.SessionRenewed)
        assert renewed.incarnation > first
        assert not set(await taken(pool, 3)) & set(ids)


async def test_a_pod_that_hears_of_its_own_death_stops_at_once(agent: FakeAgent, connect: Connect) -> None:
    """Without waiting for the next renewal to be refused."""
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        assert drsm.incarnation is not None
        agent.script = lambda verb, body: SILENCE
        await agent.event(wire.PodDown(agent.sessions[drsm.incarnation].owner, "superseded"))
        await eventually(lambda: drsm.state == "lost")
        with pytest.raises(SessionLost, match="superseded"):
            pool.allocate_nowait()
        with pytest.raises(SessionLost):
            await pool.allocate(timeout=0.1)


async def test_a_pod_whose_chunk_was_claimed_by_another_stops_at_once(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        n = pool.allocate_nowait() >> 4
        agent.script = lambda verb, body: SILENCE
        await agent.move(OTHER, n, hold_ms=1000)
        await eventually(lambda: drsm.state == "lost")
        with pytest.raises(SessionLost, match="other"):
            pool.allocate_nowait()


async def test_after_superseded_a_pod_is_slower_to_come_back(agent: FakeAgent, connect: Connect) -> None:
    """Two live pods with one name must not chase each other."""
    async with connect() as drsm:
        await drsm.join(POOL)
        assert drsm.incarnation is not None
        superseded_at = time.monotonic()
        agent.ended[drsm.incarnation] = "superseded"
        await agent.until_asked("session.open", 2)
        assert time.monotonic() - superseded_at >= 0.9  # others come back after 0.2 s


# --- claimed chunks ---------------------------------------------------------------------------------


async def claimed_chunk(agent: FakeAgent, drsm: Drsm, n: int = 50, hold_ms: int = 200) -> None:
    assert drsm.incarnation is not None
    agent.put(OTHER, n)
    await agent.sync()
    await agent.move(agent.sessions[drsm.incarnation].owner, n, hold_ms=hold_ms)


async def test_a_claimed_chunk_is_scanned_after_its_hold_and_then_issued_from(
    agent: FakeAgent, connect: Connect
) -> None:
    asked: list[tuple[int, int]] = []

    def in_use(first: int, last: int) -> list[int]:
        asked.append((first, last))
        return [first + 1, first + 2]

    async with connect() as drsm:
        pool = await drsm.join(POOL, in_use=in_use)
        reader = pool.changes()
        started = time.monotonic()
        await claimed_chunk(agent, drsm)
        gained = await next_of(reader, changes.Gained, 50)
        assert (gained.chunks, gained.marked, gained.hold) == ((50,), True, 0.2)
        assert pool.stats.closed == 1
        owner = pool.owner(801)
        assert owner is not None
        assert owner.name == "amf-1"  # served by this pod from now on
        assert await next_of(reader, changes.Scanned) == changes.Scanned(POOL, 50, in_use=2, freed=8)
        assert time.monotonic() - started >= 0.2
        assert asked == [(800, 815)]
        await agent.until_asked("scanned")
        await eventually(lambda: agent.chunks[50].hold_ms is None)
        pool.release(801)
        with pytest.raises(NotAllocated):
            pool.release(803)


async def test_a_failing_scan_is_repeated_and_everything_stays_in_use(
    agent: FakeAgent, connect: Connect
) -> None:
    answers: list[Any] = [True, [7], [801]]

    async def in_use(first: int, last: int) -> Any:
        return answers.pop(0)

    async with connect() as drsm:
        pool = await drsm.join(POOL, in_use=in_use)
        reader = pool.changes()
        await claimed_chunk(agent, drsm, hold_ms=0)
        failed = await next_of(reader, changes.ScanFailed)
        assert (failed.chunk, failed.attempt) == (50, 1)
        assert "bool" in failed.error
        assert "found 7" in (await next_of(reader, changes.ScanFailed)).error
        assert pool.stats.closed == 1
        assert (await next_of(reader, changes.Scanned)).in_use == 1


async def test_without_a_scan_a_claimed_chunk_is_owned_but_never_issued_from(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        await claimed_chunk(agent, drsm, hold_ms=0)
        await eventually(lambda: pool.stats.closed == 1)
        await asyncio.sleep(0.2)
        assert pool.stats.closed == 1
        assert not agent.asked("scanned")
        assert pool.owner(801) is not None


async def test_a_pool_may_say_that_unscanned_chunks_become_free(
    nats_url: str, prefix: str, connect: Connect
) -> None:
    free = Definition(name=POOL, block_bits=4, slots=10, unscanned="free")
    async with fake_agent(nats_url, prefix, free) as agent, connect() as drsm:
        pool = await drsm.join(POOL)
        reader = pool.changes()
        await claimed_chunk(agent, drsm, hold_ms=100)
        assert (await next_of(reader, changes.Scanned)).freed == 10
        await agent.until_asked("scanned")


# --- disagreement -----------------------------------------------------------------------------------


async def test_a_claim_that_was_not_heard_is_found_by_comparing(agent: FakeAgent, connect: Connect) -> None:
    """The event was lost; the renewals show it, the list tells, the hold is kept in full."""
    async with connect() as drsm:
        pool = await drsm.join(POOL, in_use=lambda first, last: [])
        reader = pool.changes()
        assert drsm.incarnation is not None
        agent.put(agent.sessions[drsm.incarnation].owner, 60, hold_ms=300)
        gained = await next_of(reader, changes.Gained, 60)
        assert (gained.marked, gained.hold) == (True, 0.3)
        assert (await next_of(reader, changes.Scanned)).chunk == 60


async def test_a_chunk_that_the_agent_does_not_list_is_dropped_and_told(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        reader = pool.changes()
        id_ = pool.allocate_nowait()
        await agent.until_asked("acquire", 2)
        agent.table.capacity = 0
        del agent.chunks[id_ >> 4]
        agent.table.version += 1
        lost = await next_of(reader, changes.Lost)
        assert lost.chunks == (id_ >> 4,)
        assert lost.issued == ((id_, id_),)
        assert drsm.state == "live"
        assert not pool.valid(id_)


async def test_a_list_that_is_older_than_the_newest_chunks_is_not_followed(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        await eventually(lambda: pool.stats.chunks == 2)
        agent.script = only("session.chunks", wire.SessionChunks((), {POOL: (1, 0)}))
        assert drsm.incarnation is not None
        agent.put(agent.sessions[drsm.incarnation].owner, 60)
        await agent.until_asked("session.chunks", 2)
        assert pool.stats.chunks == 2


async def test_an_answer_that_is_older_than_the_list_is_dropped(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        supply = pool._supply
        assert supply is not None
        stamp = wire.Stamp("agent", 10**6, "ab" * 8)
        supply.follow([], (10**6, 0), stamp)
        held = pool.stats.chunks
        supply._granted(Answer(wire.Acquired(((70, "f" * 16),), (10**6 - 1, 0)), stamp, 0.0))
        assert pool.stats.chunks == held
        supply._granted(Answer(wire.Acquired(((70, "f" * 16),), (10**6, 0)), stamp, 0.0))
        assert pool.stats.chunks == held + 1


async def test_a_replayed_old_grant_does_not_displace_a_newer_one(agent: FakeAgent, connect: Connect) -> None:
    """A new leader publishes again what the old one may not have: events come twice."""
    async with connect() as drsm:
        supply = (await drsm.join(POOL))._supply
        assert supply is not None
        old, new = (70, "a" * 16, None), (70, "b" * 16, None)
        supply._take_up([old])
        supply.stock.drop(70)
        supply._take_up([new])
        supply._take_up([old])
        assert supply.stock.get(70, "b" * 16) is not None


async def test_chunks_go_back_when_the_agent_asks_and_their_grant_is_over(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        pool.release(pool.allocate_nowait())
        await eventually(lambda: pool.stats.chunks >= 2)
        agent.give_back = {POOL: 1}
        asked = await agent.until_asked("release")
        n, grant = asked[0]["chunks"][0]
        await eventually(lambda: n not in agent.chunks or agent.chunks[n].grant != grant)
        assert pool.stats.free >= 9


async def test_chunks_that_stayed_empty_go_back_by_themselves(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        for id_ in await taken(pool, 60):
            pool.release(id_)
        held = pool.stats.chunks
        clock.skipped += 2.0
        await asyncio.sleep(0.3)
        agent.timing = replace(agent.timing, liveness=1000.0, allocation=1000.0)
        await asyncio.sleep(0.3)
        clock.skipped += 600.0
        await agent.until_asked("release")
        await eventually(lambda: pool.stats.chunks < held)


async def test_a_new_history_makes_the_pod_report_its_chunks(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        n = pool.allocate_nowait() >> 4
        agent.stamp = replace(agent.stamp, history="h2", term=2)
        reported = await agent.until_asked("session.report")
        assert [POOL, n, agent.chunks[n].grant, False] in reported[0]["chunks"]
        assert drsm.state == "live"


async def test_a_verdict_from_a_restored_database_is_answered_with_a_report(
    agent: FakeAgent, connect: Connect
) -> None:
    """It may be older than this session; nothing is issued until it has heard of it."""
    reported = asyncio.Event()

    def forgot(verb: str, body: dict[str, Any]) -> Any:
        if verb == "session.report" and reported.is_set():
            return None
        known = verb in {"snapshot", "session.open"}
        return None if known else SILENCE if verb == "session.report" else unknown

    unknown = wire.Failure("session_lost", "over", reason="unknown")
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        id_, first = pool.allocate_nowait(), drsm.incarnation
        agent.stamp = replace(agent.stamp, history="h2", term=2)
        agent.script = forgot
        await agent.until_asked("session.report")
        with pytest.raises(AgentUnavailable):
            pool.allocate_nowait()
        reported.set()
        await agent.until_asked("session.report", 2)
        agent.script = lambda verb, body: None
        await eventually(lambda: drsm.state == "live")
        assert (drsm.incarnation, pool.valid(id_)) == (first, True)


# --- coming and going -------------------------------------------------------------------------------


async def test_leaving_closes_the_session_as_the_last_request(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        reader = pool.changes()
        incarnation, life = drsm.incarnation, drsm._session.life
        assert life is not None
        drsm._session.tasks.start(drsm._session._renew(life), "renew")  # and has not begun yet
    assert agent.requests[-1] == ("session.close", {"pod": "amf-1", "incarnation": incarnation})
    with pytest.raises(SessionLost, match="closed"):
        pool.allocate_nowait()
    assert not [change async for change in reader if isinstance(change, changes.SessionLost)]


async def test_leaving_is_quick_when_the_agent_is_silent(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        await drsm.join(POOL)
        agent.script = lambda verb, body: SILENCE
        started = time.monotonic()
    assert time.monotonic() - started < 8.0  # an unanswered renewal is waited for longer


async def test_connecting_without_an_agent_says_so_at_the_deadline(nats_url: str, prefix: str) -> None:
    with pytest.raises(AgentUnavailable, match="no responders"):
        async with Drsm.connect(nats_url, POD, prefix=prefix, timeout=DEADLINE):
            pass


async def test_connecting_without_nats_says_so_at_the_deadline() -> None:
    with pytest.raises(AgentUnavailable, match=r"127\.0\.0\.1:1"):
        async with Drsm.connect("nats://user:secret@127.0.0.1:1", POD, timeout=0.3):
            pass


async def test_an_unknown_pool_is_refused_at_once(agent: FakeAgent, connect: Connect) -> None:
    async with connect() as drsm:
        with pytest.raises(BadRequest, match="no such pool") as refused:
            await drsm.join("nosuch")
        assert refused.value.error == "unknown_pool"
        with pytest.raises(BadRequest, match="pool name"):
            await drsm.join("No Such")


async def test_a_pod_that_the_agent_refuses_is_told_at_once(agent: FakeAgent, connect: Connect) -> None:
    agent.script = only("session.open", wire.Failure("bad_request", "not this name"))
    with pytest.raises(BadRequest, match="not this name"):
        async with connect():
            pass


async def test_joining_again_gives_the_same_pool_unless_the_scan_differs(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        pool = await drsm.join(POOL)
        assert await drsm.join(POOL) is pool
        with pytest.raises(BadRequest, match="in_use"):
            await drsm.join(POOL, in_use=lambda first, last: [])


async def test_a_pool_that_is_not_ready_in_time_can_be_joined_later(
    agent: FakeAgent, connect: Connect
) -> None:
    async with connect() as drsm:
        agent.script = only("snapshot", SILENCE)
        with pytest.raises(AgentUnavailable, match="not ready"):
            await drsm.join(POOL, timeout=0.3)
        agent.script = lambda verb, body: None
        assert (await drsm.join(POOL)).allocate_nowait()


async def test_an_agent_that_forgot_who_joined_is_told_again(agent: FakeAgent, connect: Connect) -> None:
    forgot = wire.Failure("not_joined", "join first")
    agent.script = lambda verb, body: (
        forgot if verb == "acquire" and len(agent.asked("session.join")) < 2 else None
    )
    async with connect() as drsm:
        assert (await drsm.join(POOL)).allocate_nowait()


async def test_a_broken_background_task_ends_issuing_and_surfaces(
    agent: FakeAgent, connect: Connect, clock: SkippingClock
) -> None:
    """G7: never silently dead."""
    drsm = await connect().__aenter__()
    pool = await drsm.join(POOL)
    clock.broken = True
    await eventually(lambda: drsm._tasks.failure is not None)
    clock.broken = False
    assert drsm.state == "lost"
    with pytest.raises(Failed):
        pool.allocate_nowait()
    with pytest.raises(Failed):
        await drsm.__aexit__(None, None, None)


async def test_no_task_is_left_behind(agent: FakeAgent, connect: Connect) -> None:
    before = asyncio.all_tasks()
    async with connect() as drsm:
        await drsm.join(POOL, in_use=lambda first, last: [])
        await claimed_chunk(agent, drsm, hold_ms=60_000)
        await asyncio.sleep(0.1)
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("drsm-")]
