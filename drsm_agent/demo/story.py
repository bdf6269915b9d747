"""What the demonstration shows, step by step; it succeeds only if every step was seen to happen.

Pods join, allocate past 1000 ids, a demux follows; one pod is killed with SIGKILL, its chunks are
claimed and scanned; a restarted pod is a new incarnation. `A` is 10 s and `W` is 0 here, so that the
hold fits into a demonstration.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console

from drsm_agent import settings
from drsm_agent.demo.contexts import Contexts
from drsm_agent.demo.pod import BLOCK_BITS
from drsm_agent.demo.process import PodProcess, PodSaidNo
from drsm_agent.embedded import Stack
from drsm_agent.service import running
from drsm_sdk import Demux
from drsm_sdk.wire.messages import ChunkClaimed, ChunkScanned, PodDown

POOL = "amfid"
ALLOCATION_TTL = 10.0
PODS = ("amf-1", "amf-2", "amf-3")
FIRST_IDS, MANY_IDS = 300, 1100
STEP_SECONDS = 20.0


class NotSeen(Exception):
    """A step of the story did not happen."""


class Story:
    """The demonstration's cast: one demux, some pods, and what the application knows of its ids."""

    def __init__(self, console: Console, stack: Stack, demux: Demux, folder: Path) -> None:
        self._console, self._stack, self._demux, self._folder = console, stack, demux, folder
        self._contexts = Contexts(folder / "contexts.sqlite")
        self._events: list[tuple[float, object]] = []
        self._news = asyncio.Event()
        self._began = time.monotonic()
        self._pods: dict[str, PodProcess] = {}

    async def tell(self) -> None:
        """The whole story. Raises NotSeen, PodSaidNo."""
        async with self._watching():
            try:
                await self._join()
                await self._allocate()
                chunks = await self._kill(PODS[0])
                await self._scan(chunks)
                await self._restart(PODS[0])
            finally:
                for pod in self._pods.values():
                    await pod.stop()

    async def _join(self) -> None:
        self._say("[bold]Three pods join[/], each a process of its own")
        for name in PODS:
            await self._start(name)
        await self._until("the demux knows all pods", lambda: len(self._demux.pods()) == len(PODS))

    async def _allocate(self) -> None:
        self._say("[bold]They allocate ids[/], each from chunks of its own")
        for pod in self._pods.values():
            said = await pod.ask(f"allocate {FIRST_IDS}", "allocated")
            self._say(f"  {pod.name}: {said['count']} ids from {said['first']}, chunks {said['chunks']}")
        said = await self._pods[PODS[0]].ask(f"allocate {MANY_IDS}", "allocated")
        self._say(f"  {PODS[0]}: {said['count']} more, chunks {said['chunks']}")
        if len(said["chunks"]) < 2:
            raise NotSeen("more than 1000 ids of one pod should lie in more than one chunk")
        await self._until("the demux knows the owner of every id", self._all_routed)

    async def _kill(self, name: str) -> set[int]:
        """Kill a pod; returns the chunks that were claimed from it."""
        ids = self._contexts.of(name)
        used = {id_ >> BLOCK_BITS for id_ in ids}
        self._say(f"[bold red]SIGKILL {name}[/], with {len(ids)} ids in use in chunks {sorted(used)}")
        killed = self._now()
        self._pods.pop(name).kill()
        down = await self._until(f"{name} is down", lambda: self._first(PodDown, name))
        await self._until("every one of its ids has a living owner", lambda: self._moved(ids, name))
        claims = [(at, event) for at, event in self._events if isinstance(event, ChunkClaimed)]
        chunks = [n for _, event in claims for n in event.chunks]
        if len(chunks) != len(set(chunks)):
            raise NotSeen(f"each chunk should be claimed once, seen: {sorted(chunks)}")
        self._say(f"  death -> down [green]{down - killed:.2f} s[/]")
        self._say(f"  death -> last claim [green]{claims[-1][0] - killed:.2f} s[/]")
        for _, event in claims:
            self._say(f"  {event.owner.name} claimed {list(event.chunks)}, hold {event.hold_ms / 1000:g} s")
        return set(chunks)

    async def _scan(self, chunks: set[int]) -> None:
        self._say("[bold]The hold passes, then the new owners scan[/]: which ids are in use?")
        timeout = ALLOCATION_TTL + STEP_SECONDS
        await self._until("every claimed chunk is scanned", lambda: chunks <= self._scanned(), timeout)
        for pod in self._pods.values():
            for line in pod.said:
                if line["say"] == "scanned":
                    self._say(
                        f"  {pod.name}: chunk {line['chunk']}: {line['in_use']} in use, {line['freed']} free"
                    )
            await pod.ask(f"allocate {FIRST_IDS}", "allocated")
        self._say("  survivors go on allocating; no id was issued twice")

    async def _restart(self, name: str) -> None:
        self._say(f"[bold]{name} comes back[/] under its old name")
        began = self._now()
        said = await self._start(name)
        await self._pods[name].ask(f"allocate {FIRST_IDS}", "allocated")
        self._say(
            f"  incarnation {said['incarnation']}, ids from a fresh chunk after {self._now() - began:.2f} s"
        )
        old = self._first_of_down(name)
        if said["incarnation"] <= old:
            raise NotSeen(f"the new incarnation should be above {old}, it is {said['incarnation']}")
        await self._until("the demux knows the owner of every id", self._all_routed)

    # --- Watching -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        watcher = asyncio.create_task(self._watch(), name="watch events")
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _watch(self) -> None:
        async for event in self._demux.events():
            self._events.append((self._now(), event))
            self._news.set()

    async def _until(self, what: str, seen: Callable[[], object], timeout: float = STEP_SECONDS) -> float:
        """Wait until it is seen; returns when (or the time that `seen` gives). Raises NotSeen."""
        try:
            async with asyncio.timeout(timeout):
                while not (found := seen()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise NotSeen(f"{what}: not seen within {timeout:g} s") from None
        self._say(f"  [green]seen[/] {what}")
        return found if isinstance(found, float) else self._now()

    async def _start(self, name: str) -> dict[str, int]:
        pod = await PodProcess.start(
            name,
            nats=self._stack.nats_url,
            pool=POOL,
            contexts=self._folder / "contexts.sqlite",
            log=self._folder / f"{name}.log",
        )
        self._pods[name] = pod
        said = await pod.heard("joined")
        self._say(f"  {name} joined as incarnation {said['incarnation']}")
        return said

    def _all_routed(self) -> bool:
        """Whether the demux knows a living owner for every id, and that owner issued it or claimed it."""
        for pod in self._pods.values():
            for id_ in self._contexts.of(pod.name):
                owner = self._demux.owner(id_)
                if owner is None or owner.state != "live":
                    return False
        return True

    def _moved(self, ids: list[int], name: str) -> bool:
        owners = [self._demux.owner(id_) for id_ in ids]
        return all(owner and owner.state == "live" and owner.name != name for owner in owners)

    def _first(self, kind: type[PodDown], name: str) -> float | None:
        return next(
            (at for at, event in self._events if isinstance(event, kind) and event.pod.name == name), None
        )

    def _first_of_down(self, name: str) -> int:
        return next(
            event.pod.incarnation
            for _, event in self._events
            if isinstance(event, PodDown) and event.pod.name == name
        )

    def _scanned(self) -> set[int]:
        return {n for _, event in self._events if isinstance(event, ChunkScanned) for n in event.chunks}

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _say(self, line: str) -> None:
        self._console.print(f"[dim]{self._now():6.2f}[/] {line}", highlight=False)


async def demonstrate(console: Console) -> bool:
    """Tell the story on a stack of its own. True if everything was seen to happen."""
    console.print("Starting a MongoDB replica set, a nats-server and an agent ...")
    async with AsyncExitStack() as cleanup:
        stack = await cleanup.enter_async_context(Stack())
        configured = settings.load(
            nats_url=stack.nats_url,
            mongo_url=stack.mongo_url,
            pools=[{"name": POOL, "bits": 24, "usage_lag_ms": 0}],
            allocation_ttl=ALLOCATION_TTL,
            http_port=0,
        )
        await cleanup.enter_async_context(running(configured))
        demux = await cleanup.enter_async_context(Demux.connect(stack.nats_url, POOL, timeout=STEP_SECONDS))
        try:
            await Story(console, stack, demux, stack.scratch.path).tell()
        except (NotSeen, PodSaidNo) as error:
            console.print(f"[bold red]not seen[/]: {error}")
            return False
    console.print("[bold green]Everything was seen to happen.[/]")
    return True
