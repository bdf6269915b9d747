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

InUse = Callable[[int, int], Iterable[int] | AsyncIterable[int] | Awaitable[Iterable[int]]]
"""Which ids from `first` to `last` (both included) are in use? Plain or async. An async one shares the event
loop: it must not block it, and must end when it is cancelled."""

CONCURRENT = 4
TIMEOUT = 30.0
RETRY_FIRST, RETRY_MOST = 1.0, 60.0
SAID_MAX = 500
"""Characters of a failure's text that are logged and told."""


class ScanError(Exception):
    """What the application's function returned cannot be an answer, or it did not return in time."""


class Scanner:
    """Runs the application's function; at most four at a time, each for at most 30 s."""

    def __init__(self, in_use: InUse) -> None:
        self._in_use = in_use
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._closed = False
        self._threads: set[threading.Thread] = set()

    async def scan(self, first: int, last: int, begun: Callable[[], object]) -> frozenset[int]:
        """Ids in use. Calls `begun` right before the application's function is asked. Raises ScanError, and
        whatever Exception the function raises."""
        async with self._slots:
            begun()
            found = await self._in_time(first, last)
        return _checked(found, first, last)

    def close(self) -> None:
        """Start no further scan. A plain function that is running cannot be interrupted; its thread does
        not keep the process from ending."""
        self._closed = True

    def _in_thread(self, first: int, last: int, most: int) -> Future[Any]:
        """A daemon thread of its own for each: one that hangs must not keep the application from ending."""
        if self._closed:
            raise ScanError("the pool was left")
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) >= CONCURRENT:
            raise ScanError(f"{CONCURRENT} earlier calls of in_use have not returned yet")
        answer: Future[Any] = Future()
        arguments = (answer, self._in_use, first, last, most)
        thread = threading.Thread(target=_run, args=arguments, name="drsm-scan", daemon=True)
        self._threads.add(thread)
        thread.start()
        return answer

    async def _in_time(self, first: int, last: int) -> list[Any]:
        """The function's answer. It may swallow a cancellation, and return what it had found until then: that
        is no answer. One that it made up itself must not end the scan unseen."""
        found: list[Any] = []
        error: BaseException | None = None
        limit = asyncio.timeout(TIMEOUT)
        try:
            async with limit:
                found = await self._ask(first, last)
        except (KeyboardInterrupt, SystemExit):
            raise  # of an async function: the event loop ends, as with any task
        except BaseException as raised:
            error = raised
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        if limit.expired():
            raise ScanError(f"in_use({first}, {last}) did not return within {TIMEOUT:g} s") from error
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise _raised(first, last, error) from error
        return found

    async def _ask(self, first: int, last: int) -> list[Any]:
        most = last - first + 2
        if _is_async(self._in_use):
            result: Any = self._in_use(first, last)
        else:
            result = await asyncio.wrap_future(self._in_thread(first, last, most))
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


def _run(answer: Future[Any], in_use: InUse, first: int, last: int, most: int) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(_called(in_use, first, last, most))
    except BaseException as error:
        # what asyncio cannot carry, or what would end the application's event loop
        carried = isinstance(error, Exception) and not isinstance(error, StopIteration)
        answer.set_exception(error if carried else _raised(first, last, error))


def _raised(first: int, last: int, error: BaseException) -> ScanError:
    return ScanError(f"in_use({first}, {last}) raised {said(error)}")


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


def _called(in_use: InUse, first: int, last: int, most: int) -> Any:
    """In the thread: also the reading of a lazy result."""
    result = in_use(first, last)
    return (
        result if inspect.isawaitable(result) or isinstance(result, AsyncIterable) else _listed(result, most)
    )


def _listed(result: Any, most: int) -> list[Any]:
    """At most `most` items: a result without end must not fill the memory."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | bytearray | memoryview):
        raise ScanError(f"expected in_use to return an iterable of ids, found {type(result).__name__}")
    return list(islice(result, most))


def _checked(found: list[Any], first: int, last: int) -> frozenset[int]:
    if len(found) > last - first + 1:
        raise ScanError(f"expected at most {last - first + 1} ids from {first} to {last}, found more")
    for id_ in found:  # before they are a set: there True and 1.0 are 1
        if type(id_) is not int:
            raise ScanError(f"expected ids as int, found {type(id_).__name__}")
        if not first <= id_ <= last:
            outside = id_ if id_.bit_length() <= 64 else f"one of {id_.bit_length()} bits"
            raise ScanError(f"expected ids from {first} to {last}, found {outside}")
    return frozenset(found)
