"""A domain in memory, for the tests of applications: see the package."""

import asyncio
from types import TracebackType
from typing import Any, Literal, Self

from drsm_sdk.ambient import Chance
from drsm_sdk.client import Drsm
from drsm_sdk.demux import Demux
from drsm_sdk.pods import Owner, Pod
from drsm_sdk.tasks import Tasks
from drsm_sdk.testing.agent import Agent, Timing
from drsm_sdk.testing.bus import Bus, MemoryTransport, Reply
from drsm_sdk.testing.tables import Session
from drsm_sdk.transport import Message
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import PREFIX_DEFAULT, Subjects

SYNC_INTERVAL = 2.0  # seconds between two syncs, as the agent's
Reason = Literal["expired", "superseded", "closed"]

LOOKS_PER_LEASE = 4  # how often in one liveness lease the agent looks for silent sessions


class Domain:
    """Pools, an agent and the bus between, in this process and event loop. Use `async with`.

    pools       their names, or definitions where the defaults (24 bits, chunks of 1000 ids) do not fit
    hold        seconds for which nothing is issued from a chunk claimed after a death. Here 0, so that
                tests are quick; the real default is `A + W`, 310 s
    liveness    seconds of silence after which a pod is declared dead; the real default is 3 s
    allocation  seconds that a pod cut off goes on issuing from stock
    renew       seconds between two renewals of a pod; the real least is 0.5 s
    prefix      subject prefix, for code that connects with another than the default

    Raises ValueError for arguments that cannot be; leaving raises RuntimeError if the stand-in itself broke.
    """

    def __init__(
        self,
        *pools: str | Definition,
        hold: float = 0.0,
        liveness: float = 1.0,
        allocation: float = 300.0,
        renew: float = 0.1,
        prefix: str = PREFIX_DEFAULT,
    ) -> None:
        definitions = [Definition(name=pool) if isinstance(pool, str) else pool for pool in pools]
        names = [definition.name for definition in definitions]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"pools: expected one or more, each name once, found {names}")
        if hold < 0:
            raise ValueError(f"hold: expected 0 s or more, found {hold} s")
        if not 0 < renew < liveness < allocation:
            raise ValueError(
                "expected 0 < renew < liveness < allocation (seconds), "
                f"found renew {renew}, liveness {liveness}, allocation {allocation}"
            )
        self.prefix = prefix
        self._subjects = Subjects(prefix)
        self._definitions = definitions
        self._timing = Timing(hold, liveness, allocation, renew)
        self._bus = Bus()
        self._requests: asyncio.Queue[tuple[str, bytes, Reply]] = asyncio.Queue()
        self._tasks = Tasks(self._bus.serve_no_more)
        self._running: asyncio.Task[Any] | None = None
        self._led: Agent | None = None

    async def __aenter__(self) -> Self:
        if self._led is not None:
            raise RuntimeError("this domain was entered before: make a new one")
        clock = asyncio.get_running_loop().time
        self._led = Agent(
            self._subjects,
            self._definitions,
            self._bus.publish,
            timing=self._timing,
            clock=clock,
            chance=Chance(),
        )
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        await self._tasks.stop()
        for connection in list(self._bus.connections):
            await connection.close()
        if error is None and self._tasks.failure is not None:
            raise RuntimeError("the stand-in broke; this is no fault of the test") from self._tasks.failure

    # --- who takes part -------------------------------------------------------------------------

    def drsm(self, pod: Pod, **options: Any) -> Drsm:
        """A pod of this domain, to be entered; `options` as of `Drsm.connect`."""
        transport = self.transport(pod.name)
        return Drsm.connect("memory", pod, prefix=self.prefix, transport=transport, **options)

    def demux(self, pool: str, **options: Any) -> Demux:
        """A demux of this domain, to be entered; `options` as of `Demux.connect`."""
        return Demux.connect("memory", pool, prefix=self.prefix, transport=self.transport(), **options)

    def transport(self, name: str = "") -> MemoryTransport:
        """A connection for code that calls `Drsm.connect` or `Demux.connect` itself: one for each call, as
        its `transport`. `name` is the pod that will use it, for `kill`, `cut` and `mend`."""
        _ = self._agent  # a domain that was not entered has nobody who answers
        return MemoryTransport(self._bus, name)

    def owners(self, pool: str) -> dict[int, Owner]:
        """Chunk number -> owner, as it is, whatever anybody has heard of it. Raises LookupError."""
        table = self._agent.tables.get(pool)
        if table is None:
            raise LookupError(f"expected one of the pools {list(self._agent.tables)}, found {pool!r}")
        return {
            n: Owner.of(row.owner, "live" if row.owner in table.live else "down")
            for n, row in sorted(table.rows.items())
        }

    # --- what may happen to them ----------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Pod `name` dies as by SIGKILL: its connection breaks, its session expires at once (instead of
        after `liveness`; while stopped, after that) and its chunks are claimed.

        Its `Drsm` is still there and, like a pod that is cut off, would go on issuing from stock: do not use
        it any more, only leave it. Raises LookupError when no such pod lives.
        """
        self._living(name)
        for connection in self._connections(name):
            connection.kill()
        if self._running is not None:
            self.lose(name, "expired")

    def lose(self, name: str, reason: Reason = "expired") -> None:
        """The agent's verdict on a living pod `name`: its session is over. It opens a new one by itself.

        Raises LookupError when no such pod lives, RuntimeError while there is no agent.
        """
        if self._running is None:
            raise RuntimeError("expected a running agent, found it stopped; call start() first")
        for session in self._living(name):
            self._agent.end(session, reason)
        self._agent.settle()

    def cut(self, name: str) -> None:
        """Pod `name` loses its connection; silent for `liveness`, it is declared dead. Raises LookupError."""
        self._living(name)
        for connection in self._connections(name):
            connection.cut()

    def mend(self, name: str) -> None:
        """Pod `name` gets a connection again. Raises LookupError when it never had one."""
        for connection in self._connections(name):
            connection.mend()

    def stop(self) -> None:
        """No agent any more: requests have no responders, pods go on from stock. Until `start`."""
        self._bus.serve_no_more()
        if self._running is not None:
            self._running.cancel()
            self._running = None
        while not self._requests.empty():
            self._requests.get_nowait()

    def start(self) -> None:
        """An agent leads again, of a higher term; every pod gets a full `liveness` to be heard. Does nothing
        if one does."""
        if self._running is not None:
            return
        self._agent.lead()
        self._bus.serve(self._subjects.all_requests, self._receive)
        self._running = self._tasks.start(self._run(), "stand-in")

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _agent(self) -> Agent:
        if self._led is None:
            raise RuntimeError("expected a domain that was entered; use `async with Domain(...) as domain`")
        return self._led

    async def _run(self) -> None:
        """The agent: answers one request after the other, and looks for silent sessions in between."""
        clock = asyncio.get_running_loop().time
        look = self._timing.liveness / LOOKS_PER_LEASE
        sync_at = clock()
        while True:
            wake_at = min(sync_at, clock() + look)
            try:
                async with asyncio.timeout_at(wake_at):
                    request = await self._requests.get()
            except TimeoutError:
                request = None
            if clock() - wake_at > look:  # the test blocked the event loop: nobody could renew
                self._agent.spare()
            if request is not None:
                self._answer(*request)
            self._agent.settle()
            if clock() >= sync_at:
                self._agent.confirm()
                sync_at = clock() + SYNC_INTERVAL

    def _receive(self, subject: str, data: bytes, reply: Reply) -> None:
        self._requests.put_nowait((subject, data, reply))

    def _answer(self, subject: str, data: bytes, reply: Reply) -> None:
        for answer, headers in self._agent.serve(subject, data):
            reply(Message(subject, answer, headers))

    def _living(self, name: str) -> list[Session]:
        living = self._agent.alive(name)
        if not living:
            names = sorted({session.owner.name for session in self._agent.alive()})
            raise LookupError(f"expected the name of a living pod (one of {names}), found {name!r}")
        return living

    def _connections(self, name: str) -> list[MemoryTransport]:
        found = [connection for connection in self._bus.connections if connection.name == name]
        if not found:
            raise LookupError(
                f"expected a connection of pod {name!r}, found none; "
                f"make it with drsm() or with transport({name!r})"
            )
        return found
