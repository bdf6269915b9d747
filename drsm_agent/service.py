"""The composition root: connects store and bus, runs one task group, starts and stops in order."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import structlog

from drsm_agent import http
from drsm_agent.bus.nats_bus import NatsBus
from drsm_agent.core.documents import Document
from drsm_agent.errors import AgentError, Misconfigured, PositionLost, StoreUnavailable
from drsm_agent.feed import STILL_ACTION, Feed
from drsm_agent.go_pods import NAMED_MAX, cannot_honour
from drsm_agent.leader import Leader
from drsm_agent.metrics import Metrics
from drsm_agent.parts import Parts
from drsm_agent.patience import Patience
from drsm_agent.ports import Bus, Chance, Clock, Store, WallClock, boottime
from drsm_agent.settings import Settings
from drsm_agent.store.mongo import MongoStore
from drsm_agent.store.stored import ensure_stored
from drsm_sdk.wire import codec
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects

CONNECT_TIMEOUT = 30.0
"""How long the agent waits for NATS at start before it ends, and Kubernetes starts it again."""
STALE_AFTER = 10.0
"""A change stream says something every second, were it only that nothing happened."""

LEADERLESS_TERMS = 3
"""A take-over takes one `T` and a little; after three nobody is able to lead."""

log = structlog.get_logger("drsm_agent.service")


class BusBroken(AgentError):
    """NATS closed the connection for good; a new process begins with new credentials."""


class Agent:
    """One running agent. Use `running`."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        bus: Bus,
        *,
        metrics: Metrics | None = None,
        clock: Clock = boottime,
        wall_clock: WallClock = time.time,
        chance: Chance | None = None,
    ) -> None:
        chance = chance or Chance()
        self.name = f"{settings.agent_id or socket.gethostname()}-{chance.token()[:6]}"
        self.metrics = metrics or Metrics()
        self._bus = bus
        self.feed = Feed(store, list(settings.definitions), clock, chance, self.metrics)
        self.leader = Leader(
            self.name,
            Parts(
                store=store,
                bus=bus,
                feed=self.feed,
                subjects=Subjects(settings.subject_prefix),
                leases=settings.leases,
                go=settings.beside_go,
                definitions=settings.definitions,
                clock=clock,
                wall_clock=wall_clock,
                chance=chance,
                metrics=self.metrics,
            ),
        )
        self._leader_ttl = settings.leases.leader
        self.http_port = 0
        self.task: asyncio.Task[None] | None = None
        self._reconnects = self._errors = 0  # as counted

    async def ended(self) -> None:
        """Returns when the agent has ended by itself, which it never should."""
        if self.task:
            await asyncio.wait([self.task])

    async def run(self) -> None:
        """Until cancelled. Whatever ends by itself ends the agent: no task dies silently."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.feed.run(), name="feed")
            tasks.create_task(self.leader.run(), name="leader")
            tasks.create_task(self._end_with_bus(), name="bus")

    def measure(self) -> None:
        """Bring up to date what nothing else counts."""
        self.metrics.stream_staleness.set(self.feed.staleness())
        self.metrics.position_standstill.set(self.feed.standstill())
        self.metrics.bus_reconnects.inc(self._bus.reconnects - self._reconnects)
        self.metrics.bus_errors.inc(self._bus.errors - self._errors)
        self._reconnects, self._errors = self._bus.reconnects, self._bus.errors

    def unready(self) -> list[str]:
        """What keeps this agent from being ready; empty when it is."""
        reasons = []
        if not self._bus.connected:
            reasons.append("NATS is not connected")
        if self.feed.current is None:
            reasons.append("the table is not read yet")
        elif (staleness := self.feed.staleness()) > STALE_AFTER:
            reasons.append(f"MongoDB's change stream has been silent for {staleness:.0f} s")
        elif self.feed.stands_still():
            standstill = f"stood still for {self.feed.standstill():.0f} s"
            reasons.append(f"the position of MongoDB's change stream {standstill}: {STILL_ACTION}")
        if (leaderless := self.leader.leaderless()) > LEADERLESS_TERMS * self._leader_ttl:
            reasons.append(f"nobody has led for {leaderless:.0f} s")
        if self._bus.forbidden:
            reasons.append(self._bus.forbidden)
        return reasons

    async def _end_with_bus(self) -> None:
        raise BusBroken(f"NATS closed the connection for good: {await self._bus.broken()}")


class Start:
    """What `/readyz` shows of an agent: what it waits for, and then itself."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.waits_for = "MongoDB has not answered yet"
        self.agent: Agent | None = None

    def unready(self) -> list[str]:
        return self.agent.unready() if self.agent else [self.waits_for]

    def measure(self) -> None:
        if self.agent:
            self.agent.measure()

    async def wait_for_mongodb(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Try until MongoDB is there, however long that takes: servers and agents start in any order. Raises
        Misconfigured, StoreBroken."""
        patience = Patience(boottime, Chance())
        while True:
            try:
                return await attempt()
            except (StoreUnavailable, PositionLost) as error:
                self.waits_for = f"MongoDB is not there yet: {error}"
                log.warning("waiting_for_mongodb", error=str(error))
                await patience.wait(error)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Agent]:
    """An agent that runs until the block is left; at first it waits for MongoDB. Raises Misconfigured at
    start, and at the end what ended the agent by itself; `agent.ended` tells at once."""
    async with AsyncExitStack() as stack:
        start, http_port = Start(), 0
        url = settings.mongo_url.get_secret_value()
        store = await stack.enter_async_context(MongoStore(url, settings.mongo_database, settings.databases))
        if settings.http_port:
            http_port = await stack.enter_async_context(
                http.serving(settings.http_host, settings.http_port, start)
            )
        await start.wait_for_mongodb(store.check)
        start.waits_for = "NATS is not connected"
        bus = await NatsBus.connect(
            settings.nats_url, name="drsm-agent", timeout=CONNECT_TIMEOUT, **nats_options(settings)
        )
        stack.push_async_callback(bus.close)
        await start.wait_for_mongodb(lambda: look_for_go(store, settings))
        # Last: nothing is stored by one that cannot run.
        await start.wait_for_mongodb(lambda: ensure_stored(store, stored_settings(settings)))
        start.agent = agent = Agent(settings, store, bus, metrics=start.metrics)
        agent.http_port = http_port
        agent.task = asyncio.create_task(agent.run(), name="agent")
        try:
            yield agent
        finally:
            agent.task.cancel()
            await asyncio.wait([agent.task])
        if not agent.task.cancelled():
            agent.task.result()


async def look_for_go(store: Store, settings: Settings) -> None:
    """Whether Go pods use the pools' collections, or others of the same names. Raises Misconfigured for a
    pool that they cannot share, StoreUnavailable."""
    empty = []
    for name, definition in settings.definitions.items():
        if not await store.has_chunks(name):
            empty.append(name)
        reasons, has_go = cannot_honour(definition), False
        with suppress(StoreUnavailable):  # a large collection takes longer; the leader looks at all of it
            has_go = bool(reasons) and await store.has_go(name)
        if has_go:
            raise Misconfigured(
                f"DRSM_POOLS: Go pods use the collection of pool {name}; expected what they keep to, found "
                f"that {', '.join(reasons)}. Configure what they use (docs/migration.md), or give the pool "
                "another name or database"
            )
    for name, databases in (await store.elsewhere(empty)).items() if empty else ():
        log.warning(
            "go_fleet_elsewhere",
            pool=name,
            database=settings.databases[name],
            found=databases[:NAMED_MAX],
            action="this agent's collection of the pool has no chunks, and others of its name have: if your "
            f"Go pods use them, set DRSM_MONGO_DATABASE={databases[0]}, or `database` of the pool",
        )


def stored_settings(settings: Settings) -> list[Document]:
    """What all agents of a domain must agree on, as it is stored."""
    leases = settings.leases
    durations = {
        "_id": "settings",
        "subject_prefix": settings.subject_prefix,
        "liveness_ms": round(leases.liveness * 1000),
        "allocation_ms": round(leases.allocation * 1000),
        "leader_ms": round(leases.leader * 1000),
        "pools": sorted(settings.definitions),
        "revision": settings.settings_revision,
    }
    pools = [
        {"_id": f"pool:{name}", "database": settings.databases[name]} | _stored(definition)
        for name, definition in settings.definitions.items()
    ]
    return [durations, *pools]


def _stored(definition: Definition) -> Document:
    """A definition as it is stored: BSON's integers are signed, and ids of 64 bits are not."""
    fields: Document = codec.json_safe(codec.to_map(definition))
    return fields


def nats_options(settings: Settings) -> dict[str, Any]:
    """Credentials and TLS for the NATS client."""
    credentials, nkey = settings.nats_credentials, settings.nats_nkey
    if credentials and not credentials.is_file():
        raise Misconfigured(f"DRSM_NATS_CREDENTIALS: expected a .creds file, found none at {credentials}")
    if nkey and not nkey.is_file():
        raise Misconfigured(f"DRSM_NATS_NKEY: expected a file with an NKey seed, found none at {nkey}")
    options: dict[str, Any] = {
        "user_credentials": str(credentials) if credentials else None,
        "nkeys_seed": str(nkey) if nkey else None,
        "connect_timeout": settings.nats_connect_timeout,
        "inbox_prefix": settings.nats_inbox_prefix,
        "user": settings.nats_user or None,
        "password": settings.nats_password.get_secret_value() or None,
        "token": settings.nats_token.get_secret_value() or None,
    }
    if settings.nats_tls_ca or settings.nats_tls_certificate:
        try:
            _tls(settings)
        except OSError as error:
            raise Misconfigured(f"DRSM_NATS_TLS_*: cannot load the certificates: {error}") from None
        options["tls"] = lambda: _tls(settings)
    if settings.nats_tls_handshake_first:
        options["tls_handshake_first"] = True
        options.setdefault("tls", ssl.create_default_context)
    return {name: value for name, value in options.items() if value is not None}


def _tls(settings: Settings) -> ssl.SSLContext:
    """As the files are now: certificates are renewed while the agent runs. Raises OSError."""
    context = ssl.create_default_context(cafile=settings.nats_tls_ca)
    if settings.nats_tls_certificate:
        password = settings.nats_tls_key_password.get_secret_value()
        context.load_cert_chain(
            settings.nats_tls_certificate,
            settings.nats_tls_key,
            password=lambda: password,  # or OpenSSL would ask the terminal
        )
    return context
