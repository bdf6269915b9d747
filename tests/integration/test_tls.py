"""NATS with TLS: agent and SDK with their own certificates, and servers that are not what was asked for."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from nats.aio.client import Client, Srv
from nats.errors import Error as NatsError

from drsm_agent import service
from drsm_agent.bus import nats_bus
from drsm_agent.bus.nats_bus import NatsBus
from drsm_agent.embedded import Mongod, Scratch, start_nats_server
from drsm_agent.embedded.binaries import find_mongod
from drsm_agent.errors import BusUnavailable, StoreUnavailable
from drsm_agent.store import replica_set
from drsm_agent.store.mongo import MongoStore
from drsm_sdk import Drsm, Pod, nats_transport
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.transport import NotConnected
from tests.harness import POOL, SEEN_SECONDS, UNHURRIED, Domain, eventually

TLS = """
tls {{ cert_file: "{0}/server.pem", key_file: "{0}/server.key", ca_file: "{0}/ca.pem", verify: true }}
"""
CONNECTED_SECONDS = 3.0
"""How long a connection is tried that must not come about; a slow machine must hear why, too."""


@dataclass(frozen=True)
class Secured:
    """A server that takes only who shows a certificate of its authority."""

    domain: Domain
    home: Path

    @property
    def agent(self) -> dict[str, Any]:
        return {
            "nats_tls_ca": self.home / "ca.pem",
            "nats_tls_certificate": self.home / "client.pem",
            "nats_tls_key": self.home / "client.key",
        }

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.home / "ca.pem")
        context.load_cert_chain(self.home / "client.pem", self.home / "client.key", password="of the key")
        return context


@asynccontextmanager
async def secured(domain: Domain, home: Path) -> AsyncIterator[Secured]:
    issue(home)
    async with Scratch() as scratch:
        nats = await start_nats_server(scratch, config=TLS.format(home))
        yield Secured(Domain(domain.mongo_url, nats.url, domain.database, domain.prefix), home)


async def test_agent_and_pod_work_over_tls_with_certificates(domain: Domain, tmp_path: Path) -> None:
    async with secured(domain, tmp_path) as it, it.domain.agent(**it.agent):
        pod = Pod("amf-1", "10.0.0.1", "i")
        async with Drsm.connect(
            it.domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, tls=it.context
        ) as drsm:
            assert await (await drsm.join(POOL)).allocate(timeout=SEEN_SECONDS)


async def test_an_agent_that_does_not_know_the_servers_authority_does_not_connect(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CONNECT_TIMEOUT", CONNECTED_SECONDS)
    async with secured(domain, tmp_path) as it:
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        with pytest.raises(BusUnavailable, match="certificate"):
            async with service.running(it.domain.settings(**it.agent)):
                pass


@pytest.mark.parametrize("first", [False, True])
async def test_certificates_that_are_renewed_on_disk_are_read_for_the_next_connection(
    domain: Domain, tmp_path: Path, *, first: bool
) -> None:
    """By another authority, say: as cert-manager does. Agent and SDK; also where TLS begins first, and with a
    password on the key."""
    config = TLS.replace("verify: true", f"verify: true, handshake_first: {str(first).lower()}")
    issue(tmp_path, password=b"of the key")
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=config.format(tmp_path))
        it = Secured(Domain(domain.mongo_url, server.url, domain.database, domain.prefix), tmp_path)
        more = {"nats_tls_key_password": "of the key", "nats_tls_handshake_first": first}
        pod = Pod("amf-1", "10.0.0.1", "i")
        options: Any = {"tls_handshake_first": True} if first else {}
        async with (
            it.domain.agent(**it.agent, **more, **UNHURRIED) as agent,
            Drsm.connect(
                server.url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, tls=lambda: it.context, **options
            ) as drsm,
        ):
            pool = await drsm.join(POOL)
            issue(tmp_path, password=b"of the key")
            await server.kill()
            await server.start()
            await eventually(lambda: agent._bus.reconnects and agent.leader.leading.is_set())
            await eventually(lambda: drsm._transport.epoch > 1 and drsm._transport.connected)
            assert await pool.allocate(timeout=SEEN_SECONDS)


async def test_certificates_for_mongodb_that_are_renewed_on_disk_are_read_too(
    domain: Domain, tmp_path: Path
) -> None:
    """By another authority, for both sides."""
    issue(tmp_path, password=b"of the key")
    options = ["--replSet", "rs0", "--tlsMode", "preferTLS", "--tlsCAFile", str(tmp_path / "ca.pem")]
    options += ["--tlsCertificateKeyFile", str(tmp_path / "server-with-key.pem")]
    async with Scratch() as scratch:
        member = Mongod(scratch, find_mongod(), options=tuple(options))
        await member.start()
        await replica_set.initiate([member.address], "rs0", 2000)
        url = f"mongodb://{member.address}/?replicaSet=rs0&tls=true&tlsCAFile={tmp_path}/ca.pem"
        url += f"&tlsCertificateKeyFile={tmp_path}/client-with-key.pem"
        url += "&tlsCertificateKeyFilePassword=of%20the%20key"
        async with MongoStore(url, domain.database, {POOL: domain.database}) as store:
            await store.check()
            issue(tmp_path, password=b"of the key")
            await member.kill()
            await member.start()
            async with asyncio.timeout(SEEN_SECONDS):
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        await store.check()
                        break


def issue(home: Path, password: bytes = b"") -> None:
    """A new authority's certificates, in the same files."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(home / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1", "localhost")
        issued.cert_chain_pems[0].write_to_path(home / f"{name}.pem")
        key = issued.private_key_pem.bytes()
        if password and name == "client":
            loaded = serialization.load_pem_private_key(key, None)
            key = loaded.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password),
            )
        (home / f"{name}.key").write_bytes(key)
        (home / f"{name}-with-key.pem").write_bytes(issued.cert_chain_pems[0].bytes() + key)


@asynccontextmanager
async def plaintext() -> AsyncIterator[tuple[str, bytearray, asyncio.Event]]:
    """A server, or somebody between, without TLS: its address, what it was sent, whether it was asked."""
    received, asked = bytearray(), asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = b'{"server_id":"x","version":"2.11.0","max_payload":1048576,"auth_required":true}'
        writer.write(b"INFO " + info + b"\r\n")
        asked.set()
        received.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(converse, "127.0.0.1", 0) as listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", received, asked


@pytest.mark.parametrize("side", ["agent", "sdk"])
@pytest.mark.parametrize("asked_by", ["context", "url"])
async def test_nothing_is_sent_in_clear_text_when_tls_was_asked_for(side: str, asked_by: str) -> None:
    """Credentials least of all."""
    options: dict[str, Any] = {"user": "a", "password": "secret"}
    if asked_by == "context":
        options["tls"] = ssl.create_default_context()
    async with plaintext() as (address, received, asked):
        url = f"{'tls' if asked_by == 'url' else 'nats'}://{address}"
        if side == "agent":
            with pytest.raises(BusUnavailable, match="requires TLS"):
                await NatsBus.connect(url, name="agent", timeout=CONNECTED_SECONDS, **options)
        else:
            transport = NatsTransport(url, options=options)
            with pytest.raises(NotConnected, match="requires TLS"):
                await transport.connect(CONNECTED_SECONDS)
            await transport.close()
        assert asked.is_set()
        assert bytes(received) == b""


@pytest.mark.parametrize("side", ["agent", "sdk"])
@pytest.mark.parametrize(
    ("scheme", "required", "encrypted"),
    [
        ("nats", True, True),
        ("nats", False, False),
        ("tls", True, True),
        ("tls", False, False),
        ("wss", False, True),
        ("ws", True, False),
        ("ws", False, False),
    ],
)
async def test_what_goes_over_a_connection_that_asks_for_tls_is_encrypted(
    side: str, scheme: str, required: bool, encrypted: bool
) -> None:
    """Over ws:// nothing ever is, though a server that has TLS elsewhere says that it requires it."""
    client: Client = nats_bus._Client(tls=True) if side == "agent" else nats_transport._TlsClient()
    client.options = {"tls_handshake_first": False}
    client._current_server = Srv(urlparse(f"{scheme}://127.0.0.1:4222"))
    refusal = contextlib.nullcontext() if encrypted else pytest.raises(NatsError, match="requires TLS")
    with refusal:
        await client._process_info({"tls_required": required}, initial_connection=True)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("nats://a:4222,nats://b:4222", False),
        ("nats://a:4222,tls://b:4222", True),
        ("ws://a:443,wss://b:443", True),
        ("ws://a:443", False),
    ],
)
def test_one_encrypted_server_in_the_list_asks_for_tls_of_all(url: str, wanted: bool) -> None:
    """Also of those that it tells of, which nats-py takes for `nats://`."""
    assert nats_bus._wants_tls(url, {}) is wanted
    assert NatsTransport(url.split(","))._wants_tls() is wanted
