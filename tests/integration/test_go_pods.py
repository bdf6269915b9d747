"""What the agent does beside Go DRSM pods, on a real MongoDB, with documents as the original writes them.

`tests/mixed` has the same with the original itself, and takes its time; here the agent's waits are short.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection
from structlog.testing import capture_logs

from drsm_agent import alarms, go_pods, mirrors
from drsm_agent.core import keepalives
from drsm_agent.core.documents import read_keepalive
from drsm_agent.errors import Misconfigured
from drsm_agent.service import running
from drsm_agent.store.cursor import plain
from drsm_sdk import Demux, Drsm, Pod, Pool, PoolExhausted
from drsm_sdk.changes import Lost
from drsm_sdk.wire import messages as m
from tests.harness import (
    ONE_LEAD,
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Failed,
    Requester,
    eventually,
    mongo_client,
    mongo_table,
    requester,
    within,
)

SILENCE = 2.0
Collection = AsyncCollection[dict[str, Any]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go's keepalives of these tests end far ahead, and are renewed more often."""
    monkeypatch.setattr(keepalives, "GO_SILENCE", SILENCE)
    monkeypatch.setattr(mirrors, "CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(mirrors, "SETTLES", 1.0)
    monkeypatch.setattr(go_pods, "SETTLES", 0.5)
    monkeypatch.setattr(alarms, "LOOK_INTERVAL", 0.1)
    monkeypatch.setattr(alarms, "TTL_INTERVAL", 0.3)


@pytest.fixture
async def documents(domain: Domain) -> AsyncIterator[Collection]:
    """The pool's collection, as Go pods have it: with their index."""
    async with mongo_client(domain) as client:
        collection = client[domain.database][POOL]
        await collection.create_index("expireAt", name="expireAt", expireAfterSeconds=0)
        yield collection


class GoPod:
    """The original's writes: each sets its own fields, and leaves `drsm` as it is."""

    def __init__(self, documents: Collection, name: str, ip: str = "10.0.0.9", instance: str = "nf") -> None:
        self._documents, self.name = documents, name
        self._who = {"podId": name, "podIp": ip, "podInstance": instance}

    async def renew(self, ahead: float = 600.0) -> None:
        """FindOne, then an insert or `$set`."""
        expire_at = datetime.now(UTC) + timedelta(seconds=ahead)
        fields = {"_id": self.name, "type": "keepalive"} | self._who | {"expireAt": expire_at}
        if await self._documents.find_one({"_id": self.name}) is None:
            await self._documents.insert_one(fields)
        else:
            await self._documents.update_one({"_id": self.name}, {"$set": fields})

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """It renews all the time."""

        over = asyncio.Event()

        async def renew() -> None:
            while not over.is_set():
                await self.renew()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await over.wait()

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            over.set()  # not cancelled: the driver may swallow that, and leave a socket open
            await within(task)

    async def allocate(self, *numbers: int) -> None:
        """New chunks."""
        await self._documents.insert_many([self.chunk(n) for n in numbers])

    def chunk(self, n: int) -> dict[str, Any]:
        key = f"chunkid-{n}"
        return {"_id": key, "type": "chunk", "chunkId": key} | self._who

    async def claim(self, n: int, former: str) -> None:
        """After it has seen a keepalive deleted: by name alone."""
        await self._documents.update_one({"_id": f"chunkid-{n}", "podId": former}, {"$set": self._who})


@asynccontextmanager
async def pod(domain: Domain, name: str, **options: Any) -> AsyncIterator[tuple[Drsm, Pool]]:
    """An SDK pod, whose application has nothing in use."""
    who = Pod(name, "10.0.0.1", "nf")
    async with Drsm.connect(domain.nats_url, who, prefix=domain.prefix, timeout=SEEN_SECONDS) as drsm:
        yield drsm, await drsm.join(POOL, **({"in_use": lambda *_: []} | options))


async def drain(pool: Pool) -> None:
    """Every id there is."""
    while True:
        await pool.allocate(timeout=SEEN_SECONDS)


async def seen(documents: Collection, key: str, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A document once it is so."""
    async with asyncio.timeout(SEEN_SECONDS):
        while not ((document := await documents.find_one({"_id": key})) and condition(document)):
            await asyncio.sleep(0.02)
    return document


async def chunk(documents: Collection, n: int, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return await seen(documents, f"chunkid-{n}", condition)


def mirrored(document: dict[str, Any]) -> bool:
    """Whether a keepalive is an SDK pod's mirror."""
    keepalive = read_keepalive(plain(document))
    return bool(keepalive and keepalive.mirrored and not keepalive.mirrored.is_go)


async def refusals(ask: Callable[[], Awaitable[Any]]) -> list[m.Failure]:
    """How often it was refused, until it was not."""
    refused: list[m.Failure] = []
    while True:
        try:
            await ask()
        except Failed as error:
            refused.append(error.failure)
            await asyncio.sleep(0.05)
        else:
            return refused


async def owner(asking: Requester, n: int) -> m.OwnerAnswer:
    subject = asking.subjects.pool(POOL, "owner")
    return await asking.ask(subject, m.OwnerQuery(n << 10 | 1), m.OwnerAnswer)


# --- Names and keepalives ---------------------------------------------------------------------------


async def test_a_name_that_a_go_pod_left_passes_to_the_sdk_pod_without_a_delete(
    domain: Domain, documents: Collection
) -> None:
    """F1. Other Go pods would claim whatever names it, the SDK pod's chunks too."""
    go = GoPod(documents, "amf-2")
    await go.allocate(700)
    await go.renew(ahead=1.5)
    async with domain.agent(**UNHURRIED):
        async with await documents.watch([{"$match": {"operationType": "delete"}}]) as deletes:
            async with pod(domain, "amf-2") as (_, pool):
                assert await pool.allocate(timeout=SEEN_SECONDS)
                pushed = await documents.find_one({"_id": "amf-2"})
                assert pushed is not None
                assert mirrored(pushed)  # so that no `DeletePod` of the Go pod's instance finds it
                told = {"ip": "10.0.0.9", "instance": "nf", "down": False}
                assert pushed["drsm"]["go"] == told  # nobody knows yet that it is gone
                claimed = await chunk(documents, 700, lambda d: "drsm" in d)
                assert (claimed["podId"], claimed["podIp"]) == ("amf-2", "10.0.0.1")
                assert claimed["drsm"]["go_owners"] == ["amf-2"]
                await seen(documents, "amf-2", lambda d: mirrored(d) and "go" not in d["drsm"])
            assert await deletes.try_next() is None


async def test_a_go_pod_and_an_sdk_pod_of_one_name_keep_what_they_have_and_it_is_told_once(
    domain: Domain, documents: Collection
) -> None:
    """F1. Nothing is lost while somebody finds out which of them is to go."""
    go = GoPod(documents, "amf-2")
    await go.allocate(700)
    with capture_logs() as logs:
        async with go.living(), domain.agent(**UNHURRIED), pod(domain, "amf-2") as (drsm, pool):
            life = drsm._session.life
            id_ = await pool.allocate(timeout=SEEN_SECONDS)
            await eventually(lambda: any(log["event"] == "go_namesake" for log in logs))
            await asyncio.sleep(1.5 * SILENCE)  # longer than anything that could be taken for its end
            table = await mongo_table(domain)
            assert table[700] == ("amf-2", 0)
            assert table[id_ >> 10][1] > 0
            assert drsm._session.life is life
    assert sum(log["event"] == "go_namesake" for log in logs) == 1


async def test_a_rollback_under_the_same_name_address_and_instance_is_seen_as_the_go_pod_it_is(
    domain: Domain, documents: Collection
) -> None:
    """F2. It sets its fields over the mirror, and its chunks are there before its first keepalive: neither
    may end by what was the SDK pod's."""
    async with domain.served(**UNHURRIED, allocation_ttl=21.0) as asking, pod(domain, "amf-9"):
        async with pod(domain, "amf-2"):
            await seen(documents, "amf-2", mirrored)
        go = GoPod(documents, "amf-2", ip="10.0.0.1")
        await go.allocate(700)
        assert await documents.find_one({"_id": "amf-2"}) is not None
        async with go.living():
            await asking.seen(lambda: any(u.pod.incarnation == 0 for u in asking.of(m.PodUp)))
            answer = await owner(asking, 700)
            assert answer.owner is not None
            assert (answer.owner.name, answer.owner.state, answer.owner.incarnation) == ("amf-2", "live", 0)
            await asyncio.sleep(1.5 * SILENCE)
            assert (await mongo_table(domain))[700] == ("amf-2", 0)


async def test_a_pod_has_its_mirror_before_its_first_chunk(domain: Domain, documents: Collection) -> None:
    """F11, F7. Whatever of a former life is deleted late, is not this one's; and no `DeletePod` names it."""
    async with await documents.watch() as changes:
        async with domain.agent(**UNHURRIED), pod(domain, "amf-1"):
            mirror, first = await within(changes.next()), await within(changes.next())
    assert mirror["documentKey"]["_id"] == "amf-1"
    assert mirrored(mirror["fullDocument"])
    assert mirror["fullDocument"]["drsm"]["instance"] == "nf"
    assert first["documentKey"]["_id"].startswith("chunkid-")
    assert first["fullDocument"]["podInstance"] == "nf"


async def test_mirrors_end_by_the_databases_clock(
    domain: Domain, documents: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10. Those of an agent whose clock is slow would be deleted at once, again and again."""
    monkeypatch.setattr("time.time", lambda: 1e9)
    async with domain.agent(**UNHURRIED), pod(domain, "amf-1"):
        mirror = await seen(documents, "amf-1", mirrored)
        hello = await documents.database.client.admin.command("hello")
    left = mirror["expireAt"] - hello["localTime"]
    assert timedelta(seconds=310) < left < timedelta(seconds=1000)


# --- Deaths and claims ------------------------------------------------------------------------------


async def test_where_only_go_pods_live_they_are_shown_a_death_once_nobody_issues_any_more(
    domain: Domain, documents: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4. Again and again: they may have missed it."""
    monkeypatch.setattr(mirrors, "SHOWN_AGAIN", 1.0)
    pools = [{"name": POOL, "usage_lag_ms": 1000}]
    async with domain.agent(**UNHURRIED, pools=pools), GoPod(documents, "go-1").living():
        async with await documents.watch([{"$match": {"documentKey._id": "amf-1"}}]) as changes:
            async with pod(domain, "amf-1") as (_, pool):
                n = (await pool.allocate(timeout=SEEN_SECONDS)) >> 10
                assert (await within(changes.next()))["operationType"] == "insert"
            left = asyncio.get_running_loop().time()
            kinds = [(await within(changes.next()))["operationType"]]
            assert asyncio.get_running_loop().time() - left > 0.9  # `W`, as it left in good order
            kinds += [(await within(changes.next()))["operationType"] for _ in range(4)]
            assert kinds == ["delete", "insert", "delete", "insert", "delete"]
            assert (await mongo_table(domain))[n][0] == "amf-1"
            await GoPod(documents, "go-1").claim(n, "amf-1")


async def test_a_setting_has_go_pods_claim_sooner(domain: Domain, documents: Collection) -> None:
    """F4. With its price, which docs/migration.md tells."""
    async with GoPod(documents, "go-1").living(), domain.agent(**UNHURRIED, go_claims_after=0.5):
        async with pod(domain, "amf-1"):
            await seen(documents, "amf-1", mirrored)
        async with asyncio.timeout(SEEN_SECONDS / 4):  # instead of the ten seconds of `W`
            while await documents.find_one({"_id": "amf-1"}):
                await asyncio.sleep(0.05)


async def test_a_name_gets_nothing_right_after_its_keepalive_was_deleted(
    domain: Domain, documents: Collection
) -> None:
    """F4, F1. Go pods claim then whatever names it."""
    async with domain.served(**UNHURRIED) as asking, GoPod(documents, "go-1").living():
        await asyncio.sleep(1.1)  # what was before the lead nobody knows
        opened = await asking.open("amf-1")
        await asking.acquire("amf-1", opened.incarnation)
        await documents.delete_one({"_id": "amf-1"})
        gone = asyncio.get_running_loop().time()
        await seen(documents, "amf-1", mirrored)  # so the leader has seen that it was gone
        refused = await refusals(lambda: asking.acquire("amf-1", opened.incarnation, request_id="b"))
        assert {failure.reason for failure in refused} == {"settling"}
        assert asyncio.get_running_loop().time() - gone > 0.9


async def test_a_new_go_pod_is_unknown_until_it_was_silent(domain: Domain, documents: Collection) -> None:
    """F5. It allocates for five seconds before its first keepalive; snapshots and events say the same."""
    async with domain.served(**UNHURRIED) as asking:
        async with Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS) as demux:
            await GoPod(documents, "go-1").allocate(7)
            await eventually(lambda: demux.owner(7 << 10))
            assert [pod.state for pod in demux.pods()] == ["unknown"]
            answer = await owner(asking, 7)
            assert answer.owner is not None
            assert answer.owner.state == "unknown"
            (state,) = (await asking.ask(asking.subjects.pool(POOL, "pods"), m.Empty(), m.Pods)).pods
            assert (state.state, state.use) == ("unknown", None)
            async with Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as late:
                assert [pod.state for pod in late.pods()] == ["unknown"]
            await eventually(lambda: [pod.state for pod in demux.pods()] == ["down"])
            stand_in = await documents.find_one({"_id": "go-1"})
            assert stand_in is not None
            assert stand_in["podInstance"] == "drsm:go-1:0"
            await GoPod(documents, "go-1").renew()
            await eventually(lambda: [pod.state for pod in demux.pods()] == ["live"])


async def test_a_go_pod_that_comes_back_gets_back_what_nothing_was_issued_from(
    domain: Domain, documents: Collection
) -> None:
    """F6. It never knew that it was taken for dead, and issues from it all the time."""
    go = GoPod(documents, "go-1")
    await go.allocate(7, 8)
    await go.renew()
    with capture_logs() as logs:
        async with domain.agent(**UNHURRIED), pod(domain, "amf-1") as (drsm, pool):
            life = drsm._session.life
            claimed = await chunk(documents, 7, lambda d: d.get("drsm"))
            assert (claimed["drsm"]["go_owners"], claimed["drsm"]["hold_ms"]) == (["go-1"], 3_600_000)
            async with go.living():
                for n in (7, 8):
                    await chunk(documents, n, lambda d: d["podId"] == "go-1")
                await eventually(lambda: not {7, 8} & {c.n for c in pool._stock})
                assert drsm._session.life is life
                assert await pool.allocate(timeout=SEEN_SECONDS)
    (told,) = [log for log in logs if log["event"] == "go_pod_came_back"]
    assert (told["pod"], sorted(told["returned"]), told["held"]) == ("go-1", [7, 8], [])


async def test_a_chunk_that_was_issued_from_is_held_anew_while_its_go_pod_lives(
    domain: Domain, documents: Collection
) -> None:
    """F6. For its owner; with a hold from the Go pod's last sign of life. And it is not given back
    meanwhile."""
    go = GoPod(documents, "go-1")
    await go.allocate(7)
    await go.renew()
    settings = UNHURRIED | {"go_hold": 1.0}
    pools = [{"name": POOL, "usage_lag_ms": 100}]
    with capture_logs() as logs:
        async with domain.agent(**settings, pools=pools), pod(domain, "amf-1") as (drsm, pool):
            life = drsm._session.life
            first = await chunk(documents, 7, lambda d: d.get("drsm") and not d["drsm"]["marked"])
            async with go.living():
                again = await chunk(documents, 7, lambda d: d["drsm"]["grant"] != first["drsm"]["grant"])
                assert (again["podId"], again["drsm"]["marked"]) == ("amf-1", True)
                assert again["drsm"]["hold_ms"] >= 1000
                await chunk(documents, 7, lambda d: d["drsm"]["grant"] != again["drsm"]["grant"])
                assert not pool._stock._chunks[7].open if 7 in pool._stock else True
            await chunk(documents, 7, lambda d: not d["drsm"]["marked"])
            assert drsm._session.life is life
    told = [log for log in logs if log["event"] == "go_pod_came_back"]
    assert told[0]["held"] == [7]


async def test_a_chunk_that_a_go_pod_claims_costs_that_chunk_and_no_session(
    domain: Domain, documents: Collection
) -> None:
    """F12. By a late delete, an outage longer than the lead, an operator."""
    with capture_logs() as logs:
        async with domain.agent(**UNHURRIED, go_hold=1.0), pod(domain, "amf-1") as (drsm, pool):
            life = drsm._session.life
            id_ = await pool.allocate(timeout=SEEN_SECONDS)
            other = id_ >> 10
            while other == id_ >> 10:
                other = (await pool.allocate(timeout=SEEN_SECONDS)) >> 10
            changes = pool.changes()
            go = GoPod(documents, "go-1")
            async with go.living():
                await go.claim(id_ >> 10, "amf-1")
                while not isinstance(change := await within(anext(changes)), Lost):
                    pass
                assert change.chunks == (id_ >> 10,)
                assert not pool.valid(id_)
                assert drsm._session.life is life
                assert other in pool._stock
                assert any(log["event"] == "claimed_by_go" for log in logs)
            back = await chunk(documents, id_ >> 10, lambda d: d["podId"] == "amf-1")
            assert back["drsm"]["go_owners"] == ["go-1"]
            assert (
                back["drsm"]["hold_ms"] >= 310_000
            )  # the pod that it was taken from may not have heard of it


async def test_a_go_pod_that_starts_anew_elsewhere_is_found_there_with_its_old_chunks(
    domain: Domain, documents: Collection
) -> None:
    """F13. Its keepalive says where it is; its chunks are never written again."""
    await GoPod(documents, "go-1").allocate(7)
    async with GoPod(documents, "go-1", ip="10.0.0.77").living(), domain.served(**UNHURRIED) as asking:
        async with Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS) as demux:
            answer = await owner(asking, 7)
            assert answer.owner is not None
            assert answer.owner.ip == "10.0.0.77"
            found = demux.owner(7 << 10)
            assert found is not None
            assert found.ip == "10.0.0.77"
            await GoPod(documents, "go-1", ip="10.0.0.78").renew()
            await asking.seen(lambda: any(u.pod.ip == "10.0.0.78" for u in asking.of(m.PodUp)))


async def test_a_silent_go_pods_keepalive_is_left_to_mongodb_until_that_is_overdue(
    domain: Domain, documents: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F14. A Go pod that lives and sees its own deleted claims its own chunks, and issues their ids anew."""
    monkeypatch.setattr(keepalives, "TTL_MONITOR", 2.0)
    monkeypatch.setattr(keepalives, "TTL_LATE", 1.0)
    await documents.drop_index("expireAt")
    await GoPod(documents, "go-1").renew(ahead=4.0)
    async with domain.served(**UNHURRIED) as asking:
        await asking.seen(lambda: [d.reason for d in asking.of(m.PodDown)] == ["silent"])
        seen_silent = await documents.find_one({"_id": "go-1"})
        assert seen_silent is not None
        assert seen_silent["drsm"]["silent"] == seen_silent["expireAt"]
        await asking.seen(lambda: [d.reason for d in asking.of(m.PodDown)] == ["silent", "deleted"])
        assert datetime.now(UTC) - seen_silent["expireAt"].replace(tzinfo=UTC) > timedelta(seconds=3)


# --- Numbers, definitions, databases -----------------------------------------------------------------


async def test_beside_go_pods_a_number_is_granted_again_before_a_new_one_also_by_the_next_leader(
    domain: Domain, documents: Collection
) -> None:
    """F3. Go pods never forget one, and stand still once they know all."""
    used: set[int] = set()
    async with GoPod(documents, "go-1").living(), requester(domain.nats_url, domain.prefix) as asking:
        for lead in range(2):
            async with domain.agent(**UNHURRIED):
                opened = await asking.open(f"amf-{lead}", request_id=f"o{lead}")
                for turn in range(5):
                    await asyncio.sleep(0 if turn else 1.1)  # what was deleted before the lead nobody knows
                    got = await asking.acquire(f"amf-{lead}", opened.incarnation, 3, f"{lead}-{turn}")
                    used |= {n for n, _ in got.chunks}
                    back = m.ChunkList(f"amf-{lead}", opened.incarnation, got.chunks)
                    await asking.ask(asking.subjects.pool(POOL, "release"), back, m.Released)
    assert used == {0, 1, 2}


async def test_no_new_number_is_granted_once_go_pods_have_seen_three_quarters(
    domain: Domain, documents: Collection
) -> None:
    """F3. Told by the refusal and by an alarm, both with the way out."""
    go = GoPod(documents, "go-1")
    await go.allocate(*range(4, 14))
    pools = [{"name": POOL, "bits": 14}]
    with capture_logs() as logs:
        async with go.living(), domain.agent(**UNHURRIED, pools=pools), pod(domain, "amf-1") as (_, pool):
            with pytest.raises(PoolExhausted, match="Go pods know 12 numbers"):
                await drain(pool)
            await eventually(lambda: any(log["event"] == "go_numbers_run_out" for log in logs))
    assert {n for n, (name, _) in (await mongo_table(domain)).items() if name == "amf-1"} == {0, 1}


@pytest.mark.parametrize(
    ("definition", "why"),
    [
        ({"bits": 24, "block_bits": 8, "slots": 100}, "block_bits is 8"),
        ({"bits": 24, "slots": 1024}, "slots is 1024"),
        ({"bits": 40}, "bits is 40"),
        ({"reserved": [[5, 9]]}, "reserved"),
        ({"quarantine_ms": 1000}, "quarantine_ms"),
        ({"kind": "ipv4", "ranges": ["10.45.0.0/16"]}, "kind is ipv4"),
        ({"spaces": [{"name": "a"}, {"name": "b"}]}, "several spaces"),
    ],
)
async def test_a_definition_that_go_pods_do_not_keep_to_is_refused_where_they_are(
    domain: Domain, documents: Collection, definition: dict[str, Any], why: str
) -> None:
    """F8. And alarmed where they come later."""
    configured = domain.settings(pools=[{"name": POOL} | definition], **ONE_LEAD)
    with capture_logs() as logs:
        async with running(configured) as agent:
            await within(agent.leader.leading.wait())
            await GoPod(documents, "go-1").allocate(7)
            await eventually(lambda: any(log["event"] == "go_cannot_honour" for log in logs))
    (told,) = [log for log in logs if log["event"] == "go_cannot_honour"]
    assert why in " ".join(told["reasons"])
    with pytest.raises(Misconfigured, match=why):
        async with running(configured):
            pass


async def test_go_pods_in_another_database_are_found_and_the_setting_is_named(domain: Domain) -> None:
    """F8. The agent beside them would show no pods, and its own would get chunks that the others use."""
    other, name = f"{domain.database}-other", domain.prefix  # a pool that no other test has
    settings: dict[str, Any] = {"leader_ttl": 1.0, "pools": [{"name": name}]}
    async with mongo_client(domain) as client:
        await GoPod(client[other][name], "go-1").allocate(7)
        try:
            with capture_logs() as logs:
                async with domain.agent(**settings):
                    pass
            (told,) = [log for log in logs if log["event"] == "go_fleet_elsewhere"]
            assert (told["pool"], told["found"]) == (name, [other])
            assert f"DRSM_MONGO_DATABASE={other}" in told["action"]
            moved = [{"name": name, "revision": 2, "database": other}]
            with capture_logs() as logs:
                async with domain.served(**settings | {"pools": moved}) as asking:
                    owned = (await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)).pools[0].chunks
            assert owned == 1
            assert not any(log["event"] == "go_fleet_elsewhere" for log in logs)
        finally:
            await client.drop_database(other)


async def test_documents_without_all_fields_are_read_and_claimed(
    domain: Domain, documents: Collection
) -> None:
    """F9. The original wrote fewer once."""
    bare = {"_id": "chunkid-7", "type": "chunk", "podId": "go-1"}
    await documents.insert_one(dict(bare))
    async with domain.served(**UNHURRIED, go_hold=1.0) as asking:
        answer = await owner(asking, 7)
        assert answer.owner is not None
        assert (answer.owner.name, answer.owner.ip, answer.owner.instance) == ("go-1", "", "")
        async with pod(domain, "amf-1"):
            await chunk(documents, 7, lambda d: d["podId"] == "amf-1")


async def test_a_keepalive_that_cannot_be_read_is_told_once_and_counts_again_once_its_go_pod_heals_it(
    domain: Domain, documents: Collection
) -> None:
    """The Go pod sets its own fields, and the stream tells those that differ. Until then nothing is written
    in its place."""
    go = GoPod(documents, "amf-2")
    await go.allocate(700)
    await go.renew()
    with capture_logs() as logs:
        async with domain.served(**UNHURRIED) as asking:
            await documents.update_one({"_id": "amf-2"}, {"$set": {"podIp": 5}})
            await eventually(lambda: any(log["event"] == "keepalive_in_the_way" for log in logs))
            await asyncio.sleep(5 * mirrors.CHECK_INTERVAL)
            assert sum(log["event"] == "keepalive_in_the_way" for log in logs) == 1
            await go.renew()
            await asking.seen(lambda: [u.pod.ip for u in asking.of(m.PodUp)][-1:] == ["10.0.0.9"])
            answer = await owner(asking, 700)
            assert answer.owner is not None
            assert answer.owner.state == "live"


@pytest.mark.parametrize(("seconds", "found"), [(None, "no index"), (60, "expireAfterSeconds 60")])
async def test_a_ttl_index_that_is_missing_or_another_is_told(
    domain: Domain, documents: Collection, seconds: int | None, found: str
) -> None:
    """F15. Nothing dies in Go pods' eyes. At the start, and again when it was dropped while the agent
    runs."""
    with capture_logs() as logs:
        async with GoPod(documents, "go-1").living(), domain.agent(**ONE_LEAD):
            await asyncio.sleep(1.0)
            assert not any(log["event"] == "ttl_index_missing" for log in logs)
            await documents.drop_index("expireAt")
            if seconds is not None:
                await documents.create_index("expireAt", expireAfterSeconds=seconds)
            await eventually(lambda: any(log["event"] == "ttl_index_missing" for log in logs))
    (told,) = [log for log in logs if log["event"] == "ttl_index_missing"]
    assert told["found"] == found
