"""What `pool.changes()` and `demux.events()` tell beside the wire's own events."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Item, merged

Ranges = tuple[tuple[Item, Item], ...]
"""Ids as (first, last) ranges, both included, ascending; so a million of them stay short."""


def ranges(ids: Iterable[int]) -> Ranges:
    """Distinct integers as ranges."""
    return tuple(merged((id_, id_) for id_ in ids))


def issued_ids(definition: Definition, ids: Sequence[Iterable[int]]) -> dict[str, Ranges]:
    """Distinct ordinals of each space of a pool as its ids, by the space's name."""
    return {
        part.name: tuple(span for run in ranges(own) for span in part.spans(*run))
        for part, own in zip(definition.parts, ids, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Gained:
    """Chunks are this pod's now. `marked`: claimed from another, nothing is issued from them for `hold`
    seconds and until the scan is done, but the sessions in them are this pod's to serve from now on."""

    pool: str
    chunks: tuple[int, ...]
    marked: bool = False
    hold: float = 0.0


@dataclass(frozen=True, slots=True)
class Scanned:
    """A claimed chunk's scan is done: `in_use` ids stay issued, `freed` ids can be issued."""

    pool: str
    chunk: int
    in_use: int
    freed: int


@dataclass(frozen=True, slots=True)
class ScanFailed:
    """A scan raised, timed out or returned nonsense; it is tried again; until then all ids stay in use."""

    pool: str
    chunk: int
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class GivenBack:
    """Empty chunks go back to the pool."""

    pool: str
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Chunks are no longer this pod's although its session lives; these ids were in use, by space."""

    pool: str
    chunks: tuple[int, ...]
    ids: Mapping[str, Ranges]

    @property
    def issued(self) -> Ranges:
        """Those of the only space, or the first."""
        return next(iter(self.ids.values()))


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The session is over, with all its `chunks`; these ids were in use, by space. `reason` as in the
    error."""

    pool: str
    reason: str
    chunks: tuple[int, ...]
    ids: Mapping[str, Ranges]

    @property
    def issued(self) -> Ranges:
        """Those of the only space, or the first."""
        return next(iter(self.ids.values()))


@dataclass(frozen=True, slots=True)
class SessionRenewed:
    """A new session is open after a lost one; `incarnation` is this pod's new one."""

    pool: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A demux took a new snapshot: events may have been missed before it; `owner` is right again."""

    pool: str
    version: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Missed:
    """The reader was too slow: `count` items before the next one were dropped, oldest first."""

    count: int


Change = Gained | Scanned | ScanFailed | GivenBack | Lost | SessionLost | SessionRenewed | Missed
