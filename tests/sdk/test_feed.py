"""Changes to their readers."""

import asyncio
import gc

from drsm_sdk import feed as feeds
from drsm_sdk.changes import Missed, ranges
from drsm_sdk.feed import Feed


async def test_every_reader_gets_everything_in_order() -> None:
    feed: Feed[int] = Feed()
    one, two = feed.read(), feed.read()
    for i in range(3):
        feed.publish(i)
    feed.close()
    assert [item async for item in one] == [item async for item in two] == [0, 1, 2]


async def test_a_reader_begins_with_what_comes_after_it_was_made() -> None:
    feed: Feed[int] = Feed()
    feed.publish(1)
    reader = feed.read()
    feed.publish(2)
    assert await anext(reader) == 2


async def test_a_slow_reader_is_told_how_much_it_missed() -> None:
    feed: Feed[int] = Feed()
    reader = feed.read()
    for i in range(feeds.QUEUE_MAX + 5):
        feed.publish(i)
    assert await anext(reader) == Missed(5)
    assert await anext(reader) == 5


async def test_a_waiting_reader_is_woken() -> None:
    feed: Feed[int] = Feed()
    reader = feed.read()
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    feed.publish(7)
    assert await waiting == 7


async def test_a_closed_feed_ends_its_readers_old_and_new() -> None:
    feed: Feed[int] = Feed()
    old = feed.read()
    feed.close()
    assert [item async for item in old] == [item async for item in feed.read()] == []


def test_a_reader_that_nobody_holds_is_forgotten() -> None:
    feed: Feed[int] = Feed()
    feed.read()
    gc.collect()
    assert len(feed._readers) == 0


def test_ids_as_ranges_stay_short() -> None:
    assert ranges([5, 1, 2, 3, 9]) == ((1, 3), (5, 5), (9, 9))
    assert ranges(range(1_000_000)) == ((0, 999_999),)
    assert ranges([]) == ()
