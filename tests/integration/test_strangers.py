"""Who is no agent answers requests: a JetStream stream that records everything acknowledges each of them to
who asked, mostly before the agent. And network functions in a NATS account of their own."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import nats
import pytest
from structlog.testing import capture_logs

from drsm_agent.core import writes
from drsm_agent.core.documents import Owner
from drsm_agent.embedded import Scratch, start_nats_server
from drsm_agent.service import running
from drsm_sdk import AgentUnavailable, Demux, Drsm, Pod
from drsm_sdk.cli.ask import Access
from tests.harness import ONE_LEAD, POOL, SEEN_SECONDS, UNHURRIED, Domain, eventually, mongo_client, within

CHUNKS, OWNERS = 5000, 1000
LONG_NAMES = [Owner(f"amf-{i}.{'x' * 60}.{'y' * 60}", "10.0.0.1", "i", 7) for i in range(OWNERS)]
"""Enough for a snapshot of several pages on a server that takes the smallest messages."""
SMALL = "max_payload: 131072\n"


@asynccontextmanager
async def servers(domain: Domain, config: str = "", *, jetstream: bool = False) -> AsyncIterator[Domain]:
    """The test's domain on a NATS server of its own, with a pool of several pages."""
    async with Scratch() as scratch, mongo_client(domain) as client:
        inserts = [writes.allocate(POOL, n, LONG_NAMES[n % OWNERS], f"{n:016x}", "") for n in range(CHUNKS)]
        await client[domain.database][POOL].insert_many([insert.document for insert in inserts])
        server = await start_nats_server(scratch, config=SMALL + config, jetstream=jetstream)
        yield replace(domain, nats_url=server.url, prefix="drsm")


async def record(url: str, *, no_ack: bool = False, **options: Any) -> None:
    """A stream over all subjects of the domain, as `nats stream add` makes it."""
    client = await nats.connect(url, **options)
    await client.jetstream().add_stream(name="everything", subjects=["drsm.>"], no_ack=no_ack)
    await client.close()


async def works(url: str, **options: Any) -> None:
    """A pod gets chunks, a demux a table of several pages, and both hear of changes; an operator is
    answered."""
    async with AsyncExitStack() as entered:
        demux = await entered.enter_async_context(Demux.connect(url, POOL, timeout=SEEN_SECONDS, **options))
        drsm = await entered.enter_async_context(
            Drsm.connect(url, Pod("amf-0", "10.0.0.9", "i"), timeout=SEEN_SECONDS, **options)
        )
        pool = await drsm.join(POOL, in_use=lambda first, last: [])
        id_ = await pool.allocate(timeout=SEEN_SECONDS)
        await eventually(lambda: (owner := demux.owner(id_)) and owner.name == "amf-0" and demux.synced)
        life = drsm._session.life
        await asyncio.sleep(2.0)  # several renewals
        assert drsm._session.life is life


async def test_a_stream_that_records_everything_and_acknowledges_it_is_passed_over(
    domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    """By pods, demuxes, the command line, and the agent that asks itself; both logs name the likely cause,
    once."""
    caplog.set_level(logging.WARNING, "drsm_sdk")
    async with servers(domain, jetstream=True) as here:
        await record(here.nats_url)
        with capture_logs() as logs:
            async with here.agent(**UNHURRIED) as agent:
                await works(here.nats_url)
                async with Access(here.nats_url, here.prefix, SEEN_SECONDS).asking() as operator:
                    assert [state.definition.name for state in (await operator.pools()).pools] == [POOL]
                    snapshot = (await operator.snapshots(POOL))[POOL]
                    assert sum(len(numbers) for _, numbers in snapshot.chunks) >= CHUNKS
                assert agent.unready() == []
        assert [log["event"] for log in logs].count("answered_by_others") == 1
    said = [line for line in caplog.messages if "--no-ack" in line]
    assert 1 <= len(said) <= 3  # the pod, the demux and the operator, each at most once


async def test_the_leader_is_followed_while_a_stream_acknowledges_everything(domain: Domain) -> None:
    async with servers(domain, jetstream=True) as here:
        await record(here.nats_url)
        async with AsyncExitStack() as life:
            await life.enter_async_context(here.agent(**UNHURRIED))
            async with running(here.settings(**UNHURRIED)) as standby:
                await life.aclose()
                await within(standby.leader.leading.wait())
                await works(here.nats_url)
                assert standby.unready() == []


async def test_a_stream_without_acknowledgements_says_nothing(domain: Domain) -> None:
    async with servers(domain, jetstream=True) as here:
        await record(here.nats_url, no_ack=True)
        with capture_logs() as logs:
            async with here.agent(**UNHURRIED):
                await works(here.nats_url)
        assert "answered_by_others" not in [log["event"] for log in logs]


def accounts(response: str, *, jetstream: bool = False) -> str:
    """Agents and network functions in accounts of their own, as docs/operations.md has them."""
    return f"""
        jetstream: {"enabled" if jetstream else "disabled"}
        accounts: {{
          AGENTS: {{
            {"jetstream: enabled" if jetstream else ""}
            users: [{{user: agent, password: secret}}]
            exports: [{{service: "drsm.rpc.>"{response}}}, {{stream: "drsm.evt.>"}}]
          }}
          FUNCTIONS: {{
            users: [{{user: amf, password: secret}}]
            imports: [
              {{service: {{account: AGENTS, subject: "drsm.rpc.>"}}}}
              {{stream: {{account: AGENTS, subject: "drsm.evt.>"}}}}
            ]
          }}
        }}
    """


AGENT: Any = {"nats_user": "agent", "nats_password": "secret"}
AMF: Any = {"user": "amf", "password": "secret"}


@pytest.mark.parametrize("recorded", [False, True])
async def test_network_functions_in_another_nats_account_work_with_a_service_of_response_type_stream(
    domain: Domain, *, recorded: bool
) -> None:
    """Also where the agents' account has a stream that acknowledges."""
    config = accounts(", response: stream", jetstream=recorded)
    async with servers(domain, config) as here:
        if recorded:
            await record(here.nats_url, user="agent", password="secret")
        async with here.agent(**UNHURRIED, **AGENT):
            await works(here.nats_url, **AMF)


async def test_a_service_of_one_response_is_refused_at_the_first_snapshot_with_what_to_do(
    domain: Domain,
) -> None:
    """The default. It would work until a table has two pages, and then never again."""
    async with servers(domain, accounts("")) as here, here.agent(**UNHURRIED, **AGENT):
        with pytest.raises(AgentUnavailable, match=r"response type stream"):
            async with Demux.connect(here.nats_url, POOL, timeout=8.0, **AMF):
                pass


async def test_a_service_of_one_response_beside_a_stream_is_told_as_that(domain: Domain) -> None:
    """The acknowledgement is the one response that is delivered."""
    async with servers(domain, accounts("", jetstream=True)) as here:
        await record(here.nats_url, user="agent", password="secret")
        async with here.agent(**UNHURRIED, **AGENT):
            with pytest.raises(AgentUnavailable, match=r"--no-ack"):
                async with Demux.connect(here.nats_url, POOL, timeout=8.0, **AMF):
                    pass


async def test_one_page_alone_is_refused_too(domain: Domain) -> None:
    """Before the pool has grown beyond it."""
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=accounts(""))
        here = replace(domain, nats_url=server.url, prefix="drsm")
        async with here.agent(**ONE_LEAD, **AGENT):
            with pytest.raises(AgentUnavailable, match=r"response type stream"):
                await within(_a_table(here.nats_url))


async def _a_table(url: str) -> None:
    async with Demux.connect(url, POOL, timeout=8.0, **AMF):
        pass
