"""Who leads, what a leader does not judge, and what a take-over leaves as it was."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from pymongo import ReturnDocument
from structlog.testing import capture_logs

from drsm_agent import relay
from drsm_agent.campaign import Campaign
from drsm_agent.core import keepalives
from drsm_agent.embedded import Scratch, Stack, start_nats_server
from drsm_agent.errors import Misconfigured, leaf
from drsm_agent.leader import Leader
from drsm_agent.service import Agent, running
from drsm_sdk import Demux, Drsm, Pod
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.fault.link import Link
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Requester,
    eventually,
    leading,
    mongo_client,
    mongo_table,
    renewing,
    requester,
    within,
)
from tests.integration.test_start import agent_process, opened_once_it_serves
from tests.proxy import proxy


async def test_a_second_agent_stands_by_and_takes_over_without_a_lost_session(domain: Domain) -> None:
    """The lead is given up and taken at once, with a higher term; pods and demuxes notice nothing else."""
    settings = domain.settings(**UNHURRIED)
    async with leading(settings) as first:
        identity = Pod("amf-1", "10.0.0.1", "nf")
        async with (
            running(settings) as second,
            Drsm.connect(domain.nats_url, identity, prefix=domain.prefix) as drsm,
            Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as demux,
        ):
            pool = await drsm.join(POOL)
            incarnation = drsm.incarnation
            assert not second.leader.leading.is_set()
            assert first.task is not None
            first.task.cancel()
            await within(second.leader.leading.wait())
            ids = [await pool.allocate(timeout=10) for _ in range(3000)]
            assert len(set(ids)) == 3000
            assert drsm.incarnation == incarnation
            await eventually(lambda: demux.synced and all(demux.owner(id_) for id_ in ids))


@pytest.fixture
def wordless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that end leave their record as it is, as those that are killed."""

    async def keep(*_: object) -> None: ...

    monkeypatch.setattr(Leader, "_give_up", keep)


@pytest.mark.usefixtures("wordless")
async def test_a_standby_keeps_the_table_and_serves_nobody_before_it_leads(domain: Domain) -> None:
    """Each request has one answer, the leader's; when that one is gone without a word there is none, at once.
    The standby then goes on from the table that it has. (The record is let go of by the test, where the
    standby would watch it for `T`.)"""
    settings = domain.settings(**UNHURRIED)
    async with AsyncExitStack() as crashing, requester(domain.nats_url, domain.prefix) as asking:
        first = await crashing.enter_async_context(leading(settings))
        async with running(settings) as standby:
            state = await within(standby.feed.loaded())
            opened = await asking.open("amf-1")
            async with renewing(asking, ("amf-1", opened.incarnation)):
                await asking.acquire("amf-1", opened.incarnation, 20)
                answers = await every_answer(asking, 10)
            assert [answer.agent for answer in answers] == [first.name] * 10
            stored, chunks = await mongo_table(domain), state.table.pools[POOL].chunks
            assert len(stored) == 20
            await eventually(lambda: {n: chunk.owner.key for n, chunk in chunks.items()} == stored)
            await crashing.aclose()
            with pytest.raises(NoRespondersError):
                await asking.open("amf-2", timeout=1.0)
            assert not standby.leader.leading.is_set()
            async with mongo_client(domain) as client:
                given_up = {"$set": {"holder": ""}}
                await client[domain.database]["drsm_leader"].update_one({"_id": "leader"}, given_up)
            await within(standby.leader.leading.wait())
            (answer,) = await every_answer(asking, 1)
            assert (answer.agent, answer.term) == (standby.name, 2)
            assert standby.feed.current is state


async def every_answer(asking: Requester, requests: int) -> list[m.Stamp]:
    """All that come for so many requests, until others that were sent later have been answered too."""
    inbox, answers = asking.client.new_inbox(), list[m.Stamp]()

    async def note(message: Any) -> None:
        answers.append(codec.unpack(m.Stamp, message.data))

    subscription = await asking.client.subscribe(inbox, cb=note)
    for _ in range(requests):
        await asking.client.publish(asking.subjects.pools, b"", reply=inbox)
    await eventually(lambda: len(answers) >= requests)
    for _ in range(requests):
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
    await subscription.unsubscribe()
    return answers


@pytest.mark.usefixtures("wordless")
async def test_the_last_of_three_agents_leads_when_two_ended_in_a_row(domain: Domain) -> None:
    """Whichever they are. The pod keeps its session, and gets fresh chunks from the third."""
    settings = domain.settings(leader_ttl=1.0)
    async with leading(settings) as one, running(settings) as two, running(settings) as three:
        agents = [one, two, three]
        identity = Pod("amf-1", "10.0.0.1", "nf")
        async with Drsm.connect(domain.nats_url, identity, prefix=domain.prefix) as drsm:
            pool = await drsm.join(POOL)
            incarnation = drsm.incarnation
            for _ in range(2):
                await eventually(lambda: any(agent.leader.leading.is_set() for agent in agents))
                leader = next(agent for agent in agents if agent.leader.leading.is_set())
                agents.remove(leader)
                assert leader.task is not None
                leader.task.cancel()
                await asyncio.wait([leader.task])
            ids = [await pool.allocate(timeout=SEEN_SECONDS) for _ in range(pool.stats.free + 1000)]
            assert len(set(ids)) == len(ids)
            assert drsm.incarnation == incarnation


async def test_a_change_of_leader_in_a_quiet_domain_keeps_the_history(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby that began after the last event goes on where the leader ended: no reset, no snapshots."""
    monkeypatch.setattr(relay, "IDLE_INTERVAL", 0.2)
    monkeypatch.setattr(relay, "POSITION_INTERVAL", 0.1)
    settings = domain.settings(**UNHURRIED)
    async with requester(domain.nats_url, domain.prefix) as asking, leading(settings) as first:
        async with running(settings) as second:
            await position_reaches(domain, second)
            assert first.task is not None
            first.task.cancel()
            await within(second.leader.leading.wait())
            await asking.seen(lambda: len({head.term for head, _ in asking.events}) == 2)
            assert len({head.history for head, _ in asking.events}) == 1
            assert len(asking.of(m.Reset)) == 1


async def position_reaches(domain: Domain, standby: Agent) -> None:
    """Wait until the standby can go on in the leader's history."""
    began = (await within(standby.feed.loaded())).table.started
    async with mongo_client(domain) as client, asyncio.timeout(SEEN_SECONDS):
        positions = client[domain.database]["drsm_position"]
        while int((await positions.find_one() or {}).get("at", 0)) < began:
            await asyncio.sleep(0.05)


async def test_a_quiet_pools_consumers_follow_a_leader_whose_table_is_older_than_the_last_ones(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the pool before the last leader did; nothing happened since, so its versions are older."""
    monkeypatch.setattr(relay, "IDLE_INTERVAL", 0.2)
    monkeypatch.setattr(relay, "POSITION_INTERVAL", 0.1)
    settings = domain.settings(leader_ttl=1.0)
    async with mongo_client(domain) as client, leading(settings) as first, running(settings) as second:
        records = client[domain.database]["drsm_leader"]

        async def lose(*_: object) -> bool:
            return False

        async def led_by(agent: Agent, other: Agent) -> None:
            """The other one stands back, whatever becomes of the lead."""
            campaign = agent.leader._campaign
            monkeypatch.setattr(campaign, "_try_to_win", partial(Campaign._try_to_win, campaign))
            monkeypatch.setattr(other.leader._campaign, "_try_to_win", lose)
            usurper = {"$set": {"holder": "", "counter": 0}, "$inc": {"term": 1}}
            await records.update_one({"_id": "leader"}, usurper)
            await eventually(lambda: not other.leader.leading.is_set() and agent.leader.leading.is_set())

        async def confirmed_by(agent: Agent, demux: Demux) -> None:
            """Not by the leader before: a sync after one that told of the term."""
            await eventually(
                lambda: (lead := agent.leader._election.mine) and demux._mirror.term == lead.term
            )
            told = demux._follower._confirmed_at
            await eventually(lambda: demux._follower._confirmed_at > told)

        await position_reaches(domain, second)
        await led_by(second, first)
        async with Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as demux:
            await confirmed_by(second, demux)
            await led_by(first, second)
            await confirmed_by(first, demux)
            assert demux.synced


async def test_agents_that_win_leads_but_cannot_serve_are_not_ready(domain: Domain) -> None:
    """Each sees the other one win, and give up: nobody answers requests all the same."""
    users = 'authorization { users: [{user: agent, password: x, permissions: {publish: {deny: "*.rpc.>"}}}] }'
    async with Scratch() as scratch, AsyncExitStack() as life:
        server = await start_nats_server(scratch, config=users)
        settings = domain.settings(
            nats_url=server.url, nats_user="agent", nats_password="x", leader_ttl=1.0, liveness_ttl=5.0
        )
        agents = [await life.enter_async_context(running(settings)) for _ in range(2)]

        def leaderless(agent: Agent) -> bool:
            return any("nobody has led" in reason for reason in agent.unready())

        await eventually(lambda: all(leaderless(agent) for agent in agents))
        for _ in range(100):  # several leads
            assert all(leaderless(agent) for agent in agents)
            await asyncio.sleep(0.05)


async def test_a_leader_that_lost_its_record_stops_answering(domain: Domain) -> None:
    """Another holder in the record, of a higher term: all leader work ends, and nothing is answered (R2)."""
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent() as agent:
        async with mongo_client(domain) as client:
            usurper = {"$set": {"holder": "another", "counter": 0}, "$inc": {"term": 1}}
            record = await client[domain.database]["drsm_leader"].find_one_and_update(
                {"_id": "leader"}, usurper, return_document=ReturnDocument.AFTER
            )
        await eventually(lambda: not agent.leader.leading.is_set())
        assert record
        await within(agent.leader.leading.wait())  # unchanged for `T`: taken over again
        await asking.seen(lambda: any(head.term > record["term"] for head, _ in asking.events))
        assert record["term"] not in {head.term for head, _ in asking.events}


async def test_a_leader_that_cannot_renew_stops_answering_when_its_own_deadline_passes() -> None:
    """R2: MongoDB stands still, so nobody can tell it that it was replaced; its own clock must do."""
    async with Stack() as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        async with requester(domain.nats_url, "drsm") as asking, domain.agent(leader_ttl=1.0) as agent:
            member = stack.mongo.members[0]
            member.pause()
            try:
                with pytest.raises((NoRespondersError, NatsTimeout)):
                    await within(_ask_for_ever(asking))
                await eventually(lambda: not agent.leader.leading.is_set())
            finally:
                member.resume()


async def _ask_for_ever(asking: Requester) -> None:
    while True:
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools, timeout=1.0)


async def test_garbage_on_the_probes_subject_does_not_end_the_agent(domain: Domain) -> None:
    """Any client may answer there; what is no answer of our own counts as none."""
    async with requester(domain.nats_url, domain.prefix) as asking:

        async def garbage(message: Any) -> None:
            await asking.client.publish(message.reply, b"\xc1")

        spoiler = await asking.client.subscribe(asking.subjects.probe, cb=garbage)
        await asking.client.flush()
        async with running(domain.settings()) as agent:
            assert agent.task is not None
            await asking.seen(lambda: asking.events)
            await asyncio.wait([agent.task], timeout=1.5)
            assert not agent.task.done()
            await spoiler.unsubscribe()
            await within(agent.leader.leading.wait())


async def test_nobody_is_expired_because_nats_was_away_for_longer_than_the_lease() -> None:
    """R7: who cannot hear itself does not judge, and afterwards everyone gets one more full `L`."""
    async with Stack() as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        async with domain.agent(), Demux.connect(domain.nats_url, POOL) as demux:
            pods = [Drsm.connect(domain.nats_url, Pod(f"amf-{i}", "10.0.0.1", "nf")) for i in range(2)]
            async with pods[0], pods[1]:
                for drsm in pods:
                    await drsm.join(POOL)
                before = [drsm.incarnation for drsm in pods]
                stack.nats.pause()
                await eventually(lambda: all(drsm.state == "suspect" for drsm in pods))
                await asyncio.sleep(
                    2.0
                )  # well beyond `L`; nothing can be awaited of a server that stands still
                stack.nats.resume()
                await eventually(lambda: demux.synced and all(drsm.state == "live" for drsm in pods))
                assert [drsm.incarnation for drsm in pods] == before
                assert {owner.state for owner in demux.pods()} == {"live"}


async def test_nobody_is_expired_because_the_agent_itself_stood_still(domain: Domain) -> None:
    """R7: for longer than `L`, while nobody could renew. That is no reason to change the leader either, as
    its own lease is longer."""
    leases = {"DRSM_LIVENESS_TTL": "4", "DRSM_LEADER_TTL": "12"}  # `L`: the test may stand still, too
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        agent_process(domain, **leases) as agent,
    ):
        pods = [
            (name, (await opened_once_it_serves(asking, name)).incarnation) for name in ("amf-1", "amf-2")
        ]
        await asyncio.gather(*[asking.renew(*pod) for pod in pods])
        agent.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4.3)  # nothing can be awaited of a process that stands still
        agent.send_signal(signal.SIGCONT)
        assert agent.stderr is not None
        while b"sparing" not in (said := await within(agent.stderr.readline())):
            assert said
            assert b"session_expired" not in said
        renewed = await asyncio.gather(*[asking.renew(*pod) for pod in pods])
        assert [(answer.liveness_ms > 0) for answer in renewed] == [True, True]
        assert not asking.of(m.PodDown)
        assert {head.term for head, _ in asking.events} == {1}


async def test_a_mirror_follows_its_session_and_is_never_missing_for_a_restarted_name(
    domain: Domain,
) -> None:
    """Go pods see `expireAt` at least `2A` ahead, and never a deleted keepalive of a living name."""
    async with domain.served() as asking, mongo_client(domain) as client:
        collection = client[domain.database][POOL]
        old = (await asking.open("amf-1", request_id="old")).incarnation
        await asking.renew("amf-1", old)
        async with renewing(asking, ("amf-1", old)):
            mirror = await _mirror(collection, old)
        ahead = mirror["expireAt"].replace(tzinfo=UTC) - datetime.now(UTC)
        assert ahead.total_seconds() > 2 * 300
        assert (mirror["podId"], mirror["podIp"]) == ("amf-1", "10.0.0.1")
        async with await collection.watch() as changes:
            new = (await asking.open("amf-1", request_id="new")).incarnation
            await asking.renew("amf-1", new)
            async with renewing(asking, ("amf-1", new)):
                await _mirror(collection, new)
            while (change := await changes.try_next()) is not None:
                assert change["operationType"] != "delete"


async def _mirror(collection: Any, incarnation: int) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found = await collection.find_one({"_id": "amf-1"})
            if found and found["drsm"]["incarnation"] == incarnation:
                return dict(found)
            await asyncio.sleep(0.05)


async def test_many_that_would_expire_at_once_are_spared_once(domain: Domain) -> None:
    """R7: more than two and more than 30 % at once get one more full `L`; then they are down."""
    async with domain.served(leader_ttl=20.0) as asking:
        names = [f"amf-{i}" for i in range(4)]
        pods = [(name, (await asking.open(name)).incarnation) for name in names]
        for _ in range(2):  # the first one wakes each session up; then all leases begin at the same time
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*[asking.renew(*pod) for pod in pods])
        await asking.seen(lambda: len(asking.of(m.PodDown)) == 4)
        assert asyncio.get_running_loop().time() - began > 1.5 * domain.settings().liveness_ttl


async def test_an_agent_ends_when_its_table_is_lost_at_the_moment_of_its_end(domain: Domain) -> None:
    """Two errors at once must not swallow the cancellation: it would hang for ever."""
    for turns in range(4):
        async with domain.agent() as agent:
            state = agent.feed.current
            assert state is not None
            assert agent.task is not None
            state.lost.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            agent.task.cancel()
            await within(asyncio.wait([agent.task]))


async def test_a_leader_that_does_not_hear_itself_hands_over_to_one_that_does(domain: Domain) -> None:
    """R7: cut off NATS, though not off MongoDB, it gives up its lead after `T`, and stands by afterwards."""
    async with proxy(domain.nats_url) as way, running(domain.settings(nats_url=way.url)) as cut:
        await within(cut.leader.leading.wait())
        identity = Pod("amf-1", "10.0.0.1", "nf")
        async with (
            running(domain.settings()) as other,
            Drsm.connect(domain.nats_url, identity, prefix=domain.prefix) as drsm,
        ):
            await drsm.join(POOL)
            incarnation = drsm.incarnation
            way.silence()
            await within(other.leader.leading.wait(), 30)
            assert not cut.leader.leading.is_set()
            way.carry_on()
            await eventually(lambda: drsm.state == "live" and not cut.unready())
            assert other.leader.leading.is_set()
            assert drsm.incarnation == incarnation


async def test_a_leader_that_hears_itself_late_keeps_its_lead(domain: Domain) -> None:
    """R7: it answers after the next requests to itself were sent, as in a flood. Another agent would too."""
    way = Link(domain.nats_url.removeprefix("nats://"))
    await way.start()
    try:
        async with (
            running(domain.settings(nats_url=f"nats://{way.address}")) as agent,
            mongo_client(domain) as client,
        ):
            await within(agent.leader.leading.wait())
            leader = client[domain.database]["drsm_leader"]
            with capture_logs() as logs:
                way.delay = 0.2  # four times until it has its own answer: longer than from one to the next
                before = await leader.find_one({"_id": "leader"})
                assert before is not None
                twice_t = {"_id": "leader", "counter": {"$gte": before["counter"] + 6}}
                async with asyncio.timeout(30):
                    while await leader.find_one(twice_t) is None:
                        await asyncio.sleep(0.05)
            assert not [reason for reason in lost_leads(logs) if "myself" in reason]
            assert [log for log in logs if log["event"] == "probe_unanswered"]
    finally:
        await way.stop()


async def test_a_leader_that_hears_itself_too_late_to_judge_hands_over_to_a_standby(domain: Domain) -> None:
    """R7: once it did better, so another agent may. A lone one stays: that helps nobody."""
    way = Link(domain.nats_url.removeprefix("nats://"))
    await way.start()
    try:
        patient = {"leader_ttl": 6.0}  # for this machine's own pauses
        async with running(domain.settings(nats_url=f"nats://{way.address}", **patient)) as slow:
            await within(slow.leader.leading.wait())
            async with (
                running(domain.settings(**patient)) as other,
                Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as demux,
            ):
                with capture_logs() as logs:
                    way.delay = 0.45  # 1.8 s until it has its own answer; `L/2` is 1.5 s
                    await within(other.leader.leading.wait(), 30)
                assert any("come back too late" in reason for reason in lost_leads(logs)), logs
                way.delay = 0.0
                await eventually(lambda: demux.synced)
    finally:
        await way.stop()


async def test_an_agent_that_nats_does_not_carry_leaves_the_lead_alone(domain: Domain) -> None:
    """It could only give it up again; each change of leader costs everybody a lease (R7)."""
    async with proxy(domain.nats_url) as way, running(domain.settings()) as leading:
        await within(leading.leader.leading.wait())
        async with running(domain.settings(nats_url=way.url)) as cut, mongo_client(domain) as client:
            await eventually(lambda: cut.leader.seen)
            way.silence()
            with capture_logs() as logs:
                assert leading.task is not None
                leading.task.cancel()
                await eventually(lambda: sum(log["event"] == "not_standing" for log in logs) >= 2)
            record = await client[domain.database]["drsm_leader"].find_one({"_id": "leader"})
            assert record is not None
            assert record["holder"] == ""
            way.carry_on()
            await within(cut.leader.leading.wait(), 30)


async def test_a_go_pod_whose_keepalive_stands_still_is_down_and_one_that_renews_is_not(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the TTL monitor's help. It is written down, filtered by what was seen, and the claims come with
    it; its keepalive is left to MongoDB."""
    monkeypatch.setattr(keepalives, "GO_SILENCE", 4.0)
    async with mongo_client(domain) as client:
        pool = client[domain.database][POOL]
        await pool.insert_many([go_keepalive("amf-silent"), go_keepalive("amf-renewing")])
        await pool.insert_many([go_chunk(1, "amf-silent"), go_chunk(2, "amf-renewing")])

        async def renew() -> None:
            while True:
                fresh = {"$set": {"expireAt": datetime.now(UTC)}}
                await pool.update_one({"_id": "amf-renewing"}, fresh)
                await asyncio.sleep(0.3)

        renewing_go = asyncio.create_task(renew())
        async with domain.served(leader_ttl=20.0) as asking:
            opened = await asking.open("amf-1")
            async with renewing(asking, ("amf-1", opened.incarnation)):
                await asking.seen(lambda: asking.of(m.PodDown))
                told = asyncio.get_running_loop().time()
                await asking.seen(lambda: asking.of(m.ChunkClaimed))
                # What was written is no sign of life: it would put the claims off for as long again.
                assert asyncio.get_running_loop().time() - told < 0.9 * keepalives.GO_SILENCE
                (down,) = asking.of(m.PodDown)
                assert (down.pod.name, down.reason) == ("amf-silent", "silent")
                assert [claim.chunks for claim in asking.of(m.ChunkClaimed)] == [(1,)]
                assert await pool.find_one({"_id": "amf-silent"}) == go_keepalive("amf-silent") | {
                    "expireAt": datetime(2100, 1, 1),  # noqa: DTZ001  # as the driver gives it back
                    "drsm": {"silent": datetime(2100, 1, 1)},  # noqa: DTZ001
                }
                owner = await pool.find_one({"_id": "chunkid-2"})
                assert owner is not None
                assert owner["podId"] == "amf-renewing"
                assert not renewing_go.done()
        renewing_go.cancel()


def go_keepalive(name: str) -> dict[str, Any]:
    return {
        "_id": name,
        "type": "keepalive",
        "podId": name,
        "podIp": "10.0.0.9",
        "podInstance": "nf-go",
        "expireAt": datetime(2100, 1, 1, tzinfo=UTC),
    }


def go_chunk(n: int, owner: str) -> dict[str, Any]:
    key = f"chunkid-{n}"
    fields = {"podId": owner, "podIp": "10.0.0.9", "podInstance": "nf-go"}
    return {"_id": key, "type": "chunk", "chunkId": key} | fields


TORN = {"leader_ttl": 2.0, "liveness_ttl": 6.0}


async def test_a_leader_that_no_pod_reaches_hands_over_to_a_standby(domain: Domain) -> None:
    """R7: it hears itself on its side of a torn NATS, but the pods are on the other one. It hands over before
    it judges anybody."""
    async with AsyncExitStack() as servers, requester(domain.nats_url, domain.prefix) as asking:
        lonely_url = await another_nats(servers)
        async with domain.agent(**TORN):
            opened = await asking.open("amf-1")
            await asking.renew("amf-1", opened.incarnation)
        async with running(domain.settings(nats_url=lonely_url, **TORN)) as lonely:
            await within(lonely.leader.leading.wait())
            async with running(domain.settings(**TORN)) as near:
                await within(near.leader.leading.wait())
                assert (await asking.renew("amf-1", opened.incarnation)).liveness_ms > 0
                assert not lonely.leader.leading.is_set()
                await eventually_in_mongodb(domain, {"handed_over": False})


async def test_the_only_pods_death_takes_one_lease_and_no_change_of_leader(domain: Domain) -> None:
    """Though the leader then hears no pod, and a standby waits: it has heard that one before."""
    settings = domain.settings(**TORN)
    async with requester(domain.nats_url, domain.prefix) as asking, leading(settings), running(settings):
        opened = await asking.open("amf-1")
        clock = asyncio.get_running_loop()
        await asking.renew("amf-1", opened.incarnation)
        await asking.acquire("amf-1", opened.incarnation)
        async with mongo_client(domain) as client:
            leader = client[domain.database]["drsm_leader"]
            async with asyncio.timeout(SEEN_SECONDS):
                while not (await leader.find_one() or {}).get("standbys"):
                    await asyncio.sleep(0.05)
            await asking.renew("amf-1", opened.incarnation)
            heard = clock.time()
            with capture_logs() as logs:
                await asking.seen(lambda: asking.of(m.PodDown))
            assert (
                clock.time() - heard < 1.4 * TORN["liveness_ttl"]
            )  # and not one more lease of a next leader
            assert (await leader.find_one() or {})["term"] == opened.incarnation >> 32
        assert not [reason for reason in lost_leads(logs) if "a standby waits" in reason]


async def test_a_hand_over_is_not_repeated_before_a_pod_was_heard(domain: Domain) -> None:
    """Both agents are on the wrong side, or the pods are dead: the second one judges."""
    async with AsyncExitStack() as servers, requester(domain.nats_url, domain.prefix) as asking:
        lonely_url = await another_nats(servers)
        async with domain.agent(**TORN):
            opened = await asking.open("amf-1")
            await asking.renew("amf-1", opened.incarnation)
        configured = domain.settings(nats_url=lonely_url, **TORN)
        with capture_logs() as logs:
            async with running(configured), running(configured), mongo_client(domain) as client:
                sessions = client[domain.database]["drsm_sessions"]
                async with asyncio.timeout(60):
                    while (await sessions.find_one() or {}).get("state") != "dead":
                        await asyncio.sleep(0.05)
                record = await client[domain.database]["drsm_leader"].find_one() or {}
        assert record["handed_over"]
        assert len([reason for reason in lost_leads(logs) if "a standby waits" in reason]) == 1


async def test_a_leader_that_no_pod_reaches_and_nobody_waits_for_stays(domain: Domain) -> None:
    """R7: there is nobody to hand over to, so it judges: its only pod is dead."""
    async with domain.served(**TORN) as asking:
        opened = await asking.open("amf-1")
        await asking.renew("amf-1", opened.incarnation)
        with capture_logs() as logs:
            await asking.seen(lambda: asking.of(m.PodDown))
        assert not [reason for reason in lost_leads(logs) if "a standby waits" in reason]


def lost_leads(logs: Sequence[Any]) -> list[str]:
    """Why leads ended; on a machine that stands still also because they lapsed."""
    return [log["reason"] for log in logs if log["event"] == "lead_lost"]


async def another_nats(servers: AsyncExitStack) -> str:
    """A NATS server that knows nothing of the others."""
    scratch = await servers.enter_async_context(Scratch())
    return (await start_nats_server(scratch)).url


async def eventually_in_mongodb(domain: Domain, fields: dict[str, Any]) -> None:
    async with mongo_client(domain) as client, asyncio.timeout(20):
        while await client[domain.database]["drsm_leader"].find_one(fields) is None:
            await asyncio.sleep(0.05)


async def test_a_standby_with_a_definition_that_was_moved_away_from_never_leads(domain: Domain) -> None:
    """It would grant ids that are others' under the new one. (One that NATS does not carry is not seen to
    wait, and a pool is changed so while nobody is seen to lead.)"""
    pools = [{"name": POOL, "kind": "ipv4", "ranges": ["10.45.0.0/16"]}]
    settings = domain.settings(**UNHURRIED, pools=pools)
    async with AsyncExitStack() as old, mongo_client(domain) as client:
        await old.enter_async_context(leading(settings))
        with pytest.raises(ExceptionGroup) as ended:  # noqa: PT012
            async with running(settings) as standby:
                stored = client[domain.database]["drsm_settings"]
                moved = {"ranges": ["10.46.0.0/16"], "revision": 2}
                await stored.update_one({"_id": f"pool:{POOL}"}, {"$set": moved})
                await old.aclose()
                await within(standby.ended())
        assert isinstance(leaf(ended.value), Misconfigured)
        assert "which moves chunks" in str(leaf(ended.value))
