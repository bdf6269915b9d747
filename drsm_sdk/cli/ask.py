"""What an operator asks the agent: each question is repeated until its deadline."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from drsm_sdk import fetch, naming
from drsm_sdk.ambient import Backoff, Chance, boottime
from drsm_sdk.errors import AgentUnavailable, BadRequest
from drsm_sdk.rpc import RETRY_FIRST, RETRY_MOST, Refused, Rpc
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.transport import NotConnected, Transport, on_nats
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects

M = TypeVar("M")

SNAPSHOT_TIMEOUT = 30.0
"""Of one try: a large pool has many pages."""


@dataclass(frozen=True, slots=True)
class Access:
    """Where to ask: NATS servers separated by commas, the domain's subject prefix, and how many seconds
    one question may take. Credentials come from the environment: an argument could be read by others."""

    url: str
    prefix: str
    timeout: float

    @property
    def subjects(self) -> Subjects:
        """Raises BadRequest for a prefix that cannot be one."""
        return naming.domain(self.prefix)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Transport]:
        """A connection to NATS. Raises AgentUnavailable within the deadline, BadRequest."""
        transport = on_nats(self.url.split(","), Chance(), "drsm", nats_options(os.environ))
        try:
            await transport.connect(self.timeout)
            yield transport
        except NotConnected as error:
            raise AgentUnavailable(str(error)) from None
        finally:
            await transport.close()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator["Questions"]:
        """Questions to the agent of this domain. Raises AgentUnavailable, BadRequest."""
        subjects = self.subjects
        async with self.connected() as transport:
            yield Questions(Rpc(transport, boottime, Chance()), subjects, self.timeout)


@dataclass(frozen=True, slots=True)
class Questions:
    """Each raises AgentUnavailable at its deadline, BadRequest for an unknown pool or a bad argument."""

    rpc: Rpc
    subjects: Subjects
    timeout: float

    async def pools(self) -> m.Pools:
        return await self._ask(self.subjects.pools, m.Empty(), m.Pools)

    async def pool_names(self, pool: str | None) -> list[str]:
        """The one pool that was asked for, or all there are."""
        if pool is not None:
            return [pool]
        return [state.definition.name for state in (await self.pools()).pools]

    async def pods(self, pool: str | None) -> dict[str, m.Pods]:
        return {
            name: await self._ask(self._about(name, "pods"), m.Empty(), m.Pods)
            for name in await self.pool_names(pool)
        }

    async def owner(self, pool: str, id_: int | str, space: str | None) -> tuple[m.OwnerAnswer, bool]:
        """Whose it is, and whether it is an id that the pool issues at all."""
        answer = await self._ask(self._about(pool, "owner"), m.OwnerQuery(id_, space), m.OwnerAnswer)
        definitions = {state.definition.name: state.definition for state in (await self.pools()).pools}
        return answer, answer.chunk is not None and _issuable(definitions[pool], id_, space)

    async def snapshots(self, pool: str | None) -> dict[str, Snapshot]:
        return {name: await self._snapshot(name) for name in await self.pool_names(pool)}

    async def _ask(self, subject: str, request: Any, kind: type[M]) -> M:
        try:
            return (await self.rpc.call(subject, request, kind, self.timeout)).body
        except Refused as refused:
            raise refused.error from None

    async def _snapshot(self, pool: str) -> Snapshot:
        self._about(pool, "snapshot")
        deadline = boottime() + self.timeout
        backoff = Backoff(self.rpc.chance, RETRY_FIRST, RETRY_MOST)
        while True:
            try:
                left = deadline - boottime()
                return await fetch.snapshot(self.rpc, self.subjects, pool, min(left, SNAPSHOT_TIMEOUT))
            except AgentUnavailable:
                delay = backoff.delay()
                if boottime() + delay >= deadline:
                    raise
                await asyncio.sleep(delay)

    def _about(self, pool: str, verb: str) -> str:
        return self.subjects.pool(naming.pool_name(pool), verb)


def _issuable(definition: Definition, id_: int | str, space: str | None) -> bool:
    """Whether an id that the agent has understood may be issued at all."""
    part = definition.parts[definition.index(space)]
    ordinal = part.ordinal(id_)
    return ordinal is not None and not part.never_issued(ordinal)


def nats_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """Credentials and TLS, by the same variables as the agent's. Raises BadRequest for unreadable files."""
    names = {
        "user_credentials": "DRSM_NATS_CREDENTIALS",
        "user": "DRSM_NATS_USER",
        "password": "DRSM_NATS_PASSWORD",
        "token": "DRSM_NATS_TOKEN",
        "nkeys_seed": "DRSM_NATS_NKEY",
        "inbox_prefix": "DRSM_NATS_INBOX_PREFIX",
    }
    options: dict[str, Any] = {option: environ[name] for option, name in names.items() if environ.get(name)}
    authority, certificate = environ.get("DRSM_NATS_TLS_CA"), environ.get("DRSM_NATS_TLS_CERTIFICATE")
    password = environ.get("DRSM_NATS_TLS_KEY_PASSWORD", "")
    first = environ.get("DRSM_NATS_TLS_HANDSHAKE_FIRST", "").lower() in {"1", "true", "yes", "on"}
    try:
        if authority or certificate or first:
            options["tls"] = ssl.create_default_context(cafile=authority or None)
        if certificate:
            options["tls"].load_cert_chain(
                certificate, environ.get("DRSM_NATS_TLS_KEY"), password=lambda: password
            )
    except OSError as error:
        raise BadRequest(f"DRSM_NATS_TLS_*: cannot load the certificates: {error}") from None
    if first:
        options["tls_handshake_first"] = True
    if seconds := environ.get("DRSM_NATS_CONNECT_TIMEOUT"):
        try:
            options["connect_timeout"] = float(seconds)
        except ValueError:
            raise BadRequest(
                f"DRSM_NATS_CONNECT_TIMEOUT: expected a number of seconds, found {seconds[:24]!r}"
            ) from None
    return options
