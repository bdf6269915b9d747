"""Asking the application which ids of a claimed chunk are in use.

Off the hot path: a plain function runs in a thread, few scans at a time, each with a time-out. Whatever
goes wrong counts as "all ids are in use", and the scan is tried again.
"""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from concurrent.futures import Future
from itertools import islice
from typing import Any

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import INTEGER, Item, Space

InUse = Callable[..., Iterable[Item] | AsyncIterable[Item] | Awaitable[Iterable[Item]]]
"""`(first, last)`: which ids from `first` to `last` (both included) are in use? Of a pool with several spaces
it is called for each: `(first, last, space)`. Plain or async. An async one shares the event loop: it must not
block it, and must end when it is cancelled."""

CONCURRENT = 4
TIMEOUT = 30.0
RETRY_FIRST, RETRY_MOST = 1.0, 60.0
SAID_MAX = 500
"""Characters of a failure's text that are logged and told."""


Asked = tuple[Any, ...]
"""What the function is called with."""


class ScanError(Exception):
    """What the application's function returned cannot be an answer, or it did not return in time."""


class Scanner:
    """Runs the application's function; at most four at a time, each for at most 30 s."""

    def __init__(self, in_use: InUse) -> None:
        self._in_use = in_use
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._closed = False
        self._threads: set[threading.Thread] = set()

    async def scan(self, definition: Definition, n: int, begun: Callable[[], object]) -> list[frozenset[int]]:
        """The ordinals in use of chunk `n`, of each space. Calls `begun` right before the function is first
        asked. Raises ScanError, and whatever Exception the function raises."""
        async with self._slots:
            begun()
            return [await self._of_space(part, n, definition) for part in definition.parts]

    async def _of_space(self, part: Space, n: int, definition: Definition) -> frozenset[int]:
        first, last = part.first_id(n), part.last_id(n)
        named = (part.name,) if definition.spaces else ()
        found = await self._in_time((part.item(first), part.item(last), *named), last - first + 1)
        return _checked(part, found, first, last)

    def close(self) -> None:
        """Start no further scan. A plain function that is running cannot be interrupted; its thread does
        not keep the process from ending."""
        self._closed = True

    def _in_thread(self, asked: Asked, most: int) -> Future[Any]:
        """A daemon thread of its own for each: one that hangs must not keep the application from ending."""
        if self._closed:
            raise ScanError("the pool was left")
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) >= CONCURRENT:
            raise ScanError(f"{CONCURRENT} earlier calls of in_use have not returned yet")
        answer: Future[Any] = Future()
        arguments = (answer, self._in_use, asked, most)
        thread = threading.Thread(target=_run, args=arguments, name="drsm-scan", daemon=True)
        self._threads.add(thread)
        thread.start()
        return answer

    async def _in_time(self, asked: Asked, most: int) -> list[Any]:
        """The function's answer. It may swallow a cancellation, and return what it had found until then: that
        is no answer. One that it made up itself must not end the scan unseen."""
        found: list[Any] = []
        error: BaseException | None = None
        limit = asyncio.timeout(TIMEOUT)
        try:
            async with limit:
                found = await self._ask(asked, most + 1)
        except (KeyboardInterrupt, SystemExit):
            raise  # of an async function: the event loop ends, as with any task
        except BaseException as raised:
            error = raised
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        if limit.expired():
            raise ScanError(f"{_call(asked)} did not return within {TIMEOUT:g} s") from error
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise _raised(asked, error) from error
        return found

    async def _ask(self, asked: Asked, most: int) -> list[Any]:
        if _is_async(self._in_use):
            result: Any = self._in_use(*asked)
        else:
            result = await asyncio.wrap_future(self._in_thread(asked, most))
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, AsyncIterable):
            found = []
            async for id_ in result:
                found.append(id_)
                if len(found) >= most:
                    break
            return found
        return _listed(result, most)


def _run(answer: Future[Any], in_use: InUse, asked: Asked, most: int) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(_called(in_use, asked, most))
    except BaseException as error:
        # what asyncio cannot carry, or what would end the application's event loop
        carried = isinstance(error, Exception) and not isinstance(error, StopIteration)
        answer.set_exception(error if carried else _raised(asked, error))


def _raised(asked: Asked, error: BaseException) -> ScanError:
    return ScanError(f"{_call(asked)} raised {said(error)}")


def _call(asked: Asked) -> str:
    return f"in_use({', '.join(map(str, asked))})"


def said(error: BaseException) -> str:
    """An error of the application's as text, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as broken:
        text = f"unreadable ({type(broken).__name__})"
    return f"{type(error).__name__}: {text}"[:SAID_MAX]


def _is_async(function: object) -> bool:
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _called(in_use: InUse, asked: Asked, most: int) -> Any:
    """In the thread: also the reading of a lazy result."""
    result = in_use(*asked)
    return (
        result if inspect.isawaitable(result) or isinstance(result, AsyncIterable) else _listed(result, most)
    )


def _listed(result: Any, most: int) -> list[Any]:
    """At most `most` items: a result without end must not fill the memory."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | bytearray | memoryview):
        raise ScanError(f"expected in_use to return an iterable of ids, found {type(result).__name__}")
    return list(islice(result, most))


def _checked(part: Space, found: list[Any], first: int, last: int) -> frozenset[int]:
    if len(found) > last - first + 1:
        asked = part.item(first), part.item(last)
        raise ScanError(f"expected at most {last - first + 1} ids from {asked[0]} to {asked[1]}, found more")
    return frozenset([_ordinal(part, id_, first, last) for id_ in found])


def _ordinal(part: Space, id_: Any, first: int, last: int) -> int:
    """Each before they are a set: there True and 1.0 are 1."""
    try:
        ordinal = part.ordinal(id_)
    except ValueError as error:
        expected = "expected ids as int" if part.kind == INTEGER else str(error).partition(",")[0]
        raise ScanError(f"{expected}, found {type(id_).__name__}") from None
    if ordinal is None or not first <= ordinal <= last:
        wide = type(id_) is int and id_.bit_length() > 64
        outside = f"one of {id_.bit_length()} bits" if wide else str(id_)[:SAID_MAX]
        raise ScanError(f"expected ids from {part.item(first)} to {part.item(last)}, found {outside}")
    return ordinal
