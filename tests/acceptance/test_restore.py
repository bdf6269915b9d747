"""An announced restore of the database from a backup, on real servers."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from typing import Any, TypeVar

import pytest

from drsm_agent import sessions
from drsm_agent.restored import announce_restored
from drsm_agent.store.mongo import MongoStore
from drsm_sdk import Demux, Drsm, Pod, changes, supply
from drsm_sdk.wire import messages as m
from tests.acceptance.test_agent_commands import AGENT, command
from tests.harness import (
    POOL,
    PROCESS_SECONDS,
    SEEN_SECONDS,
    Domain,
    Failed,
    Requester,
    eventually,
    mongo_client,
    renewing,
    requester,
    within,
)

LEASES: dict[str, Any] = {
    "allocation_ttl": 6.0,
    "liveness_ttl": 2.5,
    "leader_ttl": 1.0,
    "pools": [{"name": POOL, "block_bits": 4, "slots": 16, "usage_lag_ms": 0}],
}
LONG = 40.0
"""Seconds for what takes a hold and a window to happen."""
SPACES = (POOL, "drsm_sessions", "drsm_leader", "drsm_position", "drsm_stamps", "drsm_settings")
Backup = dict[str, list[dict[str, Any]]]
T = TypeVar("T")


async def back_up(domain: Domain) -> Backup:
    async with mongo_client(domain) as client:
        database = client[domain.database]
        return {space: await database[space].find().to_list() for space in SPACES}


async def restore(domain: Domain, backup: Backup) -> None:
    """As `mongorestore --drop` does it."""
    async with mongo_client(domain) as client:
        database = client[domain.database]
        for space, documents in backup.items():
            await database[space].drop()
            if documents:
                await database[space].insert_many(documents)


async def announce(domain: Domain) -> int:
    store = MongoStore(domain.mongo_url, domain.database, {POOL: domain.database})
    async with store:
        return (await announce_restored(store, LEASES["leader_ttl"], 6000)).term


async def announced_by_command(domain: Domain) -> tuple[int | None, str, str]:
    """How `drsm-agent restored` ended: exit code, output, errors."""
    variables = {f"DRSM_{name.upper()}": str(value) for name, value in LEASES.items()}
    variables["DRSM_POOLS"] = json.dumps(LEASES["pools"])
    async with command(AGENT, "restored", **domain.environment | variables) as process:
        out, errors = await within(process.communicate(), PROCESS_SECONDS)
    return process.returncode, out.decode(), errors.decode()


def connect(domain: Domain, name: str) -> Drsm:
    pod = Pod(name, "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS)


async def chunks_in_mongodb(domain: Domain) -> dict[int, tuple[str, int, bool]]:
    async with mongo_client(domain) as client:
        found = await client[domain.database][POOL].find({"type": "chunk"}).to_list()
    return {
        int(d["_id"].removeprefix("chunkid-")): (
            d["drsm"]["pod"],
            d["drsm"]["incarnation"],
            d["drsm"]["marked"],
        )
        for d in found
    }


async def allocate(pool: Any, count: int) -> set[int]:
    ids = {await pool.allocate(timeout=LONG) for _ in range(count)}
    assert len(ids) == count
    return ids


def demux_of(domain: Domain) -> Demux:
    return Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS)


def owns(demux: Demux, name: str, ids: set[int]) -> bool:
    return all((owner := demux.owner(id_)) and owner.name == name for id_ in ids)


async def test_what_living_pods_hold_is_put_back_and_no_id_is_issued_twice(domain: Domain) -> None:
    """One pod has got chunks since the backup, another has begun since, a third lived then and is gone."""
    async with AsyncExitStack() as lost_time:
        await lost_time.enter_async_context(domain.agent(**LEASES))
        async with connect(domain, "amf-kept") as kept, connect(domain, "amf-new") as new:
            async with connect(domain, "amf-gone") as gone:
                await allocate(await gone.join(POOL), 20)
                pool = await kept.join(POOL)
                ids = await allocate(pool, 20)
                backup = await back_up(domain)
            ids |= await allocate(pool, 60)
            new_pool = await new.join(POOL)
            new_ids = await allocate(new_pool, 40)
            before = (kept.incarnation, new.incarnation)
            await lost_time.aclose()
            await restore(domain, backup)
            code, out, errors = await announced_by_command(domain)
            assert code == 0, errors
            said = re.fullmatch(r"announced: terms go on above (\d+)\. Start the agents now\.\n", out)
            assert said is not None, out
            async with domain.agent(**LEASES), demux_of(domain) as demux:
                await eventually(lambda: owns(demux, "amf-kept", ids) and owns(demux, "amf-new", new_ids))
                more, new_more = await asyncio.gather(allocate(pool, 200), allocate(new_pool, 200))
                assert not (ids | more) & (new_ids | new_more)
                assert not ids & more
                assert not new_ids & new_more
                assert (kept.incarnation, new.incarnation) == before
                async with connect(domain, "amf-later") as later:
                    assert later.incarnation is not None
                    assert later.incarnation >> 32 > int(said[1])


async def test_a_restore_cannot_be_announced_while_an_agent_leads(domain: Domain) -> None:
    """(By a `T` that is longer than this process, in which the agent runs, may stand still.)"""
    async with domain.agent(**LEASES | {"leader_ttl": 6.0}):
        code, out, errors = await announced_by_command(domain)
        assert (code, out) == (2, "")
        assert "stop them all" in errors
        assert "Traceback" not in errors


async def test_nothing_is_granted_or_claimed_before_every_pod_had_the_time_to_report(domain: Domain) -> None:
    """An orphan stays one, a new pod gets nothing, for `A + W`, also when the leader changes meanwhile."""
    async with domain.agent(**LEASES), connect(domain, "amf-gone") as gone:
        await allocate(await gone.join(POOL), 20)
        backup = await back_up(domain)
    await restore(domain, backup)
    await announce(domain)
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent(**LEASES):
            opened = await asking.open("amf-1")
            with pytest.raises(Failed) as refused:
                await asking.acquire("amf-1", opened.incarnation)
            assert (refused.value.failure.error, refused.value.failure.reason) == (
                "store_unavailable",
                "data_lost",
            )
        began = asyncio.get_running_loop().time()  # before the second lead, from whose start it counts
        async with domain.agent(**LEASES), renewing(asking, ("amf-1", opened.incarnation)):
            await asking.seen(lambda: asking.of(m.ChunkClaimed), LONG)
            assert asyncio.get_running_loop().time() - began > LEASES["allocation_ttl"]
            assert len({head.history for head, _ in asking.events}) >= 2  # of each lead until then
            await asking.acquire("amf-1", opened.incarnation)
        async with domain.agent(**LEASES):  # the window was closed: no other one
            await asking.acquire("amf-1", opened.incarnation, request_id="b")


async def test_a_chunk_that_two_living_pods_report_is_held_and_scanned_before_anybody_issues_from_it(
    domain: Domain,
) -> None:
    """The backup is from before a death and a claim; the dead one was only cut off, and comes back."""
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent(**LEASES):
            cut, claimer = await asking.open("amf-cut"), await asking.open("amf-claimer")
            ((n, grant),) = (await asking.acquire("amf-cut", cut.incarnation)).chunks
            async with renewing(asking, ("amf-claimer", claimer.incarnation)):
                backup = await back_up(domain)
                await asking.seen(lambda: asking.of(m.ChunkClaimed))
            later = asking.of(m.ChunkClaimed)[0].grants[0]
        await restore(domain, backup)
        await announce(domain)
        async with (
            domain.agent(**LEASES),
            renewing(asking, ("amf-cut", cut.incarnation)),
            renewing(asking, ("amf-claimer", claimer.incarnation)),
        ):
            both = [("amf-cut", cut, grant, False), ("amf-claimer", claimer, later, True)]
            for name, opened, its_grant, marked in both:
                report = m.Report(name, opened.incarnation, ((POOL, n, its_grant, marked),), total=1)
                await once_known(partial(asking.ask, asking.subjects.session("report"), report, m.Reported))
            assert await owner_of(domain, n) == ("amf-cut", cut.incarnation, True)
            assert (await asking.renew("amf-claimer", claimer.incarnation)).allocation_ms == 0
            listed = await listed_once_settled(asking, m.SessionRef("amf-cut", cut.incarnation))
            ((_, listed_n, new, hold_ms),) = listed.chunks
            assert (listed_n, hold_ms) == (n, 6000)
            assert new not in {grant, later}


async def listed_once_settled(asking: Requester, who: m.SessionRef) -> m.SessionChunks:
    """What a session is told to hold; nothing before all had the time to report."""
    return await once_known(partial(asking.ask, asking.subjects.session("chunks"), who, m.SessionChunks))


async def once_known(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask again while it is being found out who holds what, as a pod does."""
    async with asyncio.timeout(LONG):
        while True:
            try:
                return await ask()
            except Failed as refused:
                if refused.failure.reason != "restoring":
                    raise
                await asyncio.sleep(0.1)


async def owner_of(domain: Domain, n: int) -> tuple[str, int, bool]:
    return (await chunks_in_mongodb(domain))[n]


async def test_a_chunk_that_was_given_back_since_the_backup_is_scanned_before_it_is_used(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have issued from it in the time that was lost, and be dead now."""
    monkeypatch.setattr(supply, "RECALL_IDLE", 0.0)
    in_use: set[int] = set()
    scanned: list[int] = []

    def ids_in_use(first: int, last: int) -> set[int]:
        scanned.append(first >> 4)
        return {id_ for id_ in in_use if first <= id_ <= last}

    async with AsyncExitStack() as lost_time:
        await lost_time.enter_async_context(domain.agent(**LEASES))
        async with requester(domain.nats_url, domain.prefix) as asking, connect(domain, "amf-1") as drsm:
            pool = await drsm.join(POOL, in_use=ids_in_use)
            ids = await allocate(pool, 40)
            await eventually(lambda: pool.stats.free >= pool.stats.wanted)  # so that it can spare a chunk
            backup = await back_up(domain)
            given_back = min(chunks_of(ids))
            for id_ in sorted(ids):
                if id_ >> 4 == given_back:
                    pool.release(id_)
                    ids.discard(id_)
            assert pool._supply is not None
            pool._supply.give_back(1)
            await asking.seen(lambda: asking.of(m.ChunkReleased))
            (given_back,) = asking.of(m.ChunkReleased)[0].chunks
            in_use |= {(given_back << 4) + 3, (given_back << 4) + 4}  # another pod's, which is dead
            await lost_time.aclose()
            await restore(domain, backup)
            await announce(domain)
            async with domain.agent(**LEASES):
                await until_scanned(pool, given_back)
                more = await allocate(pool, 100)
        assert scanned == [given_back]
        assert not more & in_use
        assert not more & ids


async def test_a_chunk_whose_return_was_not_answered_before_the_restore_is_not_simply_free_after_it(
    domain: Domain,
) -> None:
    """The pod repeats that it gives the chunk back, but somebody may have had it meanwhile."""
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent(**LEASES):
            opened = await asking.open("amf-1")
            who = "amf-1", opened.incarnation
            granted = (await asking.acquire(*who)).chunks
            backup = await back_up(domain)
            give_back = m.ChunkList(*who, granted)
            await asking.ask(asking.subjects.pool(POOL, "release"), give_back, m.Released)
        await restore(domain, backup)
        await announce(domain)
        async with domain.agent(**LEASES), renewing(asking, who):
            report = m.Report(*who, (), total=0)
            await once_known(partial(asking.ask, asking.subjects.session("report"), report, m.Reported))
            releasing = asking.ask(asking.subjects.pool(POOL, "release"), give_back, m.Released)
            assert await reason_of_refusal(releasing) == "restoring"
            listed = await listed_once_settled(asking, m.SessionRef(*who))
            ((_, n, grant, hold_ms),) = listed.chunks
            assert (n, hold_ms) == (granted[0][0], 6000)
            assert grant != granted[0][1]


async def until_scanned(pool: Any, n: int) -> None:
    async with asyncio.timeout(LONG):
        async for change in pool.changes():
            if isinstance(change, changes.Scanned) and change.chunk == n:
                return


def chunks_of(ids: set[int]) -> set[int]:
    return {id_ >> 4 for id_ in ids}


async def test_a_pod_that_is_newer_than_the_database_stops_all_granting(domain: Domain) -> None:
    """A restore that nobody announced: the first pod of a higher term shows it. It gets no verdict."""
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**LEASES) as agent:
        opened = await asking.open("amf-1")
        await asking.acquire("amf-1", opened.incarnation)
        assert agent.leader.leading.is_set()
        future = opened.incarnation + (3 << 32)
        async with asyncio.timeout(LONG):
            for said in count():  # a living pod tries again and again
                with pytest.raises(Failed) as refused:
                    await asking.renew("amf-2", future)
                failure = refused.value.failure
                assert (failure.error, failure.reason) == ("store_unavailable", "went_back")
                acquiring = asking.acquire("amf-1", opened.incarnation, request_id=f"later-{said}")
                if reason := await reason_of_refusal(acquiring):
                    break
        assert reason == "data_lost"


async def reason_of_refusal(asked: Awaitable[object]) -> str:
    """Empty when it was granted."""
    try:
        await asked
    except Failed as refused:
        return refused.failure.reason
    return ""


async def test_garbage_that_looks_newer_than_the_database_changes_nothing(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, or many times at once."""
    monkeypatch.setattr(sessions, "AHEAD_SECONDS", 5.0)  # here "at once" may take long
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**LEASES):
        opened = await asking.open("amf-1")
        future = opened.incarnation + (3 << 32)
        said = await asyncio.gather(
            *(asking.renew("amf-2", future) for _ in range(5)), return_exceptions=True
        )
        assert {type(answer) for answer in said} == {Failed}
        await asking.acquire("amf-1", opened.incarnation)


async def test_a_term_that_no_backup_could_have_missed_is_no_sign_of_a_restore(domain: Domain) -> None:
    """Garbage in a request must not stop the domain."""
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**LEASES):
        opened = await asking.open("amf-1")
        with pytest.raises(Failed) as refused:
            await asking.renew("amf-2", 2**63)
        assert refused.value.failure.error == "session_lost"
        await asking.acquire("amf-1", opened.incarnation)
