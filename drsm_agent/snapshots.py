"""A pool's table as the pages of a snapshot: all of one version, each small enough for one message."""

from collections.abc import Iterator

from drsm_agent.core.documents import Owner
from drsm_agent.core.table import PoolTable
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition

PAGE_SHARE_OF_PAYLOAD = 0.5
"""Half of what the server takes: the estimate below leaves out map keys and headers."""
OWNER_BYTES = 96
"""What an owner takes on a page beside its texts."""
CHUNK_BYTES = 18
"""A chunk number at most, twice: a marked one stands on the page twice."""

Row = tuple[Owner, list[int]]


def snapshot_pages(pool: PoolTable, definition: Definition, max_payload: int) -> list[m.SnapshotPage]:
    """Pages 0.. of `pool` as it stands, for messages of at most `max_payload` bytes."""
    pages = list(_cut(pool, int(max_payload * PAGE_SHARE_OF_PAYLOAD)))
    return [
        m.SnapshotPage(
            version=pool.version,
            page=number,
            owners=tuple(snapshot_owner(pool, owner) for owner, _ in rows),
            chunks=tuple((i, tuple(numbers)) for i, (_, numbers) in enumerate(rows) if numbers),
            marked=tuple(n for _, numbers in rows for n in numbers if n in pool.marked),
            definition=definition if number == 0 else None,
            last=number == len(pages) - 1,
        )
        for number, rows in enumerate(pages)
    ]


def snapshot_owner(pool: PoolTable, owner: Owner) -> m.SnapshotOwner:
    return m.SnapshotOwner(owner.name, owner.ip, owner.instance, owner.incarnation, owner_state(pool, owner))


def owner_state(pool: PoolTable, owner: Owner) -> str:
    """`live`, or `down` while the owner's chunks are about to move."""
    return "live" if owner.key in pool.live else "down"


def _cut(pool: PoolTable, room: int) -> Iterator[list[Row]]:
    """Owners with their chunks, cut where a page is full; always at least one page."""
    page: list[Row] = []
    left = room
    for owner in pool.owners().values():
        head = OWNER_BYTES + len(owner.name) + len(owner.ip.encode()) + len(owner.instance.encode())
        for numbers in _fitting(pool, owner, (room - head) // CHUNK_BYTES):
            size = head + CHUNK_BYTES * len(numbers)
            if page and size > left:
                yield page
                page, left = [], room
            page.append((owner, numbers))
            left -= size
    yield page


def _fitting(pool: PoolTable, owner: Owner, most: int) -> Iterator[list[int]]:
    """An owner's chunk numbers in runs of at most `most`; one empty run if it owns none."""
    held = pool.held.get(owner.key)
    numbers = list(held.numbers) if held else []
    step = max(1, most)
    for start in range(0, max(1, len(numbers)), step):
        yield numbers[start : start + step]
