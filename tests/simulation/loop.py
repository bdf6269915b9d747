"""Virtual time: an event loop that jumps to whatever happens next, and nodes that can be frozen or killed.

A node is a process of the simulated world. Every callback and every timer belongs to the node in whose
context it was made, so a frozen node (SIGSTOP) does nothing until it is thawed, and a killed one (SIGKILL)
does nothing ever again, in the middle of whatever it was about to do.
"""

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

_NODE: "ContextVar[Node | None]" = ContextVar("node", default=None)


class Stuck(Exception):
    """Nothing is left to happen, but somebody still waits."""


class Spinning(Exception):
    """Somebody does things without end at one moment: a busy loop."""


STEPS_AT_ONCE_MAX = 50_000


class Node:
    """One process. `start` runs something in it."""

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.name = name
        self.dead = self.over = False
        self._freezes = 0
        self._roots: list[asyncio.Task[Any]] = []
        self._loop = loop
        self._held: list[asyncio.Handle] = []
        self._context = copy_context()
        self._context.run(_NODE.set, self)

    @property
    def context(self) -> Context:
        return self._context.copy()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work, context=self.context)
        self._roots = [root for root in self._roots if not root.done()] + [task]
        return task

    def now(self) -> float:
        """The one time of the whole world, which no process of it can know."""
        return self._loop.time()

    def later(self, delay: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call something in this node after `delay` seconds; never if it is dead by then."""
        self._loop.call_later(delay, call, *arguments, context=self.context)

    def soon(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call something in this node at once; never if it is dead by then."""
        self._loop.call_soon(call, *arguments, context=self.context)

    @property
    def stopped(self) -> bool:
        return self._freezes > 0 or self.dead

    def freeze(self) -> None:
        """SIGSTOP. As often thawed as frozen, it goes on."""
        self._freezes += 1

    def thaw(self) -> None:
        """SIGCONT."""
        self._freezes -= 1
        self._go_on()

    def _go_on(self) -> None:
        if not self.stopped:
            held, self._held = self._held, []
            self._loop.put(held)

    def kill(self) -> None:
        """SIGKILL. The tasks stay, so that nothing of them runs, not even a `finally`, until `bury`."""
        self.dead = True

    def hold(self, handle: asyncio.Handle) -> None:
        self._held.append(handle)

    async def bury(self) -> None:
        """At the very end: let go of the tasks of a dead node. Nobody hears what they do any more."""
        self.dead, self._freezes, self.over = False, 0, True
        for task in self._roots:
            task.cancel()
        self._go_on()
        while tasks := self._tasks():
            await asyncio.wait(tasks)

    def _tasks(self) -> "list[asyncio.Task[Any]]":
        """All that are not done, in the order in which they were made."""
        mine = [
            task for task in asyncio.all_tasks(self._loop) if isinstance(task, _Task) and task.node is self
        ]
        return sorted(mine, key=hash)


class _Numbered:
    """Objects whose place in a set depends on when they were made, not on where they lie in memory."""

    _number: int

    def __hash__(self) -> int:
        return self._number


class _Task(_Numbered, asyncio.Task):  # type: ignore[type-arg]
    node: Node | None


class _Future(_Numbered, asyncio.Future):  # type: ignore[type-arg]
    pass


class _Handle(asyncio.TimerHandle):
    """A callback or a timer. Made and cancelled without the base classes' looks at debug mode, which cost a
    tenth of a run."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        call: Callable[..., object],
        arguments: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._when, self._callback, self._args, self._loop = when, call, arguments, loop
        self._context = copy_context() if context is None else context
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None  # type: ignore[assignment]


class VirtualLoop(asyncio.BaseEventLoop):
    """Takes no time of its own: when nothing is ready, it is at once as late as the next timer says."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._numbers = 0
        self._timers: list[tuple[float, int, _Handle]] = []
        """A heap: the earliest first, of those of one moment the one made first."""
        self.set_task_factory(self._make_task)
        self.steps = 0
        self._steps_before = 0

    def time(self) -> float:
        return self._now

    def create_future(self) -> "asyncio.Future[Any]":
        future = _Future(loop=self)
        future._number = self._next()
        return future

    def call_soon(  # type: ignore[override]
        self, call: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> _Handle:
        handle = _Handle(self._now, call, arguments, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, call: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> _Handle:
        return self.call_at(self._now + delay, call, *arguments, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, call: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> _Handle:
        timer = _Handle(when, call, arguments, self, context)
        heapq.heappush(self._timers, (when, self._next(), timer))
        return timer

    def put(self, handles: list[asyncio.Handle]) -> None:
        """Back into the queue of what is ready."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def stop_within(self, node: Node, seconds: float) -> None:
        """SIGSTOP in the middle of what the node does just now, for `seconds`: everybody else goes on, and
        then this returns."""
        node.freeze()
        until = self._now + seconds
        task = asyncio.current_task(self)
        if task is not None:
            asyncio.tasks._leave_task(self, task)
        try:
            while self._now < until and not self._stopping:  # type: ignore[attr-defined]
                self._run_once(until)
        finally:
            if task is not None:
                asyncio.tasks._enter_task(self, task)
            node.thaw()

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        work: "Coroutine[Any, Any, T] | Generator[Any, None, T]",
        **options: Any,
    ) -> "asyncio.Future[T]":
        task = _Task.__new__(_Task)
        context = options.get("context")
        task._number, task.node = self._next(), context.get(_NODE) if context is not None else _NODE.get()
        task.__init__(work, loop=loop, **options)  # type: ignore[misc]
        return task

    def _run_once(self, until: float = float("inf")) -> None:
        """All that happens at the next moment, at most until a time."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        if not ready:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Stuck(f"nothing is left to happen at {self._now:.3f} s")
            self._advance(min(timers[0][0], until))
            while timers and timers[0][0] <= self._now:
                ready.append(heapq.heappop(timers)[2])
        self._run_ready()

    def _run_ready(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        while ready and not self._stopping:  # type: ignore[attr-defined]
            handle = ready.popleft()
            if handle._cancelled:
                continue
            node = handle._context.get(_NODE)
            if node is None or not node.stopped:
                self.steps += 1
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"error in {handle}", "exception": error})
                if self.steps - self._steps_before > STEPS_AT_ONCE_MAX:
                    raise Spinning(f"{self.steps - self._steps_before} steps at {self._now:.3f} s: {handle}")
            else:
                node.hold(handle)

    def _advance(self, to: float) -> None:
        if to > self._now:
            self._now, self._steps_before = to, self.steps

    def _process_events(self, event_list: Any) -> None:
        """There is no selector."""

    def _write_to_self(self) -> None:
        """Nor another thread."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run until `work` is done; returns its result."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        asyncio.set_event_loop(None)
