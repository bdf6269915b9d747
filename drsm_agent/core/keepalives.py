"""Which keepalive documents there shall be: what Go DRSM pods on the same collection see of our pods.

A Go pod claims the chunks that name a pod when it sees that pod's keepalive deleted, and only then; it does
not look at who is alive. So the agent decides by keepalives what Go pods do to our chunks:

- A living SDK pod has a mirror, whose end is always far ahead, before it owns its first chunk. Where there is
  a Go pod's keepalive of that name, that becomes the mirror, in one write, again after each renewal of the Go
  pod. It is never deleted and inserted anew. Until it has stood unchanged for so long that the Go pod is
  gone, it also says that the Go pod lives.
- A dead SDK pod's name has a keepalive of the agent's, which does not end, for as long as somebody may
  issue from its chunks, also where a Go pod of its name lives. Then it is deleted, although chunks name it:
  where no SDK pod lives, Go pods shall claim them. They may have missed it, so it is shown again.
- A Go pod that owns chunks, has no keepalive and is silent gets a stand-in that says so.

`expire_at` is as it is written; times are seconds: of the database for the end of a keepalive, of the
leader's clock for how long something has lasted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drsm_agent.core import writes
from drsm_agent.core.documents import GO_INCARNATION, Keepalive, Owner
from drsm_agent.core.table import UNKNOWN, PoolTable
from drsm_agent.core.writes import Insert, Update

GO_SILENCE = 25.0
"""A Go pod whose keepalive stood unchanged, or was missing, for this long is down: it puts the end 20 s
ahead, each 5 s. Longer than `feed.STILL_AFTER` and a renewal: that the stream stands still is noticed
first."""
TTL_MONITOR = 60.0
"""MongoDB looks for expired documents once in so many seconds."""
TTL_LATE = 30.0
"""Beyond that, a keepalive that is still there is one that MongoDB does not delete."""
LEASES_AHEAD, SLACK = 3, 10.0
"""A mirror's end is put so many allocation leases ahead, each half lease anew; so it is never less than `A +
W` ahead, nor deleted before every pod that was not renewed has stopped issuing. And some seconds more: the
table's last change, by which the database's time is known, is as old as the stream is quiet."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The end that a keepalive gets now, and the earliest that need not be put off, in seconds."""

    expire_at: Any
    least: float


def ahead(allocation: float) -> float:
    """How far ahead of the database's time a mirror ends, in seconds."""
    return LEASES_AHEAD * allocation + SLACK


def for_living(pool: PoolTable, owner: Owner, ends: Ends) -> Insert | Update | None:
    """What the keepalive of a living SDK pod needs."""
    seen = pool.keepalives.get(owner.name)
    if seen is None:
        return writes.mirror_keepalive(pool.name, owner, ends.expire_at)
    mirrored = seen.mirrored
    if mirrored == owner:
        return forgets_go(pool, seen) or _lasting(pool, seen, ends)
    if mirrored and mirrored.key in pool.live and mirrored.incarnation >= owner.incarnation:
        return None
    return writes.take_over_keepalive(pool.name, seen, owner, ends.expire_at)


def for_beginning(pool: PoolTable, owner: Owner, ends: Ends) -> Update | None:
    """What a keepalive needs that has the name of a pod of ours which has not spoken yet: beside a living Go
    pod it becomes the mirror, and no longer ends."""
    seen = pool.keepalives.get(owner.name)
    if seen is None or (owner.name, GO_INCARNATION) not in pool.live or seen.mirrored not in {None, owner}:
        return None
    return for_dead(pool, owner, ends)


def for_dead(pool: PoolTable, owner: Owner, ends: Ends) -> Update | None:
    """What a keepalive needs that has the name of a dead pod of ours which may still issue: it is the
    agent's, whichever incarnation it shows, and does not end. Whoever deletes it has Go pods claim what names
    it."""
    seen = pool.keepalives.get(owner.name)
    if seen is None:
        return None
    if seen.mirrored is None:
        return writes.take_over_keepalive(pool.name, seen, owner, ends.expire_at)
    return _lasting(pool, seen, ends)


def _lasting(pool: PoolTable, seen: Keepalive, ends: Ends) -> Update | None:
    """Puts the end of one of the agent's off, once it is near."""
    near = _end(seen.expire_at) < ends.least
    return writes.prolong_keepalive(pool.name, seen, ends.expire_at) if near else None


def forgets_go(pool: PoolTable, seen: Keepalive) -> Update | None:
    """Has a mirror say no more that a Go pod of its name is down, once that has no chunks: the next Go pod of
    the name is another one."""
    mirrored = seen.mirrored
    if mirrored is None or seen.go is None or not seen.go.down or go_writes_under(pool, mirrored.name):
        return None
    return writes.forget_go(pool.name, seen, mirrored)


def shows(pool: PoolTable, owner: Owner) -> bool:
    """Whether a keepalive is there by which Go pods know a living SDK pod, and which nothing of theirs
    deletes: no `DeletePod` names its instance, and its end is far ahead."""
    seen = pool.keepalives.get(owner.name)
    return seen is not None and seen.mirrored == owner


def of_nobody(pool: PoolTable) -> Iterator[tuple[Keepalive, Owner]]:
    """The agent's keepalives whose incarnation, and whose name, no living pod has."""
    alive = {owner.name for owner in pool.live.values()}
    for seen in pool.keepalives.values():
        owner = seen.mirrored
        if owner is not None and owner.name not in alive:
            yield seen, owner


def go_writes_under(pool: PoolTable, name: str) -> bool:
    """Whether a chunk that a Go pod wrote names a pod: it allocates up to five seconds before its first
    keepalive."""
    return (name, GO_INCARNATION) in pool.held


def is_unknown(pool: PoolTable, name: str) -> bool:
    """Whether a Go pod owns chunks, and nothing says whether it lives."""
    return go_writes_under(pool, name) and pool.state(Owner(name, "", "", GO_INCARNATION)) == UNKNOWN


def for_silent_go(pool: PoolTable, name: str, ends: Ends) -> Insert | Update:
    """Says that a Go pod which owns chunks is down."""
    seen = pool.keepalives.get(name)
    go = pool.chunks[next(iter(pool.held[name, GO_INCARNATION].numbers))].owner
    if seen is not None:
        return writes.note_silence(pool.name, seen, go)
    return writes.mirror_keepalive(pool.name, go, ends.expire_at)


def overdue(seen: Keepalive, database_time: float) -> bool:
    """Whether MongoDB's TTL monitor should have deleted a silent Go pod's keepalive by now."""
    return _end(seen.expire_at) + TTL_MONITOR + TTL_LATE <= database_time


def _end(expire_at: Any) -> float:
    """When a keepalive ends, in seconds since the epoch; for what is no date, which MongoDB never deletes,
    the past."""
    stamp = getattr(expire_at, "timestamp", None)
    return float(stamp()) if callable(stamp) else float("-inf")
