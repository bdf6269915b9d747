"""What a NATS server does not allow: permissions, credentials that end, connections and readers too many."""

import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from drsm_agent.embedded import NatsServer, Scratch, start_nats_server
from drsm_agent.service import running
from drsm_sdk import AgentUnavailable, Demux, Drsm, Pod, nats_transport
from tests.harness import POOL, Domain, Requester, eventually, renewing, requester, within

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


EVERYTHING = ""
NO_REQUESTS_HEARD = 'subscribe: {deny: "PREFIX.rpc.>"}'
NO_REQUESTS_SENT = 'publish: {deny: "PREFIX.rpc.>"}'
NO_EVENTS_HEARD = 'subscribe: {deny: "PREFIX.evt.>"}'
limited: Any = {"user": "limited", "password": "secret"}


async def test_an_agent_that_may_not_hear_requests_leaves_the_lead_and_says_why(domain: Domain) -> None:
    """Taken from it while it leads; given back, it leads again."""
    async with guarded(domain, EVERYTHING) as nats:
        settings = nats.domain.settings(nats_user="limited", nats_password="secret")
        async with running(settings) as agent:
            await within(agent.leader.leading.wait())
            nats.allow(NO_REQUESTS_HEARD)
            await eventually(lambda: not agent.leader.leading.is_set())
            await eventually(lambda: any("permissions violation" in why.lower() for why in agent.unready()))
            nats.allow(EVERYTHING)
            await within(agent.leader.leading.wait())
            assert agent.unready() == []


async def test_an_agent_that_may_not_hear_requests_makes_room_for_one_that_may(domain: Domain) -> None:
    """It has subscribed, as far as its client knows; pods would hear "no responders" for ever."""
    async with guarded(domain, NO_REQUESTS_HEARD) as nats:
        async with running(nats.domain.settings(nats_user="limited", nats_password="secret")) as agent:
            await eventually(lambda: any("permissions violation" in why.lower() for why in agent.unready()))
            async with nats.served() as asking:
                assert (await asking.open("amf-1")).incarnation
            assert not agent.leader.leading.is_set()


async def test_a_pod_that_may_not_ask_is_told_so(domain: Domain) -> None:
    """The server says nothing to the one who waits, but it does to the connection."""
    async with guarded(domain, NO_REQUESTS_SENT) as nats, nats.served():
        pod = Drsm.connect(nats.server.url, Pod("amf-1", "", ""), prefix=domain.prefix, timeout=3, **limited)
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
