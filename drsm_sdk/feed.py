"""One writer, any number of readers: each reader has a bounded queue and is told what it missed."""

import asyncio
from collections import deque
from itertools import count
from typing import Generic, Self, TypeVar
from weakref import WeakValueDictionary

from drsm_sdk.changes import Missed

T = TypeVar("T")

QUEUE_MAX = 1000


class Reader(Generic[T]):
    """Iterate over it with `async for`; it begins with what is published after it was made."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._missed = 0
        self._ended = False
        self._news = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T | Missed:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        if self._missed:
            missed, self._missed = Missed(self._missed), 0
            return missed
        return self._items.popleft()

    def _put(self, item: T) -> None:
        if len(self._items) >= QUEUE_MAX:
            self._items.popleft()
            self._missed += 1
        self._items.append(item)
        self._news.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()


class Feed(Generic[T]):
    """Publishing never waits; a reader that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._readers: WeakValueDictionary[int, Reader[T]] = WeakValueDictionary()
        self._numbers = count()
        self._closed = False

    def read(self) -> Reader[T]:
        """A new reader. It ends when the feed is closed and all was read."""
        reader: Reader[T] = Reader()
        if self._closed:
            reader._end()
        self._readers[next(self._numbers)] = reader
        return reader

    def publish(self, item: T) -> None:
        for reader in list(self._readers.values()):
            reader._put(item)

    def close(self) -> None:
        self._closed = True
        for reader in list(self._readers.values()):
            reader._end()
