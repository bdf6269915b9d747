"""What an AMF keeps of its UEs, as far as the demonstration needs it: who uses which id.

A file that all pods share stands for the network function's own database. The scan asks it with one
range query; its primary key would refuse an id that two pods issued.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

BUSY_SECONDS = 10.0


class Contexts:
    """The ids in use. Opening it twice from several processes is what it is for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with closing(self._connect()) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE IF NOT EXISTS ue (id INTEGER PRIMARY KEY, pod TEXT NOT NULL)")

    def add(self, ids: Iterable[int], pod: str) -> None:
        """Raises sqlite3.IntegrityError if an id is in use already: two pods would have issued it."""
        with closing(self._connect()) as db, db:
            db.executemany("INSERT INTO ue (id, pod) VALUES (?, ?)", [(id_, pod) for id_ in ids])

    def remove(self, ids: Iterable[int]) -> None:
        with closing(self._connect()) as db, db:
            db.executemany("DELETE FROM ue WHERE id = ?", [(id_,) for id_ in ids])

    def in_use(self, first: int, last: int) -> list[int]:
        """The ids in use from `first` to `last`, both included: the application's part in a scan."""
        with closing(self._connect()) as db:
            rows = db.execute("SELECT id FROM ue WHERE id BETWEEN ? AND ? ORDER BY id", (first, last))
            return [row[0] for row in rows]

    def of(self, pod: str) -> list[int]:
        with closing(self._connect()) as db:
            return [row[0] for row in db.execute("SELECT id FROM ue WHERE pod = ? ORDER BY id", (pod,))]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_SECONDS)
