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
class BesideGo:
    """How chunks move between SDK pods and Go pods, in seconds.

    hold          nothing is issued for so long from a chunk that was a Go pod's: it has no lease, and may
    have
                  stood still
    claims_after  Go pods may claim a dead SDK pod's chunks so long after its death; None: once the hold that
                  an SDK pod would have is over
    """

    hold: float = 3600.0
    claims_after: float | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A decided claim: this orphan to that pod."""

    orphan: Chunk
    owner: Owner


def plan(orphans: Iterable[Chunk], living: Mapping[Owner, int]) -> list[Placed]:
    """Spread `orphans` over `living` pods, given how many chunks each owns.

    Returns nothing when nobody lives: the orphans stay, and are claimed when somebody appears.
    """
    owned = {owner: count for owner, count in living.items() if not owner.is_go}
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


def hold_ms(
    orphan: Chunk, former: Session | None, allocation_ms: int, usage_lag_ms: int, go_hold_ms: int = 0
) -> int:
    """How long the new owner issues nothing: until every former owner has certainly stopped, and what it
    issued is visible to the scan.

    `W` after a graceful close of an owner whose chunk was unmarked; otherwise `A + W` with the largest
    `A` promised to any owner since the mark was last clear. `allocation_ms` is today's `A`. A Go pod's chunk
    is held for `go_hold_ms`, and for what its stale `drsm` tells of the SDK pod that it was claimed from.
    `former` is the session of the SDK pod that owns it, or did before a Go pod claimed it.
    """
    visible = visible_ms(usage_lag_ms)
    promised = max(allocation_ms, former.promised_ms if former else 0)
    if orphan.owner.is_go:
        stale = orphan.drsm
        ours = max(stale.hold_ms, promised + visible) if stale and stale.incarnation != GO_INCARNATION else 0
        return max(go_hold_ms, visible, ours)
    if former and former.reason == "closed" and not orphan.marked:
        return visible
    return max(orphan.hold_ms, promised + visible)


def visible_ms(usage_lag_ms: int) -> int:
    """`W` as a new owner counts it, whose clock may run fast: `W * (1 + r)`. (`A` has its margin at its
    holder.)"""
    return ceil(usage_lag_ms * (1 + RATE))
