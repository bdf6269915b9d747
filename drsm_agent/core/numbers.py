"""Which free chunk number is granted next: never-used ones ascending, then the one free longest.

A pool of 2**54 chunks costs what is in use, not what is possible: the never-used numbers are a
counter. Numbers that were free below it when this leader started come last, as nobody knows since when.
"""

from collections.abc import Container


class FreeNumbers:
    """The free numbers 0..capacity-1 of one pool, given that those up to `highest` were used before."""

    def __init__(self, capacity: int, highest: int = -1) -> None:
        self._capacity = capacity
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
        if self._next < self._capacity:
            self._next += 1
            return self._next - 1
        if self._freed:
            n = next(iter(self._freed))
            del self._freed[n]
            return n
        if self._gap < self._gap_end:
            self._gap += 1
            return self._gap - 1
        return None
