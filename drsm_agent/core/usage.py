"""What pods say of their stock, and what follows: empty chunks asked back, and what looks like a leak.

Never a decision about ownership: what a pod says may be old, or wrong.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

RECALL_SHARE = 0.05
"""With fewer of its chunks free than this, a pool asks pods for their empty ones."""
ONLY_ALLOCATES_CHUNKS = 3
"""A pod that has issued so many chunks of ids and released not one, most likely never will."""
MARK_GRACE = 60.0
"""Seconds beyond its hold that a scan may take, with its retries."""


def asked_back(capacity: int, owned: int, free_ids: int, ids_per_chunk: int) -> int:
    """How many chunks a pod with so many free ids is asked for: what it may have beyond one chunk (in which
    some ids may never be issued), while the pool runs out. It gives back only empty ones."""
    if capacity - owned >= RECALL_SHARE * capacity:
        return 0
    return max((free_ids + ids_per_chunk // 2) // ids_per_chunk - 1, 0)


def only_allocates(issued: int, released: int, ids_per_chunk: int) -> bool:
    """Whether a pod looks as if it never released an id."""
    return released == 0 and issued >= ONLY_ALLOCATES_CHUNKS * ids_per_chunk


class Marks:
    """Which chunks of a pool have been marked for longer than a hold and a scan take."""

    def __init__(self) -> None:
        self._due: dict[tuple[int, str], float] = {}

    def overdue(self, marked: Iterable[tuple[int, str, int]], now: float) -> list[int]:
        """`marked` are (number, grant, hold in milliseconds) of all that are marked at `now`, in seconds."""
        before, self._due = self._due, {}
        for n, grant, hold_ms in marked:
            self._due[n, grant] = before.get((n, grant), now + hold_ms / 1000 + MARK_GRACE)
        return sorted(n for (n, _), due in self._due.items() if due <= now)


def news(now: Mapping[T, bool], told: set[T]) -> list[T]:
    """Which of these are true and were not told yet; `told` is brought up to date."""
    fresh = [name for name, true in now.items() if true and name not in told]
    told &= {name for name, true in now.items() if true}
    told |= set(fresh)
    return fresh
