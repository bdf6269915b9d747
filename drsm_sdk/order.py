"""In which order the free ids of a block are issued. Pure: chance comes in as a function.

`fifo` is a deque. The other two have the deque's methods as far as a stock uses them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from drsm_sdk.wire.space import FIFO, SPREAD

Below = Callable[[int], int]
"""A number from 0 to below its argument; of a secure source where ids must not be guessed."""

STRATA_BITS = 5
"""`spread` is even over the ids' lowest 5 bits: paging groups are counted in them (TS 38.304 7.1)."""


class Queue(Protocol):
    """Free ids. `popleft` takes the next one to issue; `append` puts one back that was released, `appendleft`
    one that was not issued after all."""

    def popleft(self) -> int: ...

    def append(self, id_: int, /) -> None: ...

    def appendleft(self, id_: int, /) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


def queue(order: str, ids: Iterable[int], below: Below) -> Queue:
    """Free ids in an order that a definition names."""
    if order == FIFO:
        return deque(ids)
    return Spread(ids, below) if order == SPREAD else Shuffled(ids, below)


class Shuffled:
    """Any of the free ids, each as likely as another."""

    __slots__ = ("_below", "_ids")

    def __init__(self, ids: Iterable[int], below: Below) -> None:
        self._ids, self._below = list(ids), below

    def popleft(self) -> int:
        """Raises IndexError when there is none."""
        ids = self._ids
        if not ids:
            raise IndexError("no free id")
        at = self._below(len(ids))
        ids[at], ids[-1] = ids[-1], ids[at]
        return ids.pop()

    def append(self, id_: int) -> None:
        self._ids.append(id_)

    appendleft = append

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)


class Spread:
    """Rounds over the values of the lowest bits, each round in another order; within one any free id."""

    __slots__ = ("_below", "_count", "_round", "_strata")

    def __init__(self, ids: Iterable[int], below: Below) -> None:
        self._below = below
        self._strata = [Shuffled((), below) for _ in range(1 << STRATA_BITS)]
        self._round: Shuffled = Shuffled((), below)
        self._count = 0
        for id_ in ids:
            self.append(id_)

    def popleft(self) -> int:
        """Raises IndexError when there is none."""
        if not self._count:
            raise IndexError("no free id")
        while True:
            if not self._round:
                self._round = Shuffled((i for i, ids in enumerate(self._strata) if ids), self._below)
            if stratum := self._strata[self._round.popleft()]:
                self._count -= 1
                return stratum.popleft()

    def append(self, id_: int) -> None:
        self._strata[id_ & (1 << STRATA_BITS) - 1].append(id_)
        self._count += 1

    appendleft = append

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (id_ for stratum in self._strata for id_ in stratum)
