"""What the stand-in's agent keeps: chunks and pods of each pool, and sessions."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import OwnerRef, Use


@dataclass(slots=True)
class Row:
    """An owned chunk; marked if it has a hold."""

    owner: OwnerRef
    grant: str
    hold_ms: int | None = None
    request_id: str = ""


@dataclass(slots=True)
class Session:
    """One incarnation. `live` from its first request on; silent until `until`, it expires."""

    owner: OwnerRef
    pools: dict[str, None]
    until: float
    live: bool = False
    use: dict[str, Use] = field(default_factory=dict)


@dataclass(slots=True)
class Table:
    """One pool: its chunks, and the pods that are up. `following` is the first number never granted, `freed`
    what was given back, longest ago first."""

    definition: Definition
    capacity: int
    rows: dict[int, Row] = field(default_factory=dict)
    live: dict[OwnerRef, None] = field(default_factory=dict)
    version: int = 1
    following: int = 0
    freed: deque[int] = field(default_factory=deque)

    @property
    def name(self) -> str:
        return self.definition.name

    def owned(self, owner: OwnerRef) -> dict[int, Row]:
        return {n: row for n, row in self.rows.items() if row.owner == owner}

    def owners(self) -> list[OwnerRef]:
        """Who is up, then who is down and still owns a chunk."""
        return list(self.live | dict.fromkeys(row.owner for row in self.rows.values()))

    def state(self, owner: OwnerRef) -> str:
        return "live" if owner in self.live else "down"

    def match(self, owner: OwnerRef, pairs: Iterable[tuple[int, str]]) -> dict[int, Row]:
        """Of these (number, grant) those that `owner` has by just that grant."""
        rows = self.owned(owner)
        return {n: rows[n] for n, grant in pairs if n in rows and rows[n].grant == grant}

    def free(self, count: int) -> list[int]:
        """Up to `count` numbers to grant: never-used ones ascending, then the one free longest."""
        found: list[int] = []
        while len(found) < count and (self.following < self.capacity or self.freed):
            if self.following < self.capacity:
                n = self.following
                _, last = self._barren(n) or (n, n)
                self.following = last + 1
            else:
                n = self.freed.popleft()
            if n not in self.rows and self._barren(n) is None:
                found.append(n)
        return found

    def _barren(self, n: int) -> tuple[int, int] | None:
        """The run of chunks without a single id that the chunk lies in; it may be as long as the pool."""
        return next((run for run in self.definition.barren_chunks if run[0] <= n <= run[1]), None)

    def release(self, n: int) -> None:
        del self.rows[n]
        if n < self.following:
            self.freed.append(n)
