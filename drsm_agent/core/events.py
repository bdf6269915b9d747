"""What happened to a pool, as the table sees it, and which neighbours go out as one event.

A version is `(clusterTime, part)`: it comes from the oplog, so events are the same whichever agent
publishes them. `prev` is the version of the pool's event before it; with it a consumer sees a gap.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from drsm_agent.core.documents import Owner

Version = tuple[int, int]

UP, DOWN = "pod.up", "pod.down"
ALLOCATED, CLAIMED, SCANNED, RELEASED = (
    "chunk.allocated",
    "chunk.claimed",
    "chunk.scanned",
    "chunk.released",
)


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a pool. Which fields count depends on `kind`; the wire messages say which."""

    pool: str
    kind: str
    version: Version
    prev: Version
    owner: Owner | None = None
    previous: Owner | None = None
    chunks: tuple[int, ...] = ()
    grants: tuple[str, ...] = field(default=())
    hold_ms: int = 0
    reason: str = ""
    token: str = ""

    def continued_by(self, later: "Event") -> bool:
        """Whether `later` says the same of another chunk, right after this event."""
        return bool(self.chunks) and (
            (self.pool, self.kind, self.owner, self.previous, self.hold_ms, self.version)
            == (later.pool, later.kind, later.owner, later.previous, later.hold_ms, later.prev)
        )


def coalesce(events: Iterable[Event], *, most: int) -> list[Event]:
    """Neighbouring chunk events that are equal in all but the chunk, as one of at most `most` chunks.

    A coalesced event has the last change's version and token, and the first's `prev`.
    """
    merged: list[list[Event]] = []
    for event in events:
        run = merged[-1] if merged else None
        if run and len(run) < most and run[-1].continued_by(event):
            run.append(event)
        else:
            merged.append([event])
    return [_joined(run) for run in merged]


def _joined(run: list[Event]) -> Event:
    if len(run) == 1:
        return run[0]
    return replace(
        run[-1],
        prev=run[0].prev,
        chunks=tuple(n for event in run for n in event.chunks),
        grants=tuple(grant for event in run for grant in event.grants),
    )
