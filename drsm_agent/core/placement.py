"""Who claims which orphan, and for how long nothing new may be issued from it.

Over the living SDK pods of the pool, fewest chunks first; the dead pod's own name first, so that a
restarted pod gets its chunks back; deterministic for equal load, so that repeating a plan repeats it.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from drsm_agent.core.documents import GO_INCARNATION, Chunk, Owner, Session
from drsm_agent.core.lease import RATE


@dataclass(frozen=True, slots=True)
class Placed:
    """A decided claim: this orphan to that pod."""

    orphan: Chunk
    owner: Owner


def plan(orphans: Iterable[Chunk], living: Mapping[Owner, int]) -> list[Placed]:
    """Spread `orphans` over `living` pods, given how many chunks each owns.

    Returns nothing when nobody lives: the orphans stay, and are claimed when somebody appears.
    """
    owned = {owner: count for owner, count in living.items() if owner.incarnation != GO_INCARNATION}
    if not owned:
        return []
    namesakes = {owner.name: owner for owner in sorted(owned, key=lambda owner: owner.incarnation)}
    ordered = sorted(orphans, key=lambda chunk: chunk.n)
    for orphan in ordered:
        if owner := namesakes.get(orphan.pod):
            owned[owner] += 1
    heap = [(count, owner) for owner, count in owned.items()]
    heapq.heapify(heap)
    placed = []
    for orphan in ordered:
        if owner := namesakes.get(orphan.pod):
            placed.append(Placed(orphan, owner))
            continue
        count, owner = heap[0]
        heapq.heapreplace(heap, (count + 1, owner))
        placed.append(Placed(orphan, owner))
    return placed


def hold_ms(orphan: Chunk, former: Session | None, allocation_ms: int, usage_lag_ms: int) -> int:
    """How long the new owner issues nothing: until every former owner has certainly stopped, and what it
    issued is visible to the scan.

    `W` after a graceful close of an owner whose chunk was unmarked; otherwise `A + W` with the largest
    `A` promised to any owner since the mark was last clear. `allocation_ms` is today's `A`.
    """
    visible = visible_ms(usage_lag_ms)
    if former and former.reason == "closed" and not orphan.marked:
        return visible
    promised = max(allocation_ms, former.promised_ms if former else 0)
    return max(orphan.hold_ms, promised + visible)


def visible_ms(usage_lag_ms: int) -> int:
    """`W` as a new owner counts it, whose clock may run fast: `W * (1 + r)`. (`A` has its margin at its
    holder.)"""
    return ceil(usage_lag_ms * (1 + RATE))
