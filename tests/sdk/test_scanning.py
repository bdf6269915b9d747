"""Claimed chunks in a pod: held, scanned again until there is an answer, reported until that is heard.

Whatever the application's function does, nothing is issued that it has not said to be free.
"""

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from drsm_sdk import NotAllocated, Pod, Pool, changes, scan, supply
from drsm_sdk.testing import Definition, Domain, MemoryTransport
from drsm_sdk.transport import Message, NoAnswer
from drsm_sdk.wire import messages as wire
from tests.sdk.fake_agent import eventually

POOL = "amfid"
AMF_1, AMF_2, AMF_3 = (Pod(f"amf-{i}", f"10.0.0.{i}", "i") for i in (1, 2, 3))
SMALL = Definition(name=POOL, bits=12, block_bits=4, slots=10)


FREED = threading.Event()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scans are tried again after some milliseconds; threads that hang end with the test."""
    monkeypatch.setattr(supply, "RETRY_FIRST", 0.002)
    monkeypatch.setattr(supply, "RETRY_MOST", 0.01)
    FREED.clear()
    yield
    FREED.set()


async def next_of(reader: Any, kind: type[Any]) -> Any:
    async with asyncio.timeout(10):
        while not isinstance(item := await anext(reader), kind):
            pass
    return item


@asynccontextmanager
async def survivor(domain: Domain, in_use: Any) -> AsyncIterator[tuple[Pool, Any, int]]:
    """amf-1 after amf-2 was killed: its pool, what changes there, and the number of the claimed chunk."""
    async with domain.drsm(AMF_1) as drsm, domain.drsm(AMF_2) as dying:
        pool = await drsm.join(POOL, in_use=in_use)
        await dying.join(POOL)
        (n,) = [n for n, owner in domain.owners(POOL).items() if owner.name == "amf-2"]
        reader = pool.changes()
        domain.kill("amf-2")
        while not (gained := await next_of(reader, changes.Gained)).marked:
            pass
        assert gained.chunks == (n,)
        yield pool, reader, n


def marked(domain: Domain, n: int) -> bool:
    """As the agent sees it."""
    return domain._agent.tables[POOL].rows[n].hold_ms is not None


def issues_nothing_of(pool: Pool, n: int) -> None:
    assert pool.stats.closed >= 1
    assert not set(SMALL.ids(n)) & {pool.allocate_nowait() for _ in range(pool.stats.free)}


# --- functions that give no answer ------------------------------------------------------------------


def breaks_half_way(first: int, last: int) -> Iterator[int]:
    yield first
    raise LookupError("no database")


async def never_ends(first: int, last: int) -> AsyncIterator[int]:
    while True:
        yield first


async def never_returns(first: int, last: int) -> list[int]:
    await asyncio.Event().wait()
    return []


def hangs(first: int, last: int) -> list[int]:
    FREED.wait()
    return []


async def is_cancelled(first: int, last: int) -> list[int]:
    raise asyncio.CancelledError


async def stops_when_cancelled(first: int, last: int) -> list[int]:
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return []


def leaves(first: int, last: int) -> list[int]:
    raise SystemExit(3)


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def raises_the_unreadable(first: int, last: int) -> list[int]:
    raise Unreadable


BAD = [
    (lambda first, last: [last + 1], "found"),
    (lambda first, last: [first - 1], "found"),
    (lambda first, last: False, "found bool"),
    (lambda first, last: None, "found NoneType"),
    (lambda first, last: "", "found str"),
    (lambda first, last: [str(first)], "found str"),
    (lambda first, last: [float(first)], "found float"),
    (lambda first, last: itertools.repeat(first), "found more"),
    (breaks_half_way, "LookupError: no database"),
    (never_ends, "found more"),
    (never_returns, "did not return"),
    (hangs, "did not return"),
    (is_cancelled, "raised CancelledError"),
    (stops_when_cancelled, "did not return"),
    (leaves, "raised SystemExit"),
    (raises_the_unreadable, "Unreadable"),
]


@pytest.mark.parametrize(("bad", "says"), BAD)
async def test_a_scan_without_an_answer_frees_nothing_is_told_and_tried_again(
    bad: Any, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice it goes wrong, then one id is in use. The pool would free what nobody can scan: this pod can."""
    if says == "did not return":
        monkeypatch.setattr(scan, "TIMEOUT", 0.02)
    definition = Definition(name=POOL, bits=12, block_bits=4, slots=10, unscanned="free")
    good = threading.Event()

    def plain(first: int, last: int) -> Any:
        return [first + 1] if good.is_set() else bad(first, last)

    async def as_async(first: int, last: int) -> Any:
        return [first + 1] if good.is_set() else await bad(first, last)

    in_use = as_async if inspect.iscoroutinefunction(bad) else plain
    async with Domain(definition) as domain, survivor(domain, in_use) as (pool, reader, n):
        for attempt in (1, 2):
            failed = await next_of(reader, changes.ScanFailed)
            assert (failed.pool, failed.chunk, failed.attempt) == (POOL, n, attempt)
            assert says in failed.error
            assert f"scan {attempt} of chunk {n} failed" in caplog.text
        assert marked(domain, n)
        assert all(pool.valid(id_) for id_ in SMALL.ids(n))
        issues_nothing_of(pool, n)
        good.set()
        done = await next_of(reader, changes.Scanned)
        assert (done.chunk, done.in_use, done.freed) == (n, 1, len(SMALL.ids(n)) - 1)
        await eventually(lambda: not marked(domain, n))
        assert pool.valid(SMALL.first_id(n) + 1)


async def test_a_failing_scan_is_tried_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubling up to a bound, each with a tenth of jitter."""
    monkeypatch.setattr(supply, "RETRY_FIRST", 0.02)
    monkeypatch.setattr(supply, "RETRY_MOST", 0.08)
    asked: list[float] = []

    async def in_use(first: int, last: int) -> list[int]:
        asked.append(time.monotonic())
        if len(asked) < 5:
            raise LookupError("no database")
        return []

    async with Domain(SMALL) as domain, survivor(domain, in_use) as (_, reader, n):
        assert (await next_of(reader, changes.Scanned)).chunk == n
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    for waited, least in zip(waits, (0.02, 0.04, 0.08, 0.08), strict=True):
        assert waited >= 0.89 * least


# --- releases ---------------------------------------------------------------------------------------


async def test_a_release_during_the_hold_changes_nothing_and_one_after_the_scan_began_wins() -> None:
    """The function says that both ids are in use."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def in_use(first: int, last: int) -> list[int]:
        begun.set()
        await go_on.wait()
        return [first + 1, first + 2, first + 3]

    async with Domain(SMALL, hold=0.3) as domain, survivor(domain, in_use) as (pool, reader, n):
        first = SMALL.first_id(n)
        assert not begun.is_set()
        pool.release(first + 1)
        await begun.wait()
        pool.release(first + 2)
        with pytest.raises(NotAllocated):
            pool.release(first + 2)
        assert [pool.valid(first + slot) for slot in (1, 2, 3)] == [True, False, True]
        issues_nothing_of(pool, n)
        go_on.set()
        assert (await next_of(reader, changes.Scanned)).in_use == 2
        assert [pool.valid(first + slot) for slot in (0, 1, 2, 3)] == [False, True, False, True]
        pool.release(first + 1)


# --- holds, reports, and the end of a session ---------------------------------------------------------


async def test_a_hold_is_inherited_in_full_by_who_claims_next() -> None:
    """Who died in its own hold never scanned; the next one waits as long again, then scans."""
    asked: list[tuple[str, int, float]] = []

    def asks(name: str) -> Any:
        def in_use(first: int, last: int) -> list[int]:
            asked.append((name, first, time.monotonic()))
            return []

        return in_use

    hold = 0.3
    async with Domain(SMALL, hold=hold) as domain, survivor(domain, asks("amf-1")) as (_, _, n):
        async with domain.drsm(AMF_3) as last:
            pool = await last.join(POOL, in_use=asks("amf-3"))
            reader = pool.changes()
            domain.kill("amf-1")
            killed = time.monotonic()
            while n not in (gained := await next_of(reader, changes.Gained)).chunks:
                pass
            assert gained.hold == hold
            while (await next_of(reader, changes.Scanned)).chunk != n:
                pass
            (scanned_at,) = [at for name, first, at in asked if (name, first) == ("amf-3", SMALL.first_id(n))]
            assert scanned_at >= killed + hold


@pytest.mark.parametrize("fault", ["not heard", "answer lost", "left out", "refused"])
async def test_a_finished_scan_is_reported_again_until_the_agent_has_cleared_the_mark(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the reports; meanwhile the chunk is issued from, and cannot be given back."""
    async with Domain(SMALL) as domain:
        reports: list[str] = []
        works = asyncio.Event()

        class Lossy(MemoryTransport):
            """Until it works, reports do not get through, or get another answer."""

            async def request_many(
                self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
            ) -> None:
                if not subject.endswith(".scanned") or works.is_set():
                    return await super().request_many(subject, data, timeout, done)
                reports.append(subject)
                if fault == "left out":
                    done(Message(subject, domain._agent.packed(wire.Cleared(()))[0]))
                    return None
                if fault == "refused":
                    done(Message(subject, *domain._agent.packed(wire.Failure("bad_request", "no"))))
                    return None
                if fault == "answer lost":
                    await super().request_many(subject, data, timeout, lambda _: True)
                raise NoAnswer("lost")

        monkeypatch.setattr(domain, "transport", lambda name="": Lossy(domain._bus, name))
        async with survivor(domain, lambda first, last: []) as (pool, reader, n):
            await next_of(reader, changes.Scanned)
            await eventually(lambda: len(reports) >= 2)
            assert marked(domain, n) == (fault != "answer lost")
            (chunk,) = pool._stock.unreported()
            assert (chunk.n, chunk.open) == (n, True)
            assert n not in pool._stock.retire(1e12, idle=0.0, keep=0, most=9)
            works.set()
            await eventually(lambda: not pool._stock.unreported())
            assert not marked(domain, n)


async def test_a_scan_that_outlives_its_session_is_nobodys() -> None:
    """The function is told to end with the session, and says something nevertheless: it is not heard."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def in_use(first: int, last: int) -> list[int]:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
        return []

    async with Domain(SMALL) as domain, survivor(domain, in_use) as (_, reader, n):
        await begun.wait()
        begun.clear()
        domain.lose("amf-1")
        await ended.wait()
        told: list[Any] = []
        async with asyncio.timeout(10):
            while not isinstance(told[-1:] and told[-1], changes.Gained):
                told.append(await anext(reader))
        assert n in told[-1].chunks  # its namesake's, under another grant
        await begun.wait()
        assert not [change for change in told if isinstance(change, changes.Scanned | changes.ScanFailed)]
        assert marked(domain, n)
