"""What a NATS server does not allow: permissions, credentials that end, connections and readers too many."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nkeys
import pytest
from nats.aio.client import Client

from drsm_agent.embedded import NatsServer, Scratch, start_nats_server
from drsm_agent.service import running
from drsm_sdk import AgentUnavailable, Demux, Drsm, Pod, nats_transport, rpc
from drsm_sdk.cli.ask import Access
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.transport import NotConnected
from tests.fault.link import Link
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Requester,
    eventually,
    renewing,
    requester,
    within,
)
from tests.integration.test_start import EXIT_FAULT, agent_process
from tests.nats_credentials import Operator
from tests.proxy import proxy

USERS = """
authorization { users = [
  {user: admin, password: secret}
  {user: limited, password: secret, permissions: {PERMISSIONS}}
] }
"""


class Guarded:
    """A server with a user who may do everything, and one who may do what a test says."""

    def __init__(self, server: NatsServer, domain: Domain) -> None:
        self.server, self._domain = server, domain
        self.admin = server.url.replace("//", "//admin:secret@")
        self.domain = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)

    def allow(self, permissions: str) -> None:
        """From now on, without a restart; `PREFIX` is the domain's."""
        file = self.server.home / "nats.conf"
        file.write_text(configured(permissions, self._domain))
        self.server._signal(signal.SIGHUP)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Requester]:
        """By an agent that may do everything."""
        async with (
            requester(self.admin, self._domain.prefix) as asking,
            self.domain.agent(nats_user="admin", nats_password="secret"),
        ):
            yield asking


def configured(permissions: str, domain: Domain) -> str:
    return USERS.replace("PERMISSIONS", permissions.replace("PREFIX", domain.prefix))


@asynccontextmanager
async def guarded(domain: Domain, permissions: str) -> AsyncIterator[Guarded]:
    async with Scratch() as scratch:
        yield Guarded(await start_nats_server(scratch, config=configured(permissions, domain)), domain)


MORE_THAN_STOCK = 5000
ENCODED = "authorization { users = [ {user: 'amf@core', password: 'p%41/ss:w@rd'} ] }"


async def test_user_and_password_in_a_url_are_percent_encoded_as_in_any_url(domain: Domain) -> None:
    """For the agent and the SDK, on the first connection and on those after it. A password may have a per
    cent sign of its own."""
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=ENCODED)
        url = server.url.replace("//", "//amf%40core:p%2541%2Fss%3Aw%40rd@")
        there = Domain(domain.mongo_url, url, domain.database, domain.prefix)
        amf = Pod("amf-1", "10.0.0.1", "")
        async with there.agent(), Drsm.connect(url, amf, prefix=domain.prefix) as drsm:
            pool = await drsm.join(POOL)
            await server.stop()
            await server.start()
            for _ in range(MORE_THAN_STOCK):
                await pool.allocate(timeout=SEEN_SECONDS)


EVERYTHING = ""
NO_REQUESTS_HEARD = 'subscribe: {deny: "PREFIX.rpc.>"}'
ONLY_PROBES_HEARD = 'subscribe: {allow: ["PREFIX.rpc.agent.probe", "_INBOX.>"]}'
NO_REQUESTS_SENT = 'publish: {deny: "PREFIX.rpc.>"}'
NO_EVENTS_HEARD = 'subscribe: {deny: "PREFIX.evt.>"}'
limited: Any = {"user": "limited", "password": "secret"}


async def test_an_agent_that_may_not_hear_requests_leaves_the_lead_and_says_why(domain: Domain) -> None:
    """Taken from it while it leads; given back, it leads again. Meanwhile its metrics say nothing of chunks,
    which are another's to count: what it knew last would be an alarm for ever."""
    async with guarded(domain, EVERYTHING) as nats:
        settings = nats.domain.settings(nats_user="limited", nats_password="secret")
        async with running(settings) as agent:
            measured = partial(agent.metrics.registry.get_sample_value, labels={"pool": POOL})
            await within(agent.leader.leading.wait())
            await eventually(lambda: measured("drsm_orphans") == 0)
            assert measured("drsm_chunks_usable") == 2**14
            nats.allow(NO_REQUESTS_HEARD)
            await eventually(lambda: not agent.leader.leading.is_set())
            await eventually(lambda: measured("drsm_orphans") is None)
            assert measured("drsm_chunks_usable") is None
            await eventually(lambda: any("permissions violation" in why.lower() for why in agent.unready()))
            nats.allow(EVERYTHING)
            await within(agent.leader.leading.wait())
            assert agent.unready() == []


@pytest.mark.parametrize("permissions", [NO_REQUESTS_HEARD, ONLY_PROBES_HEARD], ids=["none", "probes"])
async def test_an_agent_that_may_not_hear_requests_makes_room_for_one_that_may(
    domain: Domain, permissions: str
) -> None:
    """It has subscribed, as far as its client knows; pods would hear "no responders" for ever."""
    async with guarded(domain, permissions) as nats:
        async with running(nats.domain.settings(nats_user="limited", nats_password="secret")) as agent:
            led = asyncio.create_task(agent.leader.leading.wait())
            await eventually(lambda: any("permissions violation" in why.lower() for why in agent.unready()))
            async with nats.served() as asking:
                assert (await asking.open("amf-1")).incarnation
            assert not led.done()
            led.cancel()


async def test_a_pod_that_may_not_ask_is_told_so(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says nothing to the one who waits, but it does to the connection."""
    monkeypatch.setattr(rpc, "TRY_TIMEOUT", 0.1)  # connecting may take all but this of the three seconds
    async with guarded(domain, NO_REQUESTS_SENT) as nats, nats.served():
        pod = Drsm.connect(
            nats.server.url, Pod("amf-1", "10.0.0.1", ""), prefix=domain.prefix, timeout=3, **limited
        )
        with pytest.raises(AgentUnavailable, match=r"(?i)permissions violation for publish"):
            await pod.__aenter__()


async def test_a_demux_that_may_not_hear_events_says_so_and_hears_them_once_it_may(
    domain: Domain, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It routes by its snapshot meanwhile, and does not call that synced."""
    monkeypatch.setattr(nats_transport, "REFUSED_RETRY", 0.2)
    caplog.set_level(logging.WARNING, "drsm_sdk")
    async with guarded(domain, NO_EVENTS_HEARD) as nats, nats.served() as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 1, "a")
        async with (
            renewing(asking, ("amf-1", pod)),
            Demux.connect(nats.server.url, POOL, prefix=domain.prefix, **limited) as demux,
        ):
            await asking.acquire("amf-1", pod, 1, "b")
            await eventually(lambda: not demux.synced)
            assert set(demux.chunks()) == {0}
            said = [r.getMessage() for r in caplog.records if "ermissions" in r.getMessage()]
            assert len(said) == 1
            assert f"{domain.prefix}.evt.{POOL}.>" in said[0].lower()
            nats.allow(EVERYTHING)
            await eventually(lambda: demux.synced and set(demux.chunks()) == {0, 1})
            await asking.acquire("amf-1", pod, 1, "c")
            await eventually(lambda: set(demux.chunks()) == {0, 1, 2})


# --- Closed for good: nats-py gives up on these, whatever it was told about reconnecting --------------------


async def test_an_agent_whose_credentials_end_ends_with_a_fault_that_says_so(
    domain: Domain, tmp_path: Path
) -> None:
    """A new process begins with new ones, as Kubernetes mounts them."""
    operator, credentials = Operator(), tmp_path / "agent.creds"
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=operator.server_config())
        operator.write_user(credentials, 15)
        guarded_by_it = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        async with agent_process(guarded_by_it, DRSM_NATS_CREDENTIALS=str(credentials)) as process:
            _, errors = await within(process.communicate(), 60)
        assert process.returncode == EXIT_FAULT, errors.decode()
        assert "serving" in errors.decode()
        said = errors.decode().splitlines()[-1].lower()
        assert said.startswith("drsm-agent: nats closed the connection for good")
        assert "expired" in said


async def test_pods_and_demuxes_go_on_while_their_credentials_are_replaced(
    domain: Domain, tmp_path: Path
) -> None:
    """The connection ends with the old ones; the next one is made with what the file has then."""
    operator, credentials = Operator(), tmp_path / "pod.creds"
    options: Any = {"user_credentials": str(credentials)}
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=operator.server_config())
        near = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        operator.write_user(tmp_path / "agent.creds", 600)
        async with AsyncExitStack() as entered:
            # Its `L` is a long one: until both are connected again may take longer than the default.
            agent = near.agent(**UNHURRIED, nats_credentials=tmp_path / "agent.creds")
            await entered.enter_async_context(agent)
            operator.write_user(credentials, 8)
            pod = Drsm.connect(server.url, Pod("amf-1", "10.0.0.1", ""), prefix=domain.prefix, **options)
            drsm = await entered.enter_async_context(pod)
            connected = Demux.connect(server.url, POOL, prefix=domain.prefix, **options)
            demux = await entered.enter_async_context(connected)
            pool, incarnation = await drsm.join(POOL), drsm.incarnation
            lines = [drsm._transport, demux._transport]
            operator.write_user(credentials, 1)
            await asyncio.sleep(2)  # nobody says that a file is too old now
            await eventually(lambda: not any(line.connected for line in lines))
            id_ = pool.allocate_nowait()
            assert (owner := demux.owner(id_)) is not None
            assert owner.name == "amf-1"
            operator.write_user(credentials, 600)
            await eventually(lambda: all(line.epoch > 1 for line in lines))
            await eventually(lambda: drsm.state == "live" and demux.synced)
            assert (drsm.incarnation, pool.valid(id_)) == (incarnation, True)


async def test_who_finds_a_server_full_is_connected_when_there_is_room() -> None:
    """(nats-py does not read what the server says before it hangs up.)"""
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config="max_connections: 1")
        occupant, transport = NatsTransport(server.url), NatsTransport(server.url)
        await occupant.connect(5.0)
        with pytest.raises(NotConnected):
            await transport.connect(1.0)
        await occupant.close()
        await eventually(lambda: transport.connected)
        await transport.close()


async def test_an_agent_that_finds_the_server_full_leads_again_once_there_is_room(domain: Domain) -> None:
    """It was cut off, and another took its place."""
    async with Scratch() as scratch, AsyncExitStack() as entered:
        server = await start_nats_server(scratch, config="max_connections: 1")
        way = Link(server.address)
        await way.start()
        entered.push_async_callback(way.stop)
        near = Domain(domain.mongo_url, f"nats://{way.address}", domain.database, domain.prefix)
        agent = await entered.enter_async_context(near.agent(leader_ttl=1.0))
        way.reset()
        occupant = NatsTransport(server.url)
        await occupant.connect(5.0)
        way.heal()
        await eventually(lambda: "maximum connections exceeded" in server.log_since(0))
        await eventually(lambda: not agent.leader.leading.is_set())
        await occupant.close()
        await within(agent.leader.leading.wait())


# --- Too slow -----------------------------------------------------------------------------------------------


async def test_a_demux_that_the_server_cut_off_for_being_slow_heals(domain: Domain) -> None:
    """It stands still while more is said than the server keeps for it."""
    async with Scratch() as scratch, AsyncExitStack() as entered:
        server = await start_nats_server(
            scratch, config='max_payload: 131072\nmax_pending: 262144\nwrite_deadline: "500ms"'
        )
        near = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        asking = await entered.enter_async_context(near.served())
        slow = await entered.enter_async_context(proxy(server.url))
        pod = (await asking.open("amf-1")).incarnation
        await entered.enter_async_context(renewing(asking, ("amf-1", pod)))
        connected = Demux.connect(slow.url, POOL, prefix=domain.prefix)
        demux = await entered.enter_async_context(connected)
        slow.silence()
        junk = asking.subjects.event(POOL, "junk")
        while "Slow Consumer Detected" not in server.log_since(0):
            await asking.client.publish(junk, bytes(64 * 1024))
            await asking.client.flush()
        await asking.acquire("amf-1", pod)
        slow.carry_on()
        await eventually(lambda: demux.synced and set(demux.chunks()) == {0})
        assert demux._transport.epoch > 1


async def test_an_agent_that_the_server_cut_off_for_being_slow_answers_again(domain: Domain) -> None:
    """It stands still while more is asked than the server keeps for it."""
    async with Scratch() as scratch, AsyncExitStack() as entered:
        server = await start_nats_server(
            scratch, config='max_payload: 131072\nmax_pending: 262144\nwrite_deadline: "500ms"'
        )
        slow = await entered.enter_async_context(proxy(server.url))
        near = Domain(domain.mongo_url, slow.url, domain.database, domain.prefix)
        asking = await entered.enter_async_context(requester(server.url, domain.prefix))
        agent = await entered.enter_async_context(near.agent(leader_ttl=1.0))
        slow.silence()
        while "Slow Consumer Detected" not in server.log_since(0):
            await asking.client.publish(f"{asking.subjects.all_requests[:-1]}junk", bytes(64 * 1024))
            await asking.client.flush()
        slow.carry_on()
        await eventually(lambda: agent._bus.reconnects > 0)
        await within(agent.leader.leading.wait())
        assert (await asking.open("amf-1")).incarnation


async def test_a_demux_that_is_slower_than_its_own_queue_heals(
    domain: Domain, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py drops the newest of what waits; the events among it are a gap like any other."""
    monkeypatch.setattr(Client.subscribe, "__defaults__", ("", None, None, 0, 10, 128 * 1024 * 1024))
    async with (
        domain.served() as asking,
        Demux.connect(domain.nats_url, POOL, prefix=domain.prefix) as demux,
    ):
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod)
        head, junk = asking.events[-1][0], asking.subjects.event(POOL, "junk")
        await eventually(lambda: set(demux.chunks()) == {0})
        heard = demux._transport.epoch
        with caplog.at_level(logging.WARNING, "drsm_sdk"):
            for _ in range(500):
                await asking.client.publish(junk, b"\x80")
            await asking.acquire("amf-1", pod, 1, "dropped")
            await eventually(lambda: demux.synced and set(demux.chunks()) == {0, 1})
        assert any("slow consumer" in record.getMessage().lower() for record in caplog.records)
        assert (demux._transport.epoch, head.pool) == (heard, POOL)


async def test_agent_and_operator_use_an_nkey_and_an_inbox_prefix_of_their_own(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where an account allows no other."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    (tmp_path / "user.nk").write_bytes(seed)
    allowed = '{publish: ">", subscribe: ["*.rpc.>", "*.evt.>", "_MINE.>"]}'
    user = nkeys.from_seed(bytearray(seed)).public_key.decode()
    async with Scratch() as scratch:
        config = f"authorization {{ users = [{{nkey: {user}, permissions: {allowed}}}] }}"
        server = await start_nats_server(scratch, config=config)
        here = replace(domain, nats_url=server.url)
        mine: Any = {"nats_nkey": tmp_path / "user.nk", "nats_inbox_prefix": "_MINE"}
        monkeypatch.setenv("DRSM_NATS_NKEY", str(tmp_path / "user.nk"))
        monkeypatch.setenv("DRSM_NATS_INBOX_PREFIX", "_MINE")
        async with here.agent(**UNHURRIED, **mine):
            async with Access(server.url, domain.prefix, SEEN_SECONDS).asking() as operator:
                assert [state.definition.name for state in (await operator.pools()).pools] == [POOL]
        assert "Violation" not in server.log_since(0)


async def test_a_connection_that_takes_long_comes_about_with_a_longer_time_out(domain: Domain) -> None:
    """Each try of it; with the default of two seconds none would."""
    server = urlsplit(domain.nats_url)

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with AsyncExitStack() as life:
            life.callback(writer.close)
            await asyncio.sleep(3.0)
            there, back = await asyncio.open_connection(server.hostname, server.port)
            life.callback(back.close)
            with suppress(ConnectionError):
                carrying = [
                    asyncio.create_task(_carry(reader, back)),
                    asyncio.create_task(_carry(there, writer)),
                ]
                await asyncio.wait(carrying, return_when=asyncio.FIRST_COMPLETED)
                for one in carrying:
                    one.cancel()
                await asyncio.gather(*carrying, return_exceptions=True)

    async with await asyncio.start_server(slowly, "127.0.0.1", 0) as listener:
        url = f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with replace(domain, nats_url=url).agent(**UNHURRIED, nats_connect_timeout=10.0):
            pass


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
