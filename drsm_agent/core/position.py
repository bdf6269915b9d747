"""Where the change stream goes on, and the last events that were published up to there."""

from collections.abc import Collection
from dataclasses import dataclass

from drsm_agent.core.documents import Document
from drsm_agent.core.events import Version
from drsm_agent.core.table import Table


@dataclass(frozen=True, slots=True)
class Position:
    """A point between two clusterTimes: the stream resumes right after it. `at` is the clusterTime of the
    last change before it, `versions` are those of the pools' last events."""

    token: str
    at: int
    versions: dict[str, Version]

    def document(self, history: str) -> Document:
        """As it is stored, with the history that its versions belong to. Cluster times are text: BSON's
        integers are signed, and seconds << 32 outgrows them in 2038."""
        return {
            "token": self.token,
            "at": str(self.at),
            "history": history,
            "versions": {pool: [str(at), part] for pool, (at, part) in self.versions.items()},
        }


@dataclass(frozen=True, slots=True)
class Published:
    """What a stored position says: in `history`, everything up to cluster time `at` was published."""

    history: str
    at: int
    versions: dict[str, Version]

    def is_continued_by(self, table: Table) -> bool:
        """Whether all that came after it is in the log of a table that began before it."""
        return self.at >= table.started

    def versions_of(self, table: Table) -> dict[str, Version]:
        """Each pool's last event; a pool that it does not know was never published."""
        return {pool: self.versions.get(pool, (0, 0)) for pool in table.pools}


def read_published(documents: Collection[Document]) -> Published | None:
    """None before any leader has begun a history."""
    for document in documents:
        if document.get("history"):
            stored = document.get("versions", {})
            versions = {pool: (int(at), int(part)) for pool, (at, part) in stored.items()}
            return Published(document["history"], int(document["at"]), versions)
    return None
