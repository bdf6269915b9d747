"""What others can do to the database, the server and the process, and what the agent makes of it."""

import asyncio
import itertools
import signal
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from drsm_agent.embedded import Scratch, Stack, start_nats_server
from drsm_agent.errors import leaf
from drsm_agent.mirrors import Mirrors
from drsm_agent.service import BusBroken, running
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from tests.harness import POOL, SEEN_SECONDS, Domain, Failed, Requester, eventually, mongo_client, within
from tests.integration.test_leadership import go_chunk
from tests.integration.test_start import EXIT_OK, agent_process, refused

NO_EVENTS = """
authorization {
  users = [
    {user: agent, password: secret, permissions: {publish: {deny: "drsm.evt.>"}}}
    {user: admin, password: secret}
  ]
}
"""


async def test_after_a_collection_was_dropped_nothing_is_granted_while_its_chunks_may_be_in_use(
    domain: Domain,
) -> None:
    """Its chunks look free now, but pods still issue from them; a new history tells the consumers."""
    async with domain.served(liveness_ttl=SEEN_SECONDS) as asking, mongo_client(domain) as client:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 1, "a")
        histories = {head.history for head, _ in asking.events}
        await client[domain.database][POOL].drop()
        await asking.seen(lambda: {head.history for head, _ in asking.events} - histories)
        failed = await within(_refusal(asking, pod))
        assert (failed.error, failed.reason, failed.retry) == ("store_unavailable", "data_lost", True)
        again = (await asking.open("amf-2")).incarnation
        assert again > pod


async def _refusal(asking: Requester, pod: int) -> m.Failure:
    """The refusal of an acquire, once the agent answers again."""
    while True:
        try:
            await asking.acquire("amf-1", pod, 1, "b")
        except Failed as failed:
            return failed.failure
        except (NatsError, TimeoutError):
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("a chunk was granted")


@pytest.mark.parametrize("collection", ["drsm_stamps", "drsm_position", None])
async def test_an_agent_whose_own_documents_were_dropped_serves_again(
    domain: Domain, collection: str | None
) -> None:
    """None: the whole database. No hot loop of leads, and incarnations never go back."""
    async with domain.served() as asking, mongo_client(domain) as client:
        before = (await asking.open("amf-1")).incarnation
        if collection:
            await client[domain.database].drop_collection(collection)
        else:
            await client.drop_database(domain.database)
        after = await within(_opened(asking), 30)
        pools = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
        assert after > before
        assert pools.leader.term <= 4


async def _opened(asking: Requester) -> int:
    """The incarnation of a new session, once the agent answers again."""
    for attempt in itertools.count():
        try:
            return (await asking.open("amf-2", request_id=f"again-{attempt}")).incarnation
        except (Failed, NatsError, TimeoutError):
            await asyncio.sleep(0.05)
    raise AssertionError("unreachable")


async def test_documents_that_make_no_sense_do_not_stop_the_agent(domain: Domain) -> None:
    """Unreadable, out of range, of other types, or larger than any message: they do not count, events go on,
    and the next request is served."""
    chunk = {"type": "chunk", "podId": "x", "podIp": "", "podInstance": ""}
    odd = {"pod": "x", "ip": "", "instance": "", "grant": "g", "marked": False, "hold_ms": 0}
    vast = "x" * 1_100_000
    async with domain.served() as asking, mongo_client(domain) as client:
        await client[domain.database][POOL].insert_many(
            [
                chunk | {"_id": "chunkid-900", "drsm": odd | {"incarnation": 1e300}},
                chunk | {"_id": "chunkid-901", "drsm": odd | {"incarnation": -5}},
                chunk | {"_id": "chunkid-999999999", "drsm": odd | {"incarnation": 7}},
                {"_id": "chunkid-903", "type": "chunk", "podId": 5},
                {"_id": "chunkid-", "type": "chunk"},
                {"_id": "something", "type": "keepalive"},
                {"_id": 17},
                chunk | {"_id": "chunkid-904", "podInstance": vast},
                chunk | {"_id": "chunkid-905", "drsm": odd | {"incarnation": 7, "grant": vast}},
                {"_id": "vast", "type": "keepalive", "podId": "vast", "podIp": vast, "podInstance": ""},
            ]
        )
        pod = (await asking.open("amf-1")).incarnation
        acquired = await asking.acquire("amf-1", pod, 3)
        assert [n for n, _ in acquired.chunks] == [0, 1, 2]
        owners = {owner.name for page in await asking.snapshot() for owner in page.owners}
        assert owners == {"amf-1", "x", "something"}


async def test_sessions_that_make_no_sense_do_not_stop_the_agent(domain: Domain) -> None:
    """Too large for any message, named as another, or promised more than there is time: the same."""
    session = {"type": "session", "pod": "x", "ip": "", "instance": "", "incarnation": 7, "term": 0}
    session |= {"state": "live", "pools": [POOL], "request_id": "r", "promised_ms": 1000, "reason": ""}
    vast = "x" * 1_100_000
    async with domain.served() as asking, mongo_client(domain) as client:
        sessions = client[domain.database]["drsm_sessions"]
        chunk = {"_id": "chunkid-900", "type": "chunk", "podId": "y", "podIp": "", "podInstance": ""}
        drsm = {"pod": "y", "ip": "", "instance": "", "incarnation": 7, "grant": "0" * 16}
        await client[domain.database][POOL].insert_one(chunk | {"drsm": drsm})
        await sessions.insert_many(
            [
                session | {"_id": "x:7"},
                session | {"_id": f"{vast}:7"},
                session | {"_id": "y:7", "pod": "y", "state": "dead", "promised_ms": 2**63 - 1},
            ]
        )
        await sessions.update_one({"_id": "x:7"}, {"$set": {"state": "dead", "reason": vast}})
        pod = (await asking.open("amf-1")).incarnation
        acquired = await asking.acquire("amf-1", pod, 3)
        claims = await asking.seen(lambda: asking.of(m.ChunkClaimed))  # by x, too, if it was seen to live
        assert [n for n, _ in acquired.chunks] == [0, 1, 2]
        assert {claimed.chunks for claimed in claims} == {(900,)}


async def test_an_agent_that_may_not_publish_events_answers_nothing_and_is_not_ready() -> None:
    """NATS drops such events silently; a chunk granted then would be announced to nobody (G4)."""
    async with Stack(nats_config=NO_EVENTS) as stack:
        domain = Domain(stack.mongo_url, stack.nats_url, "drsm", "drsm")
        configured = domain.settings(nats_user="agent", nats_password="secret")
        async with running(configured) as agent:
            await eventually(lambda: any("permissions" in reason.lower() for reason in agent.unready()))
            assert not agent.leader.leading.is_set()


async def test_a_server_whose_messages_are_too_small_is_refused_with_the_setting_to_raise(
    domain: Domain,
) -> None:
    """Events and snapshot pages would not fit."""
    async with Scratch() as scratch:
        small = await start_nats_server(scratch, config="max_payload: 16384")
        said = await refused(domain, DRSM_NATS_URL=small.url)
    assert "max_payload" in said
    assert "16384" in said


async def test_answers_are_not_published_among_the_events(domain: Domain) -> None:
    """A reply subject under `drsm.evt.` is a client's attempt to speak in the agent's name."""
    async with domain.served() as asking:
        spoofed = asking.subjects.event(POOL, "sync")
        seen = len(asking.raw)
        await asking.client.publish(asking.subjects.pools, b"\x80", reply=spoofed)
        await asking.client.publish(asking.subjects.pools, b"\xc1", reply=spoofed)
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
        await asking.seen(lambda: len(asking.raw) > seen)
        assert all("pools" not in codec.decode(message.data) for message in asking.raw)
        assert all("error" not in codec.decode(message.data) for message in asking.raw)


@pytest.mark.parametrize("what", ["DRSM_NATS_URL", "DRSM_MONGO_URL"])
async def test_sigterm_ends_an_agent_that_is_still_starting(domain: Domain, what: str) -> None:
    """It waits for a server that is not there; the signal is heeded at once, not after the wait."""
    nowhere = {
        "DRSM_NATS_URL": "nats://127.0.0.1:1",
        "DRSM_MONGO_URL": "mongodb://127.0.0.1:1/?replicaSet=rs0",
    }
    async with agent_process(domain, **{what: nowhere[what]}) as process:
        await eventually(lambda: _heeds(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        await within(process.wait(), 15)  # NATS is waited for twice as long, MongoDB for ever
        assert process.returncode == EXIT_OK


def _heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for it."""
    status = Path(f"/proc/{pid}/status").read_text().split()
    return bool(int(status[status.index("SigCgt:") + 1], 16) >> (number - 1) & 1)


async def test_a_task_that_dies_ends_the_agent_with_its_reason(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7: nothing dies silently; Kubernetes starts a new one."""

    async def die(_: Mirrors) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Mirrors, "run", die)
    with pytest.raises(ExceptionGroup) as ended:
        async with running(domain.settings()) as agent:
            await within(agent.ended())
    assert str(leaf(ended.value)) == "a fault of ours"


async def test_the_end_of_the_nats_connection_for_good_ends_the_agent(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py closes for ever on some errors of the server, whatever it is told about reconnecting."""
    clients: list[Client] = []
    connect = Client.connect

    async def noted(client: Client, *args: object, **kwargs: object) -> None:
        clients.append(client)
        await connect(client, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "connect", noted)
    with pytest.raises(ExceptionGroup) as ended:  # noqa: PT012
        async with running(domain.settings()) as agent:
            await within(agent.leader.leading.wait())
            await clients[0].close()
            await within(agent.ended())
    assert isinstance(leaf(ended.value), BusBroken)


async def test_a_chunk_outside_of_a_pool_of_addresses_is_an_event_without_a_prefix(domain: Domain) -> None:
    """Go pods number chunks as they like: the agent goes on, and announces nobody else's addresses."""
    pools = [{"name": POOL, "kind": "ipv4", "ranges": ["10.45.0.0/16"]}]
    async with domain.served(pools=pools) as asking, mongo_client(domain) as client:
        chunks = [go_chunk(n, "go-1") for n in (255, 256, 10**18)]
        await client[domain.database][POOL].insert_many(chunks)
        events = await asking.seen(
            lambda: (
                sum(len(e.chunks) for e in asking.of(m.ChunkAllocated)) == 3 and asking.of(m.ChunkAllocated)
            )
        )
        prefixes = [prefix for event in events for prefix in event.prefixes[POOL]]
        assert prefixes == ["10.45.255.0/24", "", ""]
