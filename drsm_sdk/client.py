"""A pod in its domain: connects, keeps one session open, joins pools."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

from drsm_sdk import naming
from drsm_sdk.ambient import Backoff, Chance, Clock, boottime
from drsm_sdk.errors import AgentUnavailable, BadRequest, SessionLost
from drsm_sdk.pods import Pod
from drsm_sdk.pool import Pool
from drsm_sdk.rpc import Rpc
from drsm_sdk.scan import InUse
from drsm_sdk.session import Session, State
from drsm_sdk.tasks import Tasks
from drsm_sdk.transport import NotConnected, Transport, on_nats
from drsm_sdk.wire.messages import POOLS_PER_SESSION_MAX
from drsm_sdk.wire.subjects import PREFIX_DEFAULT

OnSilence = Literal["continue", "stop"]

TIMEOUT = 5.0
JOIN_RETRY_FIRST, JOIN_RETRY_MOST = 0.2, 5.0


class Drsm:
    """This process as a pod. Use `async with Drsm.connect(...) as drsm`.

    Entering connects and opens a session; leaving stops issuing, closes the session and disconnects, also
    when NATS or the agent is gone. In between everything heals by itself: `state` tells how it stands.
    """

    def __init__(
        self,
        transport: Transport,
        pod: Pod,
        *,
        prefix: str = PREFIX_DEFAULT,
        timeout: float = TIMEOUT,
        on_silence: OnSilence = "continue",
        clock: Clock = boottime,
        chance: Chance | None = None,
    ) -> None:
        if on_silence not in {"continue", "stop"}:
            raise BadRequest(f"on_silence: expected 'continue' or 'stop', found {on_silence!r}")
        self.pod = pod
        self._transport, self._timeout, self._clock = transport, timeout, clock
        chance = chance or Chance()
        self._tasks = Tasks(self._failed)
        self._rpc = Rpc(transport, clock, chance)
        self._session = Session(
            self._rpc,
            naming.domain(prefix),
            pod,
            self._tasks,
            clock=clock,
            chance=chance,
            stop_when_suspect=on_silence == "stop",
        )
        self._chance = chance
        self._entered = False
        self._pools: dict[str, tuple[Pool, asyncio.Future[None]]] = {}

    @classmethod
    def connect(
        cls,
        url: str | Sequence[str],
        pod: Pod,
        *,
        prefix: str = PREFIX_DEFAULT,
        timeout: float = TIMEOUT,
        on_silence: OnSilence = "continue",
        transport: Transport | None = None,
        clock: Clock = boottime,
        chance: Chance | None = None,
        **options: Any,
    ) -> Self:
        """A pod that will connect when it is entered.

        url         one NATS URL or several of one cluster, `nats://` or `tls://`
        prefix      the domain's subject prefix
        timeout     seconds that entering, and each `join`, may take
        on_silence  whether to go on issuing from stock while the agent is silent (`continue`, up to the
                    allocation lease), or to stop when it might take this pod for dead (`stop`)
        options     for nats-py's `connect`: `user`, `password`, `user_credentials`, `tls`, ...

        `transport`, `clock` and `chance` replace NATS, the machine's clock and its randomness. Raises
        BadRequest for arguments that cannot be; entering raises AgentUnavailable or BadRequest.
        """
        chance = chance or Chance()
        transport = transport or on_nats(url, chance, f"drsm-{pod.name}", options)
        return cls(
            transport, pod, prefix=prefix, timeout=timeout, on_silence=on_silence, clock=clock, chance=chance
        )

    @property
    def state(self) -> State:
        """`live`; `suspect` when the agent has been silent for so long that it may take this pod for dead;
        `lapsed` when nothing may be issued until it answers; `lost` while there is no session."""
        return self._session.state

    @property
    def alarms(self) -> int:
        """How often this pod was declared dead while its lease still ran: above 0, clocks differ by more than
        the leases allow for (1 %), and the log says so."""
        return self._session.alarms

    @property
    def incarnation(self) -> int | None:
        """This life of the pod's name; None while there is no session."""
        return self._session.life.incarnation if self._session.life is not None else None

    async def __aenter__(self) -> Self:
        if self._tasks.stopped:
            raise BadRequest("this Drsm was left before: connect a new one")
        self._entered = True
        try:
            begun = self._clock()
            await self._transport.connect(self._timeout)
            async with asyncio.timeout(max(begun + self._timeout - self._clock(), 0)):
                self._tasks.start(self._session.run(), "session")
                await self._session.opened()
        except NotConnected as error:
            await self._close()
            raise AgentUnavailable(str(error)) from None
        except TimeoutError:
            reason = self._rpc.trouble or self._session.lost_reason
            await self._close()
            raise AgentUnavailable(f"no session within {self._timeout:g} s: {reason}") from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._session.close()
        finally:
            await self._close()
        if error is None and self._tasks.failure is not None:
            raise self._session.refusal()

    async def join(self, name: str, in_use: InUse | None = None, timeout: float | None = None) -> Pool:
        """Take part in pool `name`; returns when ids can be allocated, or the pool is known to be exhausted.

        `in_use(first, last)` tells which ids of a range are in use, for chunks claimed from dead pods; plain
        (then it runs in a thread) or async. Without it such chunks are owned and routed but never issued
        from. Joining again with the same function returns the same pool. `timeout` in seconds, by default
        that of `connect`. Raises BadRequest (also for an unknown pool, or a 65th) and AgentUnavailable; after
        the latter the pod goes on joining, as the agent may have heard it: call again to get the pool.
        """
        naming.pool_name(name)
        if not self._entered:
            raise BadRequest("expected a Drsm that was entered: async with Drsm.connect(...) as drsm")
        if self._tasks.stopped or self._session.closing:
            raise self._session.refusal()
        timeout = self._timeout if timeout is None else timeout
        pool, ready = self._joining(name, in_use)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(ready)
        except TimeoutError:
            reason = pool.trouble()
            raise AgentUnavailable(f"pool {name} was not ready within {timeout:g} s: {reason}") from None
        return pool

    # --- inside ---------------------------------------------------------------------------------

    def _joining(self, name: str, in_use: InUse | None) -> tuple[Pool, asyncio.Future[None]]:
        """The pool of this name, and when it is ready: one and the same for all who join it."""
        if name in self._pools:
            pool, ready = self._pools[name]
            if in_use != pool.in_use:  # a bound method is another object each time
                raise BadRequest(f"pool {name} was joined with another in_use; join once and keep the Pool")
            return pool, ready
        if len(self._pools) >= POOLS_PER_SESSION_MAX:
            raise BadRequest(
                f"expected at most {POOLS_PER_SESSION_MAX} pools of one pod, found {name} as one more; "
                "join fewer, or define one pool with several spaces"
            )
        pool, ready = Pool(name, self._session, self._rpc, in_use), asyncio.Future()
        self._pools[name] = pool, ready
        self._tasks.start(self._join(pool, ready), f"join-{name}")
        return pool, ready

    async def _join(self, pool: Pool, ready: asyncio.Future[None]) -> None:
        """Join until it is done or refused, whoever still waits for it: once the agent has heard of it, it
        counts on this pod and gives it chunks of others."""
        try:
            await pool.listen()
            await self._begin(pool)
            await pool.ready()
        except (BadRequest, SessionLost) as refused:
            self._pools.pop(pool.name, None)
            await pool.close()
            ready.set_exception(refused)
            ready.exception()  # perhaps nobody waits any more
        else:
            ready.set_result(None)
        finally:
            self._give_up(ready)

    async def _begin(self, pool: Pool) -> None:
        """Join under the present session; again when that one is lost meanwhile, or silent."""
        backoff = Backoff(self._chance, JOIN_RETRY_FIRST, JOIN_RETRY_MOST)
        while True:
            life = await self._session.opened()
            try:
                definition = await self._session.join(life, pool.name)
            except SessionLost:
                if self._tasks.failure is not None or self._session.closing:
                    raise
                await asyncio.sleep(backoff.delay())
            except AgentUnavailable:
                await asyncio.sleep(backoff.delay())
            else:
                self._session.members[pool.name] = pool
                pool.begin(life, definition)
                return

    def _give_up(self, ready: asyncio.Future[None]) -> None:
        """Whoever still waits to join is told why that will not be: this pod has left, or is broken."""
        if not ready.done():
            ready.set_exception(self._session.refusal())
            ready.exception()

    def _failed(self) -> None:
        self._session.fail()

    async def _close(self) -> None:
        await self._tasks.stop()
        for pool, ready in self._pools.values():
            self._give_up(ready)  # a task that was never begun has nothing to end it
            await pool.close()
        await self._transport.close()
