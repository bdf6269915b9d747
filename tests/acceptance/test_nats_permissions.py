"""deploy/nats-permissions.conf on a real nats-server: each user can do its work, and no other's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats
import pytest

from drsm_agent.embedded import NatsServer, Scratch, start_nats_server
from drsm_sdk import Demux, Drsm, Pod
from drsm_sdk.cli.ask import Access
from tests.harness import POOL, SEEN_SECONDS, Domain, eventually, within

CONFIGURATION = Path(__file__).parents[2] / "deploy/nats-permissions.conf"
PREFIX = "drsm"  # which the file names
USERS = {"agent": "AGENT", "amf": "POD", "demux": "DEMUX", "operator": "OPERATOR"}


def as_(user: str) -> Any:
    return {"user": user, "password": f"of-{user}"}


@asynccontextmanager
async def guarded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    """A server that takes the file as it stands."""
    for user, variable in USERS.items():
        monkeypatch.setenv(f"DRSM_{variable}_PASSWORD", f"of-{user}")
    async with Scratch() as scratch:
        yield await start_nats_server(scratch, config=CONFIGURATION.read_text())


async def test_with_the_least_permissions_each_does_its_work(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent leads, a pod allocates and gives back, a demux and an operator see it, and the server has
    refused nobody anything: what is refused often shows only later, or never."""
    async with guarded(monkeypatch) as server:
        here = replace(domain, nats_url=server.url, prefix=PREFIX)
        async with (
            here.agent(nats_user="agent", nats_password="of-agent") as agent,
            Demux.connect(server.url, POOL, timeout=SEEN_SECONDS, **as_("demux")) as demux,
            Drsm.connect(
                server.url, Pod("amf-1", "10.0.0.1", "i"), timeout=SEEN_SECONDS, **as_("amf")
            ) as drsm,
        ):
            pool = await drsm.join(POOL, in_use=lambda first, last: [])
            id_ = await pool.allocate()
            await eventually(lambda: (owner := demux.owner(id_)) and owner.name == "amf-1" and demux.synced)
            monkeypatch.setenv("DRSM_NATS_USER", "operator")
            monkeypatch.setenv("DRSM_NATS_PASSWORD", "of-operator")
            async with Access(server.url, PREFIX, SEEN_SECONDS).asking() as operator:
                (state,) = (await operator.pools()).pools
                assert state.pods == 1
                assert [said.pod.name for said in (await operator.pods(POOL))[POOL].pods] == ["amf-1"]
                owner = (await operator.owner(POOL, id_, None))[0].owner
                assert owner is not None
                assert owner.name == "amf-1"
                assert (await operator.snapshots(POOL))[POOL].owners[0].name == "amf-1"
            watch = await nats.connect(server.url, **as_("operator"))
            events = await watch.subscribe(f"{PREFIX}.evt.>")
            await watch.flush()
            pool.release(id_)
            assert (await events.next_msg(timeout=SEEN_SECONDS)).subject.startswith(f"{PREFIX}.evt.{POOL}.")
            await watch.close()
            await eventually(lambda: agent.unready() == [])
        assert "Violation" not in server.log_since(0)


FORBIDDEN = [
    ("amf", "publish", "drsm.evt.amfid.pod.down"),  # a forged event
    ("amf", "publish", "drsm.rpc.pool.tmsi.acquire"),  # another network function's pool
    ("amf", "publish", "_INBOX.of.another"),  # a forged answer
    ("amf", "subscribe", "drsm.rpc.>"),  # counts as an agent
    ("demux", "publish", "drsm.rpc.session.close"),
    ("demux", "publish", "drsm.rpc.pool.amfid.acquire"),
    ("operator", "publish", "drsm.rpc.session.close"),
    ("operator", "publish", "drsm.rpc.pool.amfid.release"),
    ("operator", "subscribe", "drsm.rpc.>"),
    ("agent", "publish", "drsm.rpc.session.close"),
    ("agent", "publish", "drsm.rpc.pools"),  # an operator in its container asks as operator
]


async def test_nobody_can_do_anothers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server names each refusal to whom it refuses."""
    async with guarded(monkeypatch) as server:
        for user, verb, subject in FORBIDDEN:
            refusals: asyncio.Queue[str] = asyncio.Queue()

            async def note(error: Exception, refusals: asyncio.Queue[str] = refusals) -> None:
                refusals.put_nowait(str(error).lower())

            client = await nats.connect(server.url, error_cb=note, **as_(user))
            if verb == "publish":
                await client.publish(subject, b"{}")
            else:
                await client.subscribe(subject)
            said = await within(refusals.get())
            assert "permissions violation" in said
            assert subject.lower() in said
            await client.close()
