"""Asking the application which ids are in use."""

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from drsm_sdk import scan
from drsm_sdk.scan import InUse, ScanError, Scanner
from drsm_sdk.wire.definition import Definition

BLOCKS = Definition(name="amfid", bits=10, block_bits=3, slots=6)


async def scanned(in_use: Any) -> frozenset[int]:
    scanner = Scanner(in_use)
    try:
        (found,) = await scanner.scan(BLOCKS, 1, lambda: None)
        return found
    finally:
        scanner.close()


async def as_coroutine(first: int, last: int) -> list[int]:
    return [first, last]


async def as_generator(first: int, last: int) -> AsyncIterator[int]:
    yield first
    yield last


class AnObject:
    async def __call__(self, first: int, last: int) -> list[int]:
        return [first, last]


@pytest.mark.parametrize(
    "in_use",
    [
        lambda first, last: [first, last],
        lambda first, last: {first, last},
        lambda first, last: (id_ for id_ in (first, last, first)),
        lambda first, last: as_coroutine(first, last) if last else [],
        as_coroutine,
        as_generator,
        AnObject(),
    ],
)
async def test_any_iterable_of_ids_will_do_plain_or_async(in_use: InUse) -> None:
    assert await scanned(in_use) == {8, 15}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (True, "found bool"),
        (None, "found NoneType"),
        ("8", "found str"),
        (8, "found int"),
        (object(), "found object"),
        (b"", "found bytes"),
        (bytearray(), "found bytearray"),
        (["8"], "found str"),
        ([None], "found NoneType"),
        ([[8]], "found list"),
        ([8.0], "found float"),
        ([9, 9.0], "found float"),
        ([True], "found bool"),
        ([7], "found 7"),
        ([16], "found 16"),
        ([-8], "found -8"),
        ([2**64], "one of 65 bits"),
        ([10**5000], "one of 16610 bits"),
        (itertools.repeat(8), "found more"),
        (itertools.count(8), "found more"),
    ],
)
async def test_nonsense_is_an_error_that_says_what_was_expected(result: Any, says: str) -> None:
    """A bare bool above all: in the original `true` meant free while its comment said otherwise."""

    async def as_async(first: int, last: int) -> Any:
        return result

    for in_use in (lambda first, last: result, as_async):
        with pytest.raises(ScanError, match=says):
            await scanned(in_use)


async def test_a_bool_that_equals_an_id_is_none() -> None:
    """A set would take it for the int."""
    scanner = Scanner(lambda first, last: [1, True])
    with pytest.raises(ScanError, match="found bool"):
        await scanner.scan(BLOCKS, 0, lambda: None)


async def test_an_async_iterator_without_end_is_no_answer_and_fills_no_memory() -> None:
    """Also one that never waits, and so could not be timed out."""
    read = 0

    async def endless(first: int, last: int) -> AsyncIterator[int]:
        nonlocal read
        while True:
            read += 1
            yield first

    with pytest.raises(ScanError, match="found more"):
        await scanned(endless)
    assert read == 9  # one more than there are ids


def raises(error: BaseException) -> Any:
    def in_use(first: int, last: int) -> Iterable[int]:
        raise error

    return in_use


def half_way(error: BaseException) -> Any:
    def in_use(first: int, last: int) -> Iterator[int]:
        yield first
        raise error

    return in_use


def raises_async(error: BaseException) -> Any:
    async def in_use(first: int, last: int) -> Iterable[int]:
        raise error

    return in_use


def half_way_async(error: BaseException) -> Any:
    async def in_use(first: int, last: int) -> AsyncIterator[int]:
        yield first
        raise error

    return in_use


@pytest.mark.parametrize("in_use", [raises, half_way, raises_async, half_way_async])
async def test_what_the_function_raises_comes_through(in_use: Any) -> None:
    """At once, or after it has told a part: that part is no answer."""
    with pytest.raises(LookupError, match="no database"):
        await scanned(in_use(LookupError("no database")))


async def test_a_time_out_of_the_functions_own_is_not_taken_for_the_scans() -> None:
    with pytest.raises(TimeoutError, match="the database's"):
        await scanned(raises_async(TimeoutError("the database's")))


class Strange(BaseException):
    """No Exception: as of gevent, or of pytest."""


@pytest.mark.parametrize(
    "in_use",
    [
        raises(Strange()),
        raises(GeneratorExit()),
        raises(StopIteration()),
        raises(KeyboardInterrupt()),
        raises(SystemExit(3)),
        raises(asyncio.CancelledError()),
        raises(concurrent.futures.CancelledError()),
        half_way(Strange()),
        half_way(SystemExit(3)),
        raises_async(Strange()),
        raises_async(GeneratorExit()),
        raises_async(asyncio.CancelledError()),
        half_way_async(Strange()),
        half_way_async(asyncio.CancelledError()),
    ],
)
async def test_nothing_that_the_function_raises_ends_the_scan_unseen_or_the_pod(in_use: Any) -> None:
    """A cancellation that nobody asked for would end the task without a word, and the chunk would never be
    asked for again; others would end every task of the pod, or the application's event loop."""
    with pytest.raises(ScanError, match=r"in_use\(8, 15\) raised [A-Z]"):
        await scanned(in_use)


def test_an_error_is_told_whatever_its_text_does() -> None:
    class Unreadable(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert scan.said(LookupError("no database")) == "LookupError: no database"
    assert scan.said(Unreadable()) == "Unreadable: unreadable (ValueError)"
    assert len(scan.said(LookupError("x" * 10_000))) == scan.SAID_MAX


async def test_a_plain_function_does_not_block_the_event_loop() -> None:
    go_on = threading.Event()

    def waits(first: int, last: int) -> list[int]:
        go_on.wait(10)
        return []

    task = asyncio.create_task(scanned(waits))
    await asyncio.sleep(0.01)
    go_on.set()
    assert await task == frozenset()


async def test_a_function_that_does_not_return_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "TIMEOUT", 0.2)
    with pytest.raises(ScanError, match="did not return"):
        await scanned(lambda first, last: asyncio.sleep(10))


async def says_a_part_when_cancelled(first: int, last: int) -> list[int]:
    found = [first]
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return found


async def fails_when_cancelled(first: int, last: int) -> list[int]:
    try:
        await asyncio.Event().wait()
    finally:
        raise LookupError("the connection was in use")


@pytest.mark.parametrize("in_use", [says_a_part_when_cancelled, fails_when_cancelled])
async def test_what_a_function_says_once_its_time_is_over_is_no_answer(
    in_use: InUse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that it had not come to yet would be issued a second time."""
    monkeypatch.setattr(scan, "TIMEOUT", 0.2)
    with pytest.raises(ScanError, match="did not return"):
        await scanned(in_use)


@pytest.mark.parametrize("in_use", [says_a_part_when_cancelled, fails_when_cancelled])
async def test_a_scan_that_is_ended_from_outside_ends_whatever_the_function_does(in_use: InUse) -> None:
    """The chunk or the session is gone."""
    begun = asyncio.Event()
    scanner = Scanner(in_use)
    task = asyncio.create_task(scanner.scan(BLOCKS, 1, begun.set))
    await begun.wait()
    await asyncio.sleep(0)  # into the function
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_plain_functions_that_hang_take_no_more_than_four_threads() -> None:
    """Further scans are refused, and go on as soon as one has returned."""
    go_on = threading.Event()

    def hangs(first: int, last: int) -> list[int]:
        if first:
            go_on.wait(10)
        return []

    scanner = Scanner(hangs)
    hung = [asyncio.create_task(scanner.scan(BLOCKS, 1, lambda: None)) for _ in range(4)]
    while len(scanner._threads) < 4:
        await asyncio.sleep(0)
    for task in hung:
        task.cancel()
    await asyncio.wait(hung)
    with pytest.raises(ScanError, match="4 earlier calls of in_use have not returned yet"):
        await scanner.scan(BLOCKS, 0, lambda: None)
    go_on.set()
    for thread in scanner._threads:
        thread.join(10)
    assert await scanner.scan(BLOCKS, 0, lambda: None) == [frozenset()]
    scanner.close()


async def test_no_more_than_four_scans_run_at_once() -> None:
    running, most = 0, 0

    async def counts(first: int, last: int) -> list[int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return []

    scanner = Scanner(counts)
    await asyncio.gather(*[scanner.scan(BLOCKS, 1, lambda: None) for _ in range(20)])
    scanner.close()
    assert most == 4
