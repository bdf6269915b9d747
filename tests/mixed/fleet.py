"""A fleet of both kinds on one collection, and what its tests look at.

Whatever a fleet has started ends with it, the last one first; so an agent that is started first outlives
its pods.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from structlog.testing import capture_logs

from drsm_agent.demo.contexts import Contexts
from drsm_agent.demo.process import PodProcess
from drsm_agent.embedded.scratch import Scratch
from drsm_agent.embedded.undertaker import MARK
from drsm_agent.service import Agent
from drsm_sdk import Demux, Drsm, Owner, Pod, Pool, PoolEmpty
from drsm_sdk.changes import Change
from drsm_sdk.wire import messages as m
from tests.harness import POOL, SEEN_SECONDS, Domain, Requester, eventually, mongo_client, requester
from tests.mixed.ledger import Ledger
from tests.mixed.original import GoPod, OriginalFailed
from tests.mixed.record import Record, recording

T = TypeVar("T")
GO_SILENCE = 25.0
"""Without a keepalive for so long a Go pod is down in the agents' eyes (`keepalives.GO_SILENCE`)."""
GO_SEEN_SECONDS = 60.0
"""How long a test waits for what comes of a Go pod's silence; a bound against hanging, as `SEEN_SECONDS`."""
TEST_SECONDS = 300
"""Of a whole test, which waits for silences; and for the program, where it is the first that needs it."""
QUICK: dict[str, Any] = {"allocation_ttl": 3.5, "pools": [{"name": POOL, "usage_lag_ms": 0}]}
"""Leases for tests in which they run out: `A + W` is 3.5 s, and mirrors expire 7 to 10.5 s ahead."""
PATIENT: dict[str, Any] = {"pools": [{"name": POOL, "usage_lag_ms": 0}]}
"""Leases of an ordinary domain, `A` 300 s; only that what was issued can be scanned at once (`W`)."""


class SdkPod:
    """An SDK pod in this process. Its application finds ids in use where all others do: in the ledger."""

    def __init__(self, drsm: Drsm, pool: Pool, ledger: Ledger, life: AsyncExitStack) -> None:
        self.drsm, self.pool = drsm, pool
        self.heard: list[Change] = []
        self._ledger, self._life = ledger, life
        self._issuing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.drsm.pod.name

    async def allocate(self, count: int = 1) -> list[int]:
        ids = []
        for _ in range(count):
            ids.append(int(await self.pool.allocate(timeout=SEEN_SECONDS)))
            self._ledger.issue(ids[-1:], self.name)
        return ids

    def release(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self.pool.release(id_)
            self._ledger.release([id_])

    def run(self, rate: int) -> None:
        """Allocate so many ids a second, as far as there are any, until `rest`."""
        self._issuing = asyncio.create_task(self._issue(rate), name=f"issue {self.name}")

    async def rest(self) -> None:
        if self._issuing is not None:
            self._issuing.cancel()
            await asyncio.wait([self._issuing])
            if not self._issuing.cancelled():
                self._issuing.result()

    def of(self, *kinds: type[Change]) -> list[Change]:
        """What it heard of its chunks."""
        return [change for change in self.heard if isinstance(change, kinds)]

    async def leave(self) -> None:
        """Leave in good order."""
        await self._life.aclose()

    async def listen(self) -> None:
        async for change in self.pool.changes():
            self.heard.append(change)

    async def _issue(self, rate: int) -> None:
        while True:
            with suppress(PoolEmpty):  # the next round may find some
                for _ in range(max(1, rate // 50)):
                    self._ledger.issue([int(self.pool.allocate_nowait())], self.name)
            await asyncio.sleep(0.02)


class Fleet:
    """Agents, Go pods, SDK pods, and who looks at them. Made by the fixture `fleet`."""

    def __init__(
        self,
        domain: Domain,
        *,
        scratch: Scratch,
        program: Path,
        folder: Path,
        logs: list[Any],
        mongo: AsyncMongoClient[dict[str, Any]],
        life: AsyncExitStack,
    ) -> None:
        self.domain, self.ledger, self.logs = domain, Ledger(), logs
        self._scratch, self._program, self._folder = scratch, program, folder
        self._mongo, self._life = mongo, life
        self._go_pods: list[GoPod] = []
        self._addresses = count(1)

    # --- Who takes part ------------------------------------------------------------------------------------

    async def agent(self, **settings: Any) -> Agent:
        """An agent that leads and serves."""
        return await self._life.enter_async_context(self.domain.agent(**settings))

    async def stop(self, agent: Agent) -> None:
        """Stop an agent before its fleet ends."""
        assert agent.task is not None
        agent.task.cancel()
        await asyncio.wait([agent.task])

    async def go(
        self,
        name: str,
        *,
        ip: str = "",
        instance: str | None = None,
        callback: Literal["none", "free", "used"] = "free",
        **options: object,
    ) -> GoPod:
        """A Go pod that is connected; what else there is: `gopod/main.go`."""
        pod = await GoPod.start(
            self._program,
            name,
            ip=ip or self._address(),
            instance=f"nf-{name}" if instance is None else instance,
            log=self._folder / f"{name}.log",
            ledger=self.ledger,
            environment={MARK: str(self._scratch.path)},
            options={"url": self.domain.mongo_url, "db": self.domain.database, "callback": callback}
            | options,
        )
        self._go_pods.append(pod)
        self._life.push_async_callback(pod.stop)
        return pod

    async def sdk(self, name: str, *, ip: str = "", instance: str | None = None, pool: str = POOL) -> SdkPod:
        """An SDK pod that has joined."""
        pod = Pod(name, ip or self._address(), f"nf-{name}" if instance is None else instance)
        life = await self._life.enter_async_context(AsyncExitStack())
        connecting = Drsm.connect(
            self.domain.nats_url, pod, prefix=self.domain.prefix, timeout=GO_SEEN_SECONDS
        )
        drsm = await life.enter_async_context(connecting)
        joined = SdkPod(drsm, await drsm.join(pool, in_use=self.ledger.in_use), self.ledger, life)
        listening = asyncio.create_task(joined.listen(), name=f"listen {name}")
        life.callback(listening.cancel)
        life.push_async_callback(joined.rest)
        return joined

    async def process(self, name: str) -> "Killable":
        """An SDK pod in a process of its own, to be killed."""
        contexts = self._folder / "contexts.sqlite"
        process = await PodProcess.start(
            name,
            nats=self.domain.nats_url,
            pool=POOL,
            contexts=contexts,
            log=self._folder / f"{name}.log",
            prefix=self.domain.prefix,
        )
        self._life.push_async_callback(process.stop)
        await process.heard("joined", timeout=GO_SEEN_SECONDS)
        return Killable(process, Contexts(contexts), self.ledger)

    # --- Who looks -----------------------------------------------------------------------------------------

    async def demux(self) -> Demux:
        connecting = Demux.connect(
            self.domain.nats_url, POOL, prefix=self.domain.prefix, timeout=SEEN_SECONDS
        )
        return await self._life.enter_async_context(connecting)

    async def known_to(self, go: GoPod, ids: list[int], names: set[str]) -> None:
        """Wait until a Go pod takes pods of these names for the owners, of some after its next poll."""

        async def known() -> set[str]:
            return {owner.name if owner else "nobody" for owner in await go.owners(ids)}

        await looked_at(f"owners known to {go.name}", known, lambda known: known == names)

    async def requester(self) -> Requester:
        return await self._life.enter_async_context(requester(self.domain.nats_url, self.domain.prefix))

    async def record(self) -> Record:
        return await self._life.enter_async_context(recording(self.domain))

    async def told(self, event: str, seconds: float = SEEN_SECONDS, **fields: Any) -> dict[str, Any]:
        """The first line of a log about this, with these fields."""
        await expect(f"a line {event} in the log", lambda: self.lines(event, **fields), seconds)
        return self.lines(event, **fields)[0]

    def lines(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        return [line for line in self.logs if line["event"] == event and fields.items() <= line.items()]

    # --- What MongoDB has -----------------------------------------------------------------------------------

    @property
    def collection(self) -> AsyncCollection[dict[str, Any]]:
        return self._mongo[self.domain.database][POOL]

    async def owners(self) -> dict[int, str]:
        """Whose which chunk is."""
        found = self.collection.find({"type": "chunk"})
        return {int(doc["_id"].removeprefix("chunkid-")): doc["podId"] async for doc in found}

    async def chunks_of(self, name: str) -> set[int]:
        return {n for n, owner in (await self.owners()).items() if owner == name}

    async def keepalive(self, name: str) -> dict[str, Any]:
        """A pod's keepalive; empty when it has none."""
        return await self.collection.find_one({"_id": name, "type": "keepalive"}) or {}

    async def change(self, key: str, **fields: Any) -> None:
        """Set fields of a document behind everybody's back."""
        changed = await self.collection.update_one({"_id": key}, {"$set": fields})
        assert changed.matched_count == 1

    async def delete(self, key: str) -> None:
        """Delete a document behind everybody's back, as the TTL monitor or an operator does."""
        deleted = await self.collection.delete_one({"_id": key})
        assert deleted.deleted_count == 1

    async def until(
        self, what: str, holds: Callable[[dict[int, str]], object], seconds: float = SEEN_SECONDS
    ) -> dict[int, str]:
        """Wait until the owners of all chunks are such."""
        return await looked_at(what, self.owners, holds, seconds)

    async def mirrored(self, pod: SdkPod) -> None:
        """Wait until an SDK pod has its mirror."""
        await looked_at(
            f"a mirror of {pod.name}",
            partial(self.keepalive, pod.name),
            lambda keepalive: keepalive.get("drsm", {}).get("incarnation") == pod.drsm.incarnation,
        )

    async def renewed(self, go: GoPod) -> None:
        """Wait until a Go pod's own keepalive is there."""
        await looked_at(
            f"a keepalive of {go.name}",
            partial(self.keepalive, go.name),
            lambda seen: (seen.get("podInstance"), seen.get("podIp")) == (go.instance, go.ip),
        )

    async def agrees(self, demux: Demux) -> None:
        """Wait until a demux knows each chunk's owner as MongoDB has it."""
        await self.until(
            "a demux that routes as MongoDB says",
            lambda owners: demux.synced and {n: owner.name for n, owner in demux.chunks().items()} == owners,
        )

    # --- At the end -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """No id was issued twice at a time, and no Go pod ended by itself."""
        if self.ledger.doubles:
            shown = "\n".join(self.ledger.doubles[:10])
            raise AssertionError(
                f"{len(self.ledger.doubles)} ids were issued twice, the first of them:\n{shown}"
            )
        if crashes := [pod.crashed for pod in self._go_pods if pod.crashed]:
            raise OriginalFailed("\n".join(crashes))

    def _address(self) -> str:
        return f"10.1.0.{next(self._addresses)}"


class Killable:
    """An SDK pod in a process of its own. What it has issued is in the ledger once it has said so."""

    def __init__(self, process: PodProcess, contexts: Contexts, ledger: Ledger) -> None:
        self._process, self._contexts, self._ledger = process, contexts, ledger

    @property
    def name(self) -> str:
        return self._process.name

    async def allocate(self, count: int) -> list[int]:
        known = set(self._ledger.of(self.name))
        await self._process.ask(f"allocate {count}", "allocated", timeout=GO_SEEN_SECONDS)
        ids = [id_ for id_ in self._contexts.of(self.name) if id_ not in known]
        self._ledger.issue(ids, self.name)
        return ids

    async def kill(self) -> None:
        self._process.kill()
        await self._process.stop()


@asynccontextmanager
async def fleet_of(domain: Domain, scratch: Scratch, program: Path, folder: Path) -> AsyncIterator[Fleet]:
    """A fleet, whose agents' logs are kept to be looked at; those of a test that fails are shown."""
    with capture_logs() as logs:
        try:
            async with AsyncExitStack() as life:
                mongo = await life.enter_async_context(mongo_client(domain))
                fleet = Fleet(
                    domain, scratch=scratch, program=program, folder=folder, logs=logs, mongo=mongo, life=life
                )
                yield fleet
                fleet.check()
        finally:
            for line in logs:
                print(line)  # noqa: T201


async def expect(what: str, holds: Callable[[], object], seconds: float = SEEN_SECONDS) -> None:
    """Wait until it holds."""
    try:
        await eventually(holds, seconds)
    except TimeoutError:
        raise AssertionError(f"expected within {seconds:g} s: {what}") from None


async def looked_at(
    what: str,
    look: Callable[[], Awaitable[T]],
    holds: Callable[[T], object],
    seconds: float = SEEN_SECONDS,
) -> T:
    """Wait until what one sees is such. A look is not cut off in its middle."""
    clock = asyncio.get_running_loop()
    until = clock.time() + seconds
    while not holds(found := await look()):
        assert clock.time() < until, f"expected within {seconds:g} s: {what}, found {str(found)[:300]}"
        await asyncio.sleep(0.1)
    return found


def owner_of(consumer: Demux | Pool, id_: int) -> Owner:
    """The owner, which there must be."""
    owner = consumer.owner(id_)
    assert owner is not None, f"nobody owns chunk {id_ >> 10}"
    return owner


async def answered(asking: Requester, id_: int) -> m.SnapshotOwner:
    """The owner, as the agent answers; which there must be."""
    subject = asking.subjects.pool(POOL, "owner")
    owner = (await asking.ask(subject, m.OwnerQuery(id_), m.OwnerAnswer)).owner
    assert owner is not None, f"nobody owns chunk {id_ >> 10}"
    return owner


def chunks(ids: Iterable[int]) -> set[int]:
    """The chunks of integers of 24 bits."""
    return {id_ >> 10 for id_ in ids}
