"""A session's tasks end with it, and what it was granted ends with it, whatever is under way."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from drsm_sdk import AgentUnavailable, BadRequest, Drsm, Pod, Pool
from drsm_sdk.client import OnSilence
from drsm_sdk.supply import Supply
from drsm_sdk.testing import Definition, Domain, MemoryTransport
from drsm_sdk.testing.agent import Packed
from drsm_sdk.testing.tables import Row
from drsm_sdk.transport import Message, anything
from drsm_sdk.wire.messages import POOLS_PER_SESSION_MAX, Failure, Joined, Opened, Renewed, SessionChunks
from tests.sdk.fake_agent import SkippingClock, eventually

POOL = "amfid"
SMALL = Definition(name=POOL, bits=12, block_bits=4, slots=10)
AMF_1 = Pod("amf-1", "10.0.0.1", "i")
RENEWALS = 40
"""More than pass between two questions of a pod that asks again and again at first."""
QUESTIONS = 2
"""So often a pod asks that has one reason to: a renewal that is answered meanwhile is another reason."""


class Stubborn(MemoryTransport):
    """Keeps requests of the verb `held` back until `freed`, and swallows a cancellation meanwhile. Loses
    syncs while it is `deaf`."""

    held, deaf = "", False

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain._bus, "amf-1")
        self.asked, self.freed = asyncio.Event(), asyncio.Event()
        self.tables = asyncio.Event()
        self.tables.set()
        self.answered: list[str] = []

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[Message], bool] = anything
    ) -> Message:
        while self.held and subject.endswith(self.held) and not self.freed.is_set():
            self.asked.set()
            try:
                await self.freed.wait()
            except asyncio.CancelledError:
                continue
        answer = await super().request(subject, data, timeout, wanted)
        self.answered.append(subject.rpartition(".")[2])
        return answer

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        """Snapshots only once `tables` is set."""
        if subject.endswith(".snapshot"):
            await self.tables.wait()
        await super().request_many(subject, data, timeout, done)

    def deliver(self, message: Message) -> None:
        if not (self.deaf and message.subject.endswith(".sync")):
            super().deliver(message)


class Leaving(Stubborn):
    """Notes what is `sent`. What it held back is answered once the close was sent, and before that is."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain)
        self.sent: list[str] = []

    async def request(
        self, subject: str, data: bytes, timeout: float, wanted: Callable[[Message], bool] = anything
    ) -> Message:
        self.sent.append(subject.rpartition(".")[2])
        if subject.endswith(".close"):
            self.freed.set()
            await eventually(lambda: self.held in self.answered)
        return await super().request(subject, data, timeout, wanted)


def supply_of(pool: Pool) -> Supply:
    assert pool._supply is not None
    return pool._supply


def ask(verb: str, drsm: Drsm, pool: Pool) -> None:
    """Give the pod reason for such a request."""
    supply, life = supply_of(pool), drsm._session.life
    assert life is not None
    match verb:
        case "acquire":
            while pool.stats.free >= pool.stats.wanted:
                pool.allocate_nowait()
        case "release":
            assert supply.stock.retire(drsm._clock(), idle=0.0, keep=0, most=1)
            supply._wake_returns.set()
        case "chunks":
            life.unsettled.set()
        case "report":
            life.reported.set()


@pytest.mark.parametrize("verb", ["acquire", "release", "chunks", "report"])
async def test_a_request_under_way_as_the_session_ends_keeps_no_task_of_it_alive(verb: str) -> None:
    """Even if the cancellation is swallowed. It would ask in the dead session's name for ever."""
    async with Domain(SMALL) as domain:
        transport = Stubborn(domain)
        async with Drsm.connect("memory", AMF_1, transport=transport) as drsm:
            pool = await drsm.join(POOL)
            first = drsm.incarnation
            await eventually(lambda: pool.stats.free >= pool.stats.wanted)
            transport.held = verb
            ask(verb, drsm, pool)
            async with asyncio.timeout(10):
                await transport.asked.wait()
            domain.lose("amf-1")
            await eventually(lambda: drsm.incarnation not in {None, first})
            transport.freed.set()
            await eventually(lambda: set(running().values()) == {1})


async def test_a_pool_that_is_there_no_more_keeps_the_pod_out_of_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once it is there again it is joined again."""
    async with Domain(SMALL, "gone", "more") as domain, domain.drsm(AMF_1) as drsm:
        pool, gone, more = [await drsm.join(name) for name in (POOL, "gone", "more")]
        first = drsm.incarnation
        domain.cut("amf-1")
        domain.lose("amf-1")
        table = domain._agent.tables.pop("gone")
        domain.mend("amf-1")
        await eventually(lambda: drsm.incarnation not in {None, first})
        with pytest.raises(BadRequest) as refused:
            await gone.allocate(timeout=10.0)
        assert refused.value.error == "unknown_pool"
        assert await pool.allocate(timeout=10.0)
        assert await more.allocate(timeout=10.0)
        with pytest.raises(BadRequest):
            gone.allocate_nowait()
        assert [r.getMessage() for r in caplog.records if "pool gone" in r.getMessage()] != []
        domain._agent.tables["gone"] = table
        async with asyncio.timeout(10.0):
            while True:
                try:
                    id_ = await gone.allocate(timeout=10.0)
                    break
                except BadRequest:
                    await asyncio.sleep(0.01)
        assert gone.valid(id_)


async def test_a_pool_that_the_agent_has_forgotten_is_joined_again_without_a_need_for_chunks() -> None:
    """A restored database may not know of it, and a pod whose lease is not renewed asks for nothing: it would
    never agree with the agent again."""
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        await eventually(lambda: pool.stats.free >= pool.stats.wanted)
        held = pool.held()
        (session,) = domain._agent.sessions.values()
        session.pools.clear()
        await eventually(lambda: POOL in session.pools)
        assert pool.held() == held
        assert pool.allocate_nowait() is not None


async def test_a_pool_taken_off_the_list_is_joined_again_once_a_leader_and_delays_no_healing_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who holds chunks of it differs from the agent for ever: asking again and again, ever more seldom, it
    would hear late of what differs in another pool. The next leader may have it on its list again, but a
    restored database does not know that this pod takes part."""
    monkeypatch.setattr("drsm_sdk.session.RECONCILE_FIRST", 0.01)
    async with Domain(SMALL, "gone", renew=0.02) as domain, domain.drsm(AMF_1) as drsm:
        pool, gone = [await drsm.join(name) for name in (POOL, "gone")]
        await eventually(lambda: gone.stats.free >= gone.stats.wanted)
        agent, said = domain._agent, Counter[type]()
        (session,) = agent.sessions.values()
        table, packed = agent.tables.pop("gone"), agent.packed
        del session.pools["gone"]

        def answered(part: object) -> Packed:
            said[type(part)] += 1
            return packed(part)

        monkeypatch.setattr(agent, "packed", answered)
        await eventually(lambda: said[Failure] > 0)
        renewed = said[Renewed]
        await eventually(lambda: said[Renewed] > renewed + RENEWALS)
        asked = said[SessionChunks]
        assert asked <= QUESTIONS
        n = max(agent.tables[POOL].rows) + 1
        agent.tables[POOL].rows[n] = Row(session.owner, "0" * 16)
        agent.tables[POOL].version += 1
        await eventually(lambda: n in [chunk for chunk, *_ in pool.holdings()])
        assert said[SessionChunks] <= asked + QUESTIONS
        agent.tables["gone"] = table
        agent.lead()
        await eventually(lambda: "gone" in session.pools)


async def test_a_list_of_chunks_that_no_answer_has_room_for_is_asked_for_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each costs the agent as much as one that it could send."""
    monkeypatch.setattr("drsm_sdk.session.RECONCILE_FIRST", 0.01)
    async with Domain(SMALL, renew=0.02) as domain, domain.drsm(AMF_1) as drsm:
        await drsm.join(POOL)
        packed, said = domain._agent.packed, Counter[type]()

        def answered(part: object) -> Packed:
            said[type(part)] += 1
            return packed(Failure("too_large", "no room") if isinstance(part, SessionChunks) else part)

        monkeypatch.setattr(domain._agent, "packed", answered)
        (session,) = domain._agent.sessions.values()
        domain._agent.tables[POOL].rows[99] = Row(session.owner, "0" * 16)
        await eventually(lambda: said[Renewed] > RENEWALS)
        assert 0 < said[SessionChunks] < RENEWALS / 2


async def test_definitions_that_one_answer_has_no_room_for_are_joined_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the pod had no session for ever: the same request is refused every time."""
    async with Domain(SMALL, "more") as domain, domain.drsm(AMF_1) as drsm:
        pools = [await drsm.join(name) for name in (POOL, "more")]
        first, packed, asked = drsm.incarnation, domain._agent.packed, list[int]()

        def answered(part: object) -> Packed:
            if not isinstance(part, Opened):
                return packed(part)
            asked.append(len(part.definitions))
            return packed(Failure("too_large", "no room") if part.definitions else part)

        monkeypatch.setattr(domain._agent, "packed", answered)
        domain.lose("amf-1")
        await eventually(lambda: drsm.incarnation not in {None, first})
        for pool in pools:
            assert pool.valid(await pool.allocate(timeout=10.0))
        assert asked == [2, 0]


@pytest.mark.parametrize("verb", ["join", "report"])
async def test_a_pod_that_leaves_in_the_middle_of_several_requests_sends_none_after_its_close(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Pools to join again, one by one, and chunks to report, page by page."""
    monkeypatch.setattr("drsm_sdk.session.REPORT_CHUNKS_MAX", 1)
    async with Domain(SMALL, "more", "most") as domain:
        transport = Leaving(domain)
        async with Drsm.connect("memory", AMF_1, transport=transport) as drsm:
            for name in (POOL, "more", "most"):
                await drsm.join(name)
            life = drsm._session.life
            assert life is not None
            transport.answered.clear()
            transport.held = verb
            if verb == "join":
                life.missing = {POOL, "more", "most"}
                drsm._session.tasks.start(drsm._session._join_missing(life), "rejoin")
            else:
                life.reported.set()
            async with asyncio.timeout(10):
                await transport.asked.wait()
        assert transport.sent[-1] == "close"


async def test_what_the_agent_sees_in_a_pool_that_is_still_being_joined_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer to joining it may be lost, and the session be given chunks of others meanwhile. Asking for
    them in vain, ever more seldom, the pod would take them up late."""
    async with Domain(SMALL, renew=0.02) as domain, domain.drsm(AMF_1) as drsm:
        await drsm.join(POOL)
        agent, first, said = domain._agent, drsm.incarnation, Counter[type]()
        packed, serve = agent.packed, agent.serve

        def answered(part: object) -> Packed:
            said[type(part)] += 1
            no_room = isinstance(part, Opened) and part.definitions
            return packed(Failure("too_large", "no room") if no_room else part)

        def lost(subject: str, data: bytes) -> list[Packed]:
            answers = serve(subject, data)
            return [] if subject.endswith(".join") else answers

        monkeypatch.setattr(agent, "packed", answered)
        monkeypatch.setattr(agent, "serve", lost)
        domain.lose("amf-1")
        await eventually(lambda: said[Joined] and drsm.incarnation not in {None, first})
        (session,) = agent.alive()
        agent.tables[POOL].rows[99] = Row(session.owner, "0" * 16)
        renewed = said[Renewed]
        await eventually(lambda: said[Renewed] > renewed + RENEWALS)
        assert said[SessionChunks] == 0


async def test_a_pod_joins_no_more_pools_than_a_session_may_have() -> None:
    """It would be refused when the next session is opened, and that one would never be."""
    names = [f"pool-{i}" for i in range(POOLS_PER_SESSION_MAX + 1)]
    async with Domain(*names) as domain, domain.drsm(AMF_1, timeout=30.0) as drsm:
        pools = await asyncio.gather(*[drsm.join(name) for name in names[1:]])
        with pytest.raises(BadRequest, match="expected at most 64 pools of one pod, found pool-0"):
            await drsm.join(names[0])
        assert await drsm.join(names[1]) is pools[0]
        first = drsm.incarnation
        domain.lose("amf-1")
        await eventually(lambda: drsm.incarnation not in {None, first})
        assert await pools[0].allocate(timeout=10.0)


class Contexts:
    def in_use(self, first: int, last: int) -> list[int]:
        return []


async def test_joining_again_with_a_method_of_the_same_object_gives_the_same_pool() -> None:
    contexts = Contexts()
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL, in_use=contexts.in_use)
        assert await drsm.join(POOL, in_use=contexts.in_use) is pool
        with pytest.raises(BadRequest, match="another in_use"):
            await drsm.join(POOL, in_use=Contexts().in_use)


A, B, C = "10.0.0.0/28", "10.1.0.0/28", "10.2.0.0/28"
THREE = Definition(name=POOL, kind="ipv4", ranges=(A, B, C), block_bits=3, slots=8)
"""Two chunks in each range."""


@pytest.mark.parametrize("deaf", [False, True], ids=["announced", "unheard"])
async def test_a_chunk_granted_by_a_later_definition_waits_for_it(deaf: bool) -> None:
    """Without range B, whose chunks nobody owned, their numbers are those of C. A request under way meets
    the new agent before this pod has the definition; the answer alone tells it, should the sync be lost."""
    async with Domain(THREE) as domain:
        transport = Stubborn(domain)
        async with Drsm.connect("memory", AMF_1, transport=transport) as drsm:
            pool = await drsm.join(POOL)
            await eventually(lambda: pool.stats.chunks == 2)
            transport.held, transport.deaf = "acquire", deaf
            transport.tables.clear()
            ids = [pool.allocate_nowait() for _ in range(10)]
            async with asyncio.timeout(10):
                await transport.asked.wait()
            domain.stop()
            domain._agent.tables[POOL].definition = replace(THREE, ranges=(A, C), revision=2)
            domain._agent.tables[POOL].capacity = 4
            domain.start()
            if not deaf:
                await eventually(lambda: supply_of(pool)._outdated)
            transport.answered.clear()
            transport.freed.set()
            await eventually(lambda: "acquire" in transport.answered)
            ask("chunks", drsm, pool)
            await eventually(lambda: "chunks" in transport.answered and 2 in domain.owners(POOL))
            assert (pool.stats.chunks, pool.definition) == (2, THREE)
            transport.deaf = False
            transport.tables.set()
            await eventually(lambda: pool.stats.chunks > 2)
            ids += [pool.allocate_nowait() for _ in range(pool.stats.free)]
            assert {str(id_).rpartition(".")[0] for id_ in ids} == {"10.0.0", "10.2.0"}


async def test_a_revision_that_nobody_repeats_keeps_no_chunk_out_for_ever() -> None:
    """It may have been forged."""
    clock = SkippingClock()
    async with Domain(SMALL) as domain, domain.drsm(AMF_1, clock=clock) as drsm:
        pool = await drsm.join(POOL)
        supply_of(pool).announced(2**63, 2**31)
        supply_of(pool).announced(1, 1)
        assert supply_of(pool)._outdated
        clock.skipped += 31.0
        ids = {await pool.allocate(timeout=10.0) for _ in range(50)}
        assert len(ids) == 50
        supply_of(pool).announced(2, 1)
        assert supply_of(pool)._outdated


async def test_a_later_leader_with_an_older_definition_keeps_no_chunk_out() -> None:
    """Agents are updated one by one, and one of those left may lead once more: it goes by its own."""
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        supply_of(pool).announced(5, 2**31)
        assert supply_of(pool)._outdated
        supply_of(pool).announced(1, 2**31 + 1)
        assert not supply_of(pool)._outdated
        supply_of(pool).announced(5, 2**31)  # late
        assert len({await pool.allocate(timeout=10.0) for _ in range(50)}) == 50


@pytest.mark.parametrize(("on_silence", "silent"), [("continue", 400.0), ("stop", 2.0)])
async def test_who_waits_while_a_lease_has_run_out_is_served_once_it_is_renewed(
    on_silence: OnSilence, silent: float
) -> None:
    """The stock is full, so that no new chunk comes which would tell those who wait."""
    clock = SkippingClock()
    async with Domain(SMALL) as domain, domain.drsm(AMF_1, clock=clock, on_silence=on_silence) as drsm:
        pool = await drsm.join(POOL)
        await eventually(lambda: pool.stats.free >= pool.stats.wanted)
        domain.stop()
        clock.skipped += silent
        with pytest.raises(AgentUnavailable, match="lease has run out"):
            pool.allocate_nowait()
        waiting = asyncio.create_task(pool.allocate(timeout=30.0))
        await asyncio.sleep(0)  # it has begun to wait
        domain.start()
        async with asyncio.timeout(10.0):
            assert pool.valid(await waiting)


def running() -> Counter[str]:
    """How many tasks of each name there are."""
    wanted = {
        f"drsm-{name}" for name in ("refill-amfid", "return-amfid", "tick-amfid", "reconcile", "report")
    }
    return Counter(task.get_name() for task in asyncio.all_tasks() if task.get_name() in wanted)
