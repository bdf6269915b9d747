"""The stand-in's own: what it lets a test do, and where it must not differ from NATS and the agent.

What it has in common with the real agent is in `tests/integration/test_sdk_behaviour.py`.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from drsm_sdk import AgentUnavailable, BadRequest, Demux, Drsm, Pod, Pool, SessionLost, changes, demand
from drsm_sdk.testing import Definition, Domain, MemoryTransport
from drsm_sdk.testing.agent import Agent
from drsm_sdk.testing.bus import PAYLOAD_MAX, Bus, Reply, matches
from drsm_sdk.transport import Message, NoAnswer, NoResponders, NotConnected, TooLarge
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.space import Space
from drsm_sdk.wire.subjects import Subjects
from tests.sdk.fake_agent import eventually

POOL = "amfid"
AMF_1, AMF_2, AMF_3 = (Pod(f"amf-{i}", f"10.0.0.{i}", "i") for i in (1, 2, 3))
SMALL = Definition(name=POOL, bits=12, block_bits=4, slots=10)
"""Without id 0, chunk 0 is less than a pod wants in stock: who comes first gets two chunks."""
SUBJECTS = Subjects()
ANSWER_SECONDS = 10.0
"""How long a test waits for what comes at once; a bound against hanging."""
GUIDE = Path(__file__).parents[2] / "docs" / "testing.md"

M = TypeVar("M")


async def next_of(reader: Any, found: Callable[[Any], object]) -> Any:
    async with asyncio.timeout(10):
        while not found(item := await anext(reader)):
            pass
    return item


async def test_the_example_in_the_guide_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, GUIDE, "exec"), names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        await test()


# --- the bus ----------------------------------------------------------------------------------------


def test_of_wildcards_the_bus_knows_the_one_at_the_end() -> None:
    assert matches("drsm.evt.amfid.>", "drsm.evt.amfid.chunk.claimed")
    assert not matches("drsm.evt.amfid.>", "drsm.evt.amfid")
    assert not matches("drsm.evt.amfid.>", "drsm.evt.amfid2.sync")
    assert matches("a.b", "a.b")
    assert not matches("a.b", "a.b.c")


async def test_messages_come_in_order_and_only_while_connected() -> None:
    bus = Bus()
    one, two = MemoryTransport(bus), MemoryTransport(bus)
    await one.connect(1)
    await two.connect(1)
    heard: list[bytes] = []
    subscription = await one.subscribe("a.>", lambda message: heard.append(message.data))

    async def say(data: bytes) -> None:
        await two.publish("a.b", data)
        assert data not in heard  # later, as from a server
        await asyncio.sleep(0)

    for data in (b"1", b"2"):
        await say(data)
    one.cut()
    await say(b"lost")
    one.mend()
    await two.publish("a.b", b"lost on the way")
    one.cut()
    one.mend()
    await asyncio.sleep(0)
    await say(b"3")
    await subscription.stop()
    await say(b"too late")
    assert heard == [b"1", b"2", b"3"]


async def test_a_reader_that_fails_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus()
    transport = MemoryTransport(bus)
    await transport.connect(1)
    heard: list[Message] = []

    def failing(message: Message) -> None:
        raise ZeroDivisionError

    await transport.subscribe("a", failing)
    await transport.subscribe("a", heard.append)
    await transport.publish("a", b"")
    await asyncio.sleep(0)
    assert len(heard) == 1
    assert "failed" in caplog.text


async def test_a_connection_that_is_cut_says_so_and_comes_back_as_another() -> None:
    bus = Bus()
    transport = MemoryTransport(bus)
    reconnected: list[int] = []
    transport.on_reconnect(lambda: reconnected.append(transport.epoch))
    transport.cut()
    with pytest.raises(NotConnected):
        await transport.connect(0.01)
    transport.mend()
    assert (transport.connected, reconnected) == (True, [])  # its first one
    transport.cut()
    with pytest.raises(NotConnected):
        await transport.publish("a", b"")
    with pytest.raises(NotConnected):
        await transport.request("a", b"", 1)
    before = transport.epoch
    transport.mend()
    assert transport.connected
    assert reconnected == [before + 1]
    await transport.close()
    assert not transport.connected


async def test_a_request_fails_as_on_nats() -> None:
    """At once when nobody serves, at the deadline when nobody answers, or when the connection broke."""
    bus = Bus()
    transport = MemoryTransport(bus)
    await transport.connect(1)
    with pytest.raises(NoResponders):
        await transport.request("a.b", b"", 10)
    with pytest.raises(TooLarge):
        await transport.request("a.b", b" " * (PAYLOAD_MAX + 1), 10)

    def answer(subject: str, data: bytes, reply: Reply) -> None:
        if data == b"cut":
            transport.cut()
        if data:
            reply(Message("", data))

    bus.serve("a.>", answer)
    with pytest.raises(NoResponders):
        await transport.request("b", b"", 10)
    assert (await transport.request("a.b", b"echo", 10)).data == b"echo"
    with pytest.raises(NoAnswer):
        await transport.request("a.b", b"", 0.01)
    with pytest.raises(NoAnswer):
        await transport.request("a.b", b"cut", 0.01)


# --- the protocol -----------------------------------------------------------------------------------


class Asking:
    """Bare requests, as another language's client would send them."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport
        self.headers: dict[str, str] = {}

    async def __call__(self, subject: str, request: Any, kind: type[M]) -> M:
        reply = await self._transport.request(subject, codec.encode(codec.to_map(request)), ANSWER_SECONDS)
        self.headers = dict(reply.headers)
        return codec.unpack(kind, reply.data)

    async def open(self, name: str, request_id: str) -> int:
        request = wire.Open(wire.PodRef(name, "ip", "i"), (POOL,), request_id)
        return (await self(SUBJECTS.session("open"), request, wire.Opened)).incarnation

    async def acquire(self, name: str, incarnation: int, count: int, request_id: str) -> wire.Acquired:
        request = wire.Acquire(name, incarnation, count, request_id)
        return await self(SUBJECTS.pool(POOL, "acquire"), request, wire.Acquired)

    async def pairs(self, verb: str, kind: type[M], pod: tuple[str, int], *pairs: tuple[int, str]) -> M:
        return await self(SUBJECTS.pool(POOL, verb), wire.ChunkList(*pod, pairs), kind)


async def asking(domain: Domain) -> Asking:
    transport = domain.transport()
    await transport.connect(1)
    return Asking(transport)


async def test_repeated_requests_get_the_same_answer() -> None:
    async with Domain(SMALL) as domain:
        ask = await asking(domain)
        pod = ("amf-1", await ask.open("amf-1", "a"))
        assert await ask.open("amf-1", "a") == pod[1]
        assert await ask.open("amf-1", "b") > pod[1]
        granted = await ask.acquire(*pod, 3, "c")
        assert await ask.acquire(*pod, 3, "c") == granted
        assert [n for n, _ in granted.chunks] == [0, 1, 2]


async def test_never_used_chunks_are_granted_first_then_the_one_free_longest() -> None:
    async with Domain(Definition(name=POOL, bits=12, block_bits=10)) as domain:
        ask = await asking(domain)
        pod = ("amf-1", await ask.open("amf-1", "a"))
        first = (await ask.acquire(*pod, 3, "a")).chunks
        released = await ask.pairs("release", wire.Released, pod, first[1], first[0])
        assert released == wire.Released((1, 0))
        assert [n for n, _ in (await ask.acquire(*pod, 2, "b")).chunks] == [3, 1]
        assert [n for n, _ in (await ask.acquire(*pod, 2, "c")).chunks] == [0]


async def test_chunks_that_can_issue_nothing_are_passed_over_however_many_they_are() -> None:
    half = Definition(name=POOL, bits=64, reserved=((0, 2**63 - 1), (2**63 + 1024, 2**63 + 2047)))
    async with Domain(half) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        ids = [await pool.allocate(timeout=ANSWER_SECONDS) for _ in range(1001)]
        assert (ids[0], ids[999], ids[1000]) == (2**63, 2**63 + 999, 2**63 + 2048)


async def test_a_marked_chunk_cannot_be_released_and_an_unknown_one_counts_as_released() -> None:
    async with Domain(SMALL) as domain:
        ask = await asking(domain)
        old = ("amf-1", await ask.open("amf-1", "a"))
        ((n, grant),) = (await ask.acquire(*old, 1, "a")).chunks
        new = ("amf-2", await ask.open("amf-2", "b"))
        await ask.acquire(*new, 1, "b")
        await ask(SUBJECTS.session("close"), wire.SessionRef(*old), wire.Empty)
        listed = await ask(SUBJECTS.session("chunks"), wire.SessionRef(*new), wire.SessionChunks)
        ((claimed, hold_ms),) = [(g, hold) for _, m, g, hold in listed.chunks if m == n]
        assert (claimed != grant, hold_ms) == (True, 0)
        assert await ask.pairs("release", wire.Released, new, (n, claimed)) == wire.Released(())
        assert await ask.pairs("release", wire.Released, new, (n, grant)) == wire.Released((n,))
        assert await ask.pairs("scanned", wire.Cleared, new, (n, grant)) == wire.Cleared(())
        assert await ask.pairs("scanned", wire.Cleared, new, (n, claimed)) == wire.Cleared((n,))
        assert await ask.pairs("release", wire.Released, new, (n, claimed)) == wire.Released((n,))
        assert n not in domain.owners(POOL)


FIRST = {"pod": "amf-1", "incarnation": 1 << 32 | 1}


@pytest.mark.parametrize(
    ("verb", "request_", "error", "code"),
    [
        ("session.open", {"pod": 1}, "bad_request", "400"),
        ("session.renew", {"pod": "amf-1", "incarnation": 7}, "session_lost", "410"),
        ("pool.nosuch.pods", {}, "unknown_pool", "404"),
        (
            "pool.other.release",
            {"pod": "amf-1", "incarnation": 1 << 32 | 1, "chunks": []},
            "not_joined",
            "403",
        ),
        ("session.open", {"pod": "x" * 70_000}, "too_large", "413"),
    ],
)
async def test_errors_are_those_of_the_protocol(
    verb: str, request_: dict[str, Any], error: str, code: str
) -> None:
    async with Domain(SMALL, "other") as domain:
        transport = domain.transport()
        await transport.connect(1)
        assert await Asking(transport).open("amf-1", "a") == 1 << 32 | 1
        reply = await transport.request(f"drsm.rpc.{verb}", codec.encode(request_), ANSWER_SECONDS)
        failure = codec.unpack(wire.Failure, reply.data)
        assert (failure.error, reply.headers[wire.ERROR_CODE_HEADER]) == (error, code)
        assert reply.headers[wire.ERROR_HEADER] == failure.message
        assert codec.unpack(wire.Stamp, reply.data).term == 1


async def test_operators_questions_are_answered() -> None:
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        id_ = await (await drsm.join(POOL)).allocate()
        ask = await asking(domain)
        pools = await ask(SUBJECTS.pools, wire.Empty(), wire.Pools)
        assert (pools.pools[0].pods, pools.pools[0].capacity, pools.leader.term) == (1, 256, 1)
        pods = await ask(SUBJECTS.pool(POOL, "pods"), wire.Empty(), wire.Pods)
        assert [(pod.pod.name, pod.state, pod.chunks) for pod in pods.pods] == [("amf-1", "live", 2)]
        answer = await ask(SUBJECTS.pool(POOL, "owner"), wire.OwnerQuery(id_), wire.OwnerAnswer)
        assert answer.owner is not None
        assert (answer.chunk, answer.owner.name, answer.marked) == (0, "amf-1", False)
        nobody = await ask(SUBJECTS.pool(POOL, "owner"), wire.OwnerQuery(4000), wire.OwnerAnswer)
        assert (nobody.chunk, nobody.owner) == (250, None)


async def test_events_carry_versions_without_gaps_and_a_summary() -> None:
    async with Domain(SMALL) as domain:
        transport = domain.transport()
        await transport.connect(1)
        heard: list[Message] = []
        await transport.subscribe(SUBJECTS.events(POOL), heard.append)
        async with domain.drsm(AMF_1) as drsm:
            await drsm.join(POOL)
        await asyncio.sleep(0)
        told = [message for message in heard if message.subject != SUBJECTS.event(POOL, "sync")]
        verbs = [SUBJECTS.event_verb(message.subject) for message in told]
        assert verbs == ["pod.up", "chunk.allocated", "chunk.allocated", "pod.down"]
        heads = [codec.unpack(wire.EventHead, message.data) for message in told]
        assert [head.prev for head in heads[1:]] == [head.version for head in heads[:-1]]
        said = told[-1].headers[wire.SUMMARY_HEADER]
        assert said.startswith("amfid pod down amf-1")


# --- what tests may do ------------------------------------------------------------------------------


async def test_code_that_connects_by_itself_gets_its_transport_from_the_domain() -> None:
    async with Domain(POOL) as domain:
        drsm = Drsm.connect("nats://nowhere:4222", AMF_1, transport=domain.transport("amf-1"))
        demux = Demux.connect("nats://nowhere:4222", POOL, transport=domain.transport())
        async with drsm, demux:
            id_ = await (await drsm.join(POOL)).allocate()
            owner = demux.owner(id_)
            assert owner is not None
            assert owner.name == "amf-1"
            assert domain.owners(POOL)[0] == owner
            domain.kill("amf-1")
            assert domain.owners(POOL)[0].state == "down"


async def test_a_killed_pods_chunks_are_claimed_at_once_by_who_has_fewest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demand.Rate, "sample", lambda self, now, total: None)  # no pace at which to want more
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as dying:
        async with domain.drsm(AMF_2) as two, domain.drsm(AMF_3) as three:
            pool = await two.join(POOL)
            await three.join(POOL)
            for _ in range(25):
                await pool.allocate(timeout=ANSWER_SECONDS)
            await dying.join(POOL)
            await eventually(lambda: count(domain) == {"amf-1": 1, "amf-2": 4, "amf-3": 1})
            domain.kill("amf-1")
            assert count(domain) == {"amf-2": 4, "amf-3": 2}


def count(domain: Domain) -> dict[str, int]:
    names = [owner.name for owner in domain.owners(POOL).values()]
    return {name: names.count(name) for name in sorted(set(names))}


async def test_a_silent_pod_is_declared_dead_after_its_lease_and_a_talking_one_is_not() -> None:
    async with Domain(SMALL, liveness=0.3, renew=0.05) as domain, domain.demux(POOL) as demux:
        began = time.monotonic()
        async with domain.drsm(AMF_1) as drsm, domain.drsm(AMF_2) as other:
            pool, _ = await drsm.join(POOL), await other.join(POOL)
            events, told = demux.events(), pool.changes()
            first = drsm.incarnation
            domain.cut("amf-1")
            down = await next_of(events, lambda event: isinstance(event, wire.PodDown))
            assert time.monotonic() - began >= 0.3
            assert (down.pod.name, down.reason) == ("amf-1", "expired")
            await eventually(lambda: drsm.state == "suspect")
            assert pool.allocate_nowait()
            domain.mend("amf-1")
            lost = await next_of(told, lambda change: isinstance(change, changes.SessionLost))
            assert lost.reason == "expired"
            await eventually(lambda: drsm.incarnation not in {None, first})


async def test_a_test_that_blocks_the_event_loop_kills_nobody() -> None:
    """While it does, nobody can renew."""
    async with Domain(SMALL, liveness=0.3, renew=0.05) as domain, domain.drsm(AMF_1) as drsm:
        await drsm.join(POOL)
        incarnation = drsm.incarnation
        time.sleep(0.8)  # noqa: ASYNC251  # a breakpoint, say
        await asyncio.sleep(0.4)
        await eventually(lambda: drsm.state == "live")
        assert drsm.incarnation == incarnation


async def test_a_verdict_reaches_a_living_pod_at_once() -> None:
    async with Domain(POOL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        reader, id_ = pool.changes(), pool.allocate_nowait()
        domain.lose("amf-1", "superseded")
        lost = await next_of(reader, lambda change: isinstance(change, changes.SessionLost))
        assert (lost.reason, lost.issued) == ("superseded", ((id_, id_),))
        with pytest.raises(SessionLost, match="superseded"):
            pool.allocate_nowait()


async def test_a_superseded_pods_chunks_stay_until_its_lease_has_run_out() -> None:
    async with Domain(SMALL, liveness=60.0, renew=0.05) as domain, domain.drsm(AMF_1) as older:
        await older.join(POOL)
        first, (session,) = older.incarnation, domain._agent.alive("amf-1")
        domain.cut("amf-1")
        async with domain.drsm(AMF_1) as newer:
            await newer.join(POOL)
            owners = domain.owners(POOL)
            assert (owners[0].incarnation, owners[0].state) == (first, "down")
            session.until = asyncio.get_running_loop().time()
            await eventually(lambda: domain.owners(POOL)[0].incarnation == newer.incarnation)


@pytest.mark.parametrize(("leaves", "hold"), [(False, 5.0), (True, 2.0)])
async def test_a_hold_is_as_long_as_the_test_says_but_shorter_after_a_graceful_close(
    leaves: bool, hold: float
) -> None:
    """Then it is the pool's usage lag."""
    definition = Definition(name=POOL, usage_lag_ms=2000)
    async with Domain(definition, hold=5.0) as domain, domain.drsm(AMF_2) as survivor:
        reader = (await survivor.join(POOL)).changes()
        async with domain.drsm(AMF_1) as drsm:
            await drsm.join(POOL)
            if not leaves:
                domain.kill("amf-1")
        gained = await next_of(reader, lambda change: isinstance(change, changes.Gained) and change.marked)
        assert gained.hold == hold


async def test_without_an_agent_nobody_is_declared_dead_and_afterwards_everybody_gets_a_full_lease() -> None:
    async with Domain(SMALL, liveness=0.3, renew=0.05) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        incarnation = drsm.incarnation
        domain.stop()
        domain.stop()
        with pytest.raises(RuntimeError, match="start"):
            domain.lose("amf-1")
        await eventually(lambda: drsm.state == "suspect")
        assert await allocates_until_empty(pool) > 0
        domain.start()
        domain.start()
        assert await pool.allocate(timeout=ANSWER_SECONDS)
        assert drsm.incarnation == incarnation


async def allocates_until_empty(pool: Pool) -> int:
    issued = 0
    while True:
        try:
            await pool.allocate(timeout=0.05)
        except AgentUnavailable:
            return issued
        issued += 1


async def test_a_pod_killed_without_an_agent_is_dead_once_there_is_one() -> None:
    async with Domain(SMALL, liveness=0.3, renew=0.05) as domain, domain.drsm(AMF_2) as survivor:
        await survivor.join(POOL)
        async with domain.drsm(AMF_1) as dying:
            await dying.join(POOL)
            domain.stop()
            domain.kill("amf-1")
            assert count(domain) == {"amf-1": 1, "amf-2": 2}
            domain.start()
            await eventually(lambda: count(domain) == {"amf-2": 3})


# --- mistakes, and its own end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "options", "said"),
    [
        ((), {}, "one or more"),
        ((POOL, POOL), {}, "each name once"),
        (("No Such",), {}, "name"),
        ((POOL,), {"hold": -1.0}, "hold"),
        ((POOL,), {"liveness": 400.0}, "liveness < allocation"),
        ((POOL,), {"renew": 2.0}, "renew < liveness"),
        ((POOL,), {"prefix": "a b"}, "prefix"),
    ],
)
def test_a_domain_that_cannot_be_is_refused(
    pools: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Domain(*pools, **options)


async def test_pods_and_pools_that_there_are_not_are_errors() -> None:
    async with Domain(POOL) as domain, domain.drsm(AMF_1):
        for happens in (domain.kill, domain.cut, domain.mend, domain.lose):
            with pytest.raises(LookupError, match="expected"):
                happens("amf-7")
        with pytest.raises(LookupError, match="pools"):
            domain.owners("nosuch")
        domain.kill("amf-1")
        with pytest.raises(LookupError, match="living"):
            domain.kill("amf-1")


async def test_a_pod_on_a_nameless_connection_cannot_be_cut_off() -> None:
    async with Domain(POOL) as domain, Drsm.connect("", AMF_1, transport=domain.transport()):
        with pytest.raises(LookupError, match=r"transport\('amf-1'\)"):
            domain.cut("amf-1")


async def test_a_domain_is_entered_once() -> None:
    domain = Domain(POOL)
    with pytest.raises(RuntimeError, match="async with"):
        domain.owners(POOL)
    async with domain:
        pass
    with pytest.raises(RuntimeError, match="new one"):
        async with domain:
            pass


async def test_leaving_leaves_no_task_and_disconnects_who_is_still_there() -> None:
    before = asyncio.all_tasks()
    async with Domain(POOL) as domain:
        drsm = await domain.drsm(AMF_1).__aenter__()
        await drsm.join(POOL)
    await eventually(lambda: not drsm._rpc.transport.connected)
    await drsm.__aexit__(None, None, None)
    assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("drsm-")]


async def test_a_stand_in_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests have no responders then, and leaving raises."""

    def broken(self: Agent, subject: str, data: bytes) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Agent, "serve", broken)
    domain = Domain(POOL)
    await domain.__aenter__()
    with pytest.raises(AgentUnavailable, match="no responders"):
        async with domain.drsm(AMF_1, timeout=5.0):
            pass
    with pytest.raises(RuntimeError, match="stand-in broke") as raised:
        await domain.__aexit__(None, None, None)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# --- several spaces, and pools that change --------------------------------------------------------------

PAIR = Definition(
    name=POOL,
    kind="spaces",
    spaces=(Space(name="a", bits=12, block_bits=4), Space(name="b", bits=12, block_bits=4)),
)


async def test_a_space_that_is_named_twice_costs_no_id() -> None:
    async with Domain(PAIR) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        with pytest.raises(BadRequest, match="expected each space once, found a, a"):
            pool.allocate_set_nowait("a", "a")
        assert pool.stats.issued == 0


async def test_a_pod_whose_session_an_older_leader_opened_follows_the_newer_definition() -> None:
    """Its table came from the newer one: no second snapshot tells it, but each sync does."""
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        larger = replace(SMALL, bits=13, revision=2)
        await eventually(lambda: pool.synced)
        pool._follower.mirror._define(larger)  # as if it had been loaded before the session was opened
        await eventually(lambda: pool.definition == larger)


async def test_chunks_that_lie_elsewhere_now_are_lost() -> None:
    """Agents change a pool so only when nobody owns them: then this pod's are over."""
    async with Domain(SMALL) as domain, domain.drsm(AMF_1) as drsm:
        pool = await drsm.join(POOL)
        told = pool.changes()
        id_ = pool.allocate_nowait()
        supply = pool._supply
        assert supply is not None
        supply.redefine(replace(SMALL, block_bits=5, slots=20, revision=2))
        lost = await next_of(told, lambda change: isinstance(change, changes.Lost))
        assert lost.issued == ((id_, id_),)
        assert supply.stock.free == 0
