"""Snapshots of any size: pages that fit, of one moment, made once for all who ask, and few at a time."""

import asyncio
from functools import partial

import pytest

from drsm_agent import snapshots
from drsm_agent.bus.nats_bus import PAYLOAD_MIN
from drsm_agent.core.documents import Chunk, Drsm, Owner
from drsm_agent.core.table import Held, PoolTable
from drsm_agent.errors import BusUnavailable, Refused
from drsm_agent.snapshots import SENDING_MAX, PoolPages, Snapshots
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.wire import codec
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import SnapshotPage, Stamp

POOL = "amfid"
DEFINITION = Definition(name=POOL, bits=64)
STAMP = {"agent": "a" * 253, "term": 2**63, "history": "h" * 16}
LARGEST = 2**54 - 1
"""The highest chunk number of a pool of 64 bits."""


def full(owners: int, chunks: int) -> PoolTable:
    """A pool of owners with the longest names that a pod can have, and every second chunk marked."""
    pool = PoolTable(POOL, (2**63, 1))
    for i in range(owners):
        labels = ".".join([f"amf-{i:059d}", *("x" * 63 for _ in range(2)), "y" * 61])
        owner = Owner(labels, "1" * 64, "\N{GRINNING FACE}" * 256, 2**63 + i)
        pool.live[owner.key] = owner
        own(pool, owner, range(LARGEST - i, LARGEST - chunks, -owners))
    return pool


def own(pool: PoolTable, owner: Owner, numbers: range) -> None:
    drsm = Drsm(owner.name, owner.ip, owner.instance, owner.incarnation, "0" * 16)
    chunk = Chunk(0, owner.name, owner.ip, owner.instance, drsm)
    for n in numbers:
        pool.chunks[n] = chunk
        pool.held.setdefault(owner.key, Held()).numbers[n] = None
        if n % 2:
            pool.marked.add(n)


def assembled(pages: list[bytes]) -> Snapshot:
    """What a consumer makes of them."""
    collected = Pages()
    for data in pages:
        whole = collected.add(codec.unpack(Stamp, data), codec.unpack(SnapshotPage, data))
    assert whole is not None
    return whole


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("owners", "chunks"), [(1000, 100_000), (1, 100_000), (1000, 0), (0, 0)])
def test_pages_fit_the_smallest_messages_and_add_up_to_the_table(
    owners: int, chunks: int, as_json: bool
) -> None:
    """With the longest names and the largest numbers there are, on the smallest server that is taken."""
    pool = full(owners, chunks)
    pages = PoolPages(pool, DEFINITION, PAYLOAD_MIN, as_json=as_json)
    encoded = [codec.encode(codec.to_map(page) | STAMP, as_json=as_json) for page in pages]
    assert len(encoded) == pages.count
    assert max(map(len, encoded)) < PAYLOAD_MIN - 1024  # headers
    whole = assembled(encoded)
    assert {owner.key for owner in whole.owners} == set(pool.live)
    assert {n: key for key, numbers in whole.chunks for n in numbers} == {
        n: key for key, held in pool.held.items() for n in held.numbers
    }
    assert whole.marked == pool.marked


async def sent(sending: Snapshots, pool: PoolTable, pages: list[bytes]) -> None:
    async def send(page: bytes) -> None:
        pages.append(page)
        await asyncio.sleep(0)

    await sending.send(pool, PAYLOAD_MIN, send, as_json=False)


async def test_all_pages_are_of_the_moment_at_which_the_first_was_made() -> None:
    """Others have their turn between two pages, and change the table."""
    pool, pages = full(100, 10_000), list[bytes]()
    expected = set(pool.chunks)

    async def send(page: bytes) -> None:
        pages.append(page)
        pool.version = (2**63, 1 + len(pages))
        own(pool, next(iter(pool.live.values())), range(len(pages), len(pages) + 1))
        pool.marked.clear()
        pool.live.pop(next(reversed(pool.live)))

    await Snapshots({POOL: DEFINITION}, STAMP).send(pool, PAYLOAD_MIN, send, as_json=False)
    whole = assembled(pages)
    assert len(pages) > 2
    assert {n for _, numbers in whole.chunks for n in numbers} == expected
    assert {owner.state for owner in whole.owners} == {"live"}
    assert len(whole.marked) == len(expected) // 2


async def test_all_who_ask_at_one_version_get_the_same_bytes() -> None:
    """Encoded once, also for those who come while it is being sent; anew after a change."""
    pool, sending = full(100, 10_000), Snapshots({POOL: DEFINITION}, STAMP)
    answers = [list[bytes]() for _ in range(3 * SENDING_MAX)]
    await asyncio.gather(*[sent(sending, pool, pages) for pages in answers])
    assert len(answers[0]) > 1
    assert {tuple(map(id, pages)) for pages in answers} == {tuple(map(id, answers[0]))}
    pool.version = (2**63, 2)
    later: list[bytes] = []
    await sent(sending, pool, later)
    assert assembled(later).version == (2**63, 2)


async def test_few_are_sent_at_once_and_a_failed_one_gives_up_its_turn() -> None:
    pool, sending = full(1, 10), Snapshots({POOL: DEFINITION}, STAMP)
    at_once: list[int] = []
    now = 0

    async def fails(_page: bytes) -> None:
        nonlocal now
        now += 1
        at_once.append(now)
        await asyncio.sleep(0)
        now -= 1
        raise BusUnavailable("cut")

    send = partial(sending.send, pool, PAYLOAD_MIN, fails, as_json=False)
    results = await asyncio.gather(*[send() for _ in range(20)], return_exceptions=True)
    assert [type(result) for result in results] == [BusUnavailable] * 20
    assert max(at_once) == SENDING_MAX


async def test_who_waits_too_long_or_behind_too_many_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has given up cannot be seen; a queue of such would hold up all others."""
    monkeypatch.setattr(snapshots, "TURN_TIMEOUT", 0.05)
    monkeypatch.setattr(snapshots, "WAITING_MAX", 3)
    pool, sending, stuck = full(1, 10), Snapshots({POOL: DEFINITION}, STAMP), asyncio.Event()

    async def hangs(_page: bytes) -> None:
        await stuck.wait()

    send = partial(sending.send, pool, PAYLOAD_MIN, hangs, as_json=False)
    asking = [asyncio.create_task(send()) for _ in range(SENDING_MAX + 3)]
    await asyncio.sleep(0)
    with pytest.raises(Refused) as refused:
        await send()
    assert (refused.value.failure.reason, refused.value.failure.retry) == ("overloaded", True)
    waited = await asyncio.gather(*asking[SENDING_MAX:], return_exceptions=True)
    assert [type(result) for result in waited] == [Refused] * 3
    stuck.set()
    await asyncio.gather(*asking[:SENDING_MAX])
    await send()
