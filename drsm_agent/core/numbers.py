"""Which free chunk number is granted next: never-used ones ascending, then the one free longest. Beside Go
pods, which never forget a number and spin once they know all, the lowest that was used before.

A pool of 2**54 chunks costs what is in use, not what is possible: the never-used numbers are a
counter. Numbers that were free below it when this leader started come last, as nobody knows since when.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Sequence
from heapq import nsmallest


class FreeNumbers:
    """The free numbers 0..capacity-1 of one pool, given that those up to `highest` were used before. `barren`
    are runs of numbers (first, last) that are of no use, ascending; they may be as long as the pool."""

    def __init__(self, capacity: int, highest: int = -1, barren: Sequence[tuple[int, int]] = ()) -> None:
        self._capacity = capacity
        self._barren, self._barren_from = barren, [first for first, _ in barren]
        self._next = self._gap_end = highest + 1
        self._gap = 0
        self._freed: dict[int, None] = {}

    def freed(self, n: int) -> None:
        """A chunk was released; it is granted again last."""
        if n < self._next:
            self._freed.pop(n, None)
            self._freed[n] = None

    def take(self, count: int, used: Container[int]) -> list[int]:
        """Up to `count` numbers that are not in `used`; fewer when the pool is exhausted."""
        taken: dict[int, None] = {}  # one that was freed is below the gap's end too, and comes twice
        while len(taken) < count and (n := self._one()) is not None:
            if n not in used:
                taken[n] = None
        return list(taken)

    def _one(self) -> int | None:
        self._next = self._past_barren(self._next)
        if self._next < self._capacity:
            self._next += 1
            return self._next - 1
        while self._freed:
            n = next(iter(self._freed))
            del self._freed[n]
            if self._past_barren(n) == n:
                return n
        self._gap = self._past_barren(self._gap)
        if self._gap < self._gap_end:
            self._gap += 1
            return self._gap - 1
        return None

    def _past_barren(self, n: int) -> int:
        """`n`, or the first number after the barren run that it lies in."""
        at = bisect_right(self._barren_from, n) - 1
        return self._barren[at][1] + 1 if at >= 0 and n <= self._barren[at][1] else n


KNOWN_SHARE = 0.75
"""Of its range a Go pod may know so much: it draws numbers until it finds one that it does not know, and with
three quarters known that takes four draws."""


def go_knows(capacity: int, owned: Collection[int], known_free: Collection[int]) -> int:
    """How many numbers of a pool Go pods know at most: those that are owned, and those that were."""
    known = len(owned) + len(known_free)
    if known < KNOWN_SHARE * capacity:  # as a rule; more only with numbers outside of the pool
        return known
    return sum(n < capacity for numbers in (owned, known_free) for n in numbers)


def beside_go(
    count: int,
    capacity: int,
    owned: Collection[int],
    known_free: Collection[int],
    unusable: Callable[[int], bool] = lambda _: False,
) -> list[int]:
    """Up to `count` free numbers of a pool that Go pods use too: first the lowest of those that they know,
    then the lowest never used, as long as they know less than `KNOWN_SHARE` of all. The same whichever leader
    decides: who knows nothing of what was used before finds it among the lowest."""
    usable = (n for n in known_free if n < capacity and n not in owned and not unusable(n))
    taken = nsmallest(count, usable)
    room = int(KNOWN_SHARE * capacity) - go_knows(capacity, owned, known_free)
    chosen, fresh = set(taken), min(count - len(taken), room)
    for n in range(capacity):
        if fresh <= 0:
            break
        if n not in owned and n not in chosen and n not in known_free and not unusable(n):
            taken.append(n)
            fresh -= 1
    return taken
