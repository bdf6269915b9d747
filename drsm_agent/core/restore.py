"""After an announced restore: who owns what, judged by what living pods say they hold.

The restored table is older than the pods. A chunk that it does not have, or that it gives to somebody
who is dead or does not hold it, goes back to the pod that reports it, under the pod's own grant. Where
two living pods report one chunk, nobody can know who is right: it stays with one of them, under a new
grant, marked and held, so that neither issues from it before the application was asked.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from drsm_agent.core.documents import GO_INCARNATION, Chunk, Document, Owner, Session
from drsm_agent.core.table import PoolTable
from drsm_agent.core.writes import SETTINGS, Insert, Update

Key = tuple[str, int]
TERMS_AHEAD = 2**20
"""How far the terms leap at a restore: more changes of leader than a backup can have missed."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The last announced restore. Sessions of terms up to `term` are from before it; while it is `open`,
    reports are taken. `incarnation` is the highest and `allocation_ms` the largest `A` that the restored
    database knew of; `unsettled` are the pools whose chunks nobody has put back: on its list, or reported."""

    term: int
    incarnation: int
    allocation_ms: int
    open: bool = True
    unsettled: tuple[str, ...] = ()

    @property
    def document(self) -> Document:
        return {
            "_id": "restored",
            "term": self.term,
            "incarnation": self.incarnation,
            "allocation_ms": self.allocation_ms,
            "open": self.open,
            "unsettled": list(self.unsettled),
        }

    def before(self, incarnation: int) -> bool:
        """Whether an incarnation is from before the restore."""
        return incarnation >> 32 <= self.term

    def resumed(self, term: int, pools: Collection[str]) -> "Restored | None":
        """The same restore anew, for all sessions of terms up to `term`, if a pool came back on the list of
        which nobody has put back the chunks; else None. No session was lost since."""
        if self.open or not set(self.unsettled) & set(pools):
            return None
        return replace(self, term=term, incarnation=(term + 1) << 32, open=True)

    def settled(self, pools: Collection[str], left_out: Collection[str]) -> "Restored":
        """The same once the chunks of `pools` are put back, and pods have reported some in `left_out`."""
        return replace(self, unsettled=tuple(sorted({*self.unsettled, *left_out} - set(pools))))

    def lost(self, incarnation: int) -> bool:
        """Whether an incarnation began in the time that was lost: one from before that the database does
        not know was dead and purged already."""
        return self.before(incarnation) and incarnation > self.incarnation

    def longest(self, allocation_ms: int, sessions: Iterable[Session]) -> int:
        """The largest `A` that a pod may count on, in milliseconds; `allocation_ms` is today's."""
        promised = max((session.promised_ms for session in sessions), default=0)
        return max(self.allocation_ms, allocation_ms, promised)


def read_restored(documents: Collection[Document]) -> Restored | None:
    """The last restore that the stored settings tell of."""
    for document in documents:
        if document["_id"] == "restored":
            return Restored(
                term=int(document["term"]),
                incarnation=int(document["incarnation"]),
                allocation_ms=int(document["allocation_ms"]),
                open=bool(document["open"]),
                unsettled=tuple(document.get("unsettled", ())),
            )
    return None


def announce(before: Restored | None, restored: Restored) -> Insert | Update:
    """The one write that announces a restore; guarded by the one that was announced before."""
    if before is None:
        return Insert(SETTINGS, restored.document)
    guard = {"_id": "restored", "term": before.term}
    return Update(SETTINGS, guard, set={k: v for k, v in restored.document.items() if k != "_id"})


def close(restored: Restored) -> Update:
    """Everybody has had the time to report, under one leader."""
    guard = {"_id": "restored", "term": restored.term}
    return Update(SETTINGS, guard, set={"open": False, "unsettled": list(restored.unsettled)})


# --- what living pods hold --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """A chunk in a pod's report."""

    grant: str
    marked: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A decision: chunk `n`, `seen` so in the table, becomes the owner's; `grant` empty: by a new one."""

    n: int
    seen: Chunk | None
    owner: Owner
    grant: str
    marked: bool


@dataclass(frozen=True, slots=True)
class Decided:
    """What is to be written, and which reported chunks (pod, number) their pods must let go of."""

    steps: list[Step]
    refused: set[tuple[Key, int]]


Reports = Mapping[Key, Mapping[int, Said]]
"""What was reported of one pool: by pod, by number."""


def decide(
    pool: PoolTable,
    reports: Reports,
    complete: AbstractSet[Key],
    undead: AbstractSet[Key],
    *,
    settled: AbstractSet[tuple[Key, int]] = frozenset(),
    last: bool = False,
) -> Decided:
    """What follows from the reports so far. `complete` are the pods that have reported all they hold, and
    `undead` the sessions that may still do; a chunk of one of these is not given to another: at the `last`
    time it keeps it, marked, and whoever reports it lets it go. `settled` reports were decided before."""
    steps: list[Step] = []
    refused: set[tuple[Key, int]] = set()
    for n, sayers in _by_number(pool, reports).items():
        if all((key, n) in settled for key in sayers):
            continue
        seen = pool.chunks.get(n)
        if seen is not None and seen.owner.key not in sayers and seen.owner.key in undead - complete:
            if last:
                refused |= {(key, n) for key in sayers}
                if seen.owner.incarnation != GO_INCARNATION:
                    steps.append(Step(n, seen, seen.owner, "", marked=True))
        elif len(sayers) > 1:
            refused |= {(key, n) for key in sayers}
            keeper = seen.owner.key if seen and seen.owner.key in sayers else min(sayers)
            steps.append(Step(n, seen, pool.live[keeper], "", marked=True))
        else:
            ((key, said),) = sayers.items()
            if seen is None or (seen.owner.key, seen.grant, seen.marked) != (key, said.grant, said.marked):
                steps.append(Step(n, seen, pool.live[key], said.grant, said.marked))
    return Decided(steps, refused)


def left_over(
    pool: PoolTable, reports: Reports, complete: AbstractSet[Key], ours: Mapping[int, str]
) -> Iterator[Step]:
    """Chunks that the table gives to a living pod which does not hold them: it gave them back in the time
    that was lost, and others may have issued from them since. It takes them up anew, held and scanned.
    `ours` are the grants that were given while reports were taken."""
    for key in sorted(complete):
        if key not in pool.live or key not in pool.held:
            continue
        said = reports.get(key, {})
        for n in pool.held[key].numbers:
            chunk = pool.chunks[n]
            if ours.get(n) != chunk.grant and (n not in said or said[n].grant != chunk.grant):
                yield Step(n, chunk, pool.live[key], "", marked=True)


def _by_number(pool: PoolTable, reports: Reports) -> dict[int, dict[Key, Said]]:
    """Of each chunk, which living pods report it."""
    numbers: dict[int, dict[Key, Said]] = {}
    for key, chunks in reports.items():
        if key in pool.live:
            for n, said in chunks.items():
                numbers.setdefault(n, {})[key] = said
    return numbers
