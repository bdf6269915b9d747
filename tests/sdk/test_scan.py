"""Asking the application which ids are in use."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from drsm_sdk import scan
from drsm_sdk.scan import InUse, ScanError, Scanner


async def scanned(in_use: Any) -> frozenset[int]:
    scanner = Scanner(in_use)
    try:
        return await scanner.scan(8, 13, lambda: None)
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
    assert await scanned(in_use) == {8, 13}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (True, "found bool"),
        (None, "found NoneType"),
        ("8", "found str"),
        (["8"], "found str"),
        ([True], "found bool"),
        ([7], "found 7"),
        ([14], "found 14"),
        (itertools.repeat(8), "found more"),
    ],
)
async def test_nonsense_is_an_error_that_says_what_was_expected(result: Any, says: str) -> None:
    """A bare bool above all: in the original `true` meant free while its comment said otherwise."""
    with pytest.raises(ScanError, match=says):
        await scanned(lambda first, last: result)


async def test_what_the_function_raises_comes_through() -> None:
    def broken(first: int, last: int) -> Iterable[int]:
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        await scanned(broken)


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
    monkeypatch.setattr(scan, "TIMEOUT", 0.01)
    with pytest.raises(ScanError, match="did not return"):
        await scanned(lambda first, last: asyncio.sleep(10))


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
    await asyncio.gather(*[scanner.scan(8, 13, lambda: None) for _ in range(20)])
    scanner.close()
    assert most == 4
