"""A pool's snapshot, put together from its pages. Pure.

Pages of different agents, or of different versions of one agent, never mix: around a change of leader
two may answer one request. A snapshot is complete with pages 0..k, k being the one marked last.
"""

from dataclasses import dataclass, field

from drsm_sdk.pods import Owner, PodState
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.definition import Definition

STATES: dict[str, PodState] = {"live": "live", "unknown": "unknown"}
"""Whatever else an agent says, such a pod is not to be relied on."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The table of a pool at `version`: its owners, which chunks belong to which, and which are marked."""

    version: wire.Version
    history: str
    term: int
    definition: Definition
    owners: tuple[Owner, ...]
    chunks: tuple[tuple[tuple[str, int], tuple[int, ...]], ...]
    marked: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Group:
    pages: dict[int, wire.SnapshotPage] = field(default_factory=dict)
    last: int | None = None


class Pages:
    """Collects the pages that come in answer to one request."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, wire.Version], _Group] = {}

    def add(self, stamp: wire.Stamp, page: wire.SnapshotPage) -> Snapshot | None:
        """Take in one page; the snapshot, when it completes one."""
        group = self._groups.setdefault((stamp.agent, stamp.history, page.version), _Group())
        group.pages[page.page] = page
        if page.last:
            group.last = page.page
        if group.last is None or any(i not in group.pages for i in range(group.last + 1)):
            return None
        return _assembled(stamp, [group.pages[i] for i in range(group.last + 1)])


def _assembled(stamp: wire.Stamp, pages: list[wire.SnapshotPage]) -> Snapshot | None:
    definition = pages[0].definition
    if definition is None:
        return None
    owners: dict[tuple[str, int], Owner] = {}
    chunks: list[tuple[tuple[str, int], tuple[int, ...]]] = []
    for page in pages:
        here = [Owner.of(owner.ref, STATES.get(owner.state, "down")) for owner in page.owners]
        owners |= {owner.key: owner for owner in here}
        for index, numbers in page.chunks:
            if index >= len(here):
                return None
            chunks.append((here[index].key, numbers))
    return Snapshot(
        pages[0].version,
        stamp.history,
        stamp.term,
        definition,
        tuple(owners.values()),
        tuple(chunks),
        frozenset(n for page in pages for n in page.marked),
    )
