"""Every change of a pool's collection, as MongoDB tells it, whoever has made it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from tests.harness import POOL, SEEN_SECONDS, Domain, mongo_client

T = TypeVar("T")
RENEWAL_SECONDS = 5.0
"""From one keepalive of a Go pod to the next, and before its first one."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one document: `insert`, `update`, `replace` or `delete`. `fields` are all of a new one,
    and otherwise those that changed; `at` is the server's wall clock."""

    kind: str
    key: str
    fields: dict[str, Any]
    at: datetime

    @property
    def owner(self) -> str:
        """Who owns the chunk from here on; empty when that is not what changed."""
        return str(self.fields.get("podId", "")) if self.key.startswith("chunkid-") else ""

    @property
    def chunk(self) -> int:
        return int(self.key.removeprefix("chunkid-"))


@dataclass
class Record:
    """The changes so far, in their order."""

    changes: list[Change] = field(default_factory=list)
    over: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, key: str, *kinds: str) -> list[Change]:
        """What happened to a document."""
        return [
            change for change in self.changes if change.key == key and (not kinds or change.kind in kinds)
        ]

    def deletes(self, key: str) -> list[Change]:
        return self.of(key, "delete")

    def claims(self) -> dict[int, list[str]]:
        """The owners that each chunk has had after its first one, in their order."""
        owners: dict[int, list[str]] = {}
        for change in self.changes:
            if change.kind == "update" and change.owner:
                owners.setdefault(change.chunk, []).append(change.owner)
        return owners

    def renewals(self, name: str) -> list[Change]:
        """Signs of life of a Go pod: who moves the `expireAt` of its keepalive otherwise writes `drsm`
        too."""
        return [
            change
            for change in self.of(name, "insert", "update")
            if "expireAt" in change.fields and not any(key.startswith("drsm") for key in change.fields)
        ]

    def mirrors(self, name: str, incarnation: int | None) -> list[Change]:
        """When a keepalive became the mirror of this session; incarnation 0 stands for a silent Go pod."""
        return [
            change
            for change in self.of(name)
            if "podInstance" in change.fields
            and change.fields.get("drsm", {}).get("incarnation") == incarnation
        ]

    def before(self, one: Change, other: Change) -> bool:
        return self.changes.index(one) < self.changes.index(other)

    def grants(self, name: str) -> list[Change]:
        """Chunks that were free, and then a pod's."""
        return [change for change in self.changes if change.kind == "insert" and change.owner == name]

    async def seen(self, what: str, found: Callable[[], T], seconds: float = SEEN_SECONDS) -> T:
        """Wait until `found` says so, looking again at every change."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := found()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"expected within {seconds:g} s: {what}") from None
        return value

    async def renewed(self, name: str, times: int) -> None:
        """Wait for so many signs of life of a Go pod, 5 s from one to the next: meanwhile nothing shall
        happen."""
        so_far = len(self.renewals(name))
        seconds = RENEWAL_SECONDS * (times + 2)
        await self.seen(
            f"{times} keepalives of {name}", lambda: len(self.renewals(name)) >= so_far + times, seconds
        )

    async def keep(self, stream: Any) -> None:
        """Until it is over; not until it is cancelled, which the driver would not take well."""
        while not self.over:
            change = await stream.try_next()
            if change and change["operationType"] in {"insert", "update", "replace", "delete"}:
                self.changes.append(_read(change))
                self._news.set()


def _read(change: dict[str, Any]) -> Change:
    updated = change.get("updateDescription", {}).get("updatedFields", {})
    return Change(
        kind=change["operationType"],
        key=str(change["documentKey"]["_id"]),
        fields=change.get("fullDocument", updated),
        at=change["wallTime"],
    )


@asynccontextmanager
async def recording(domain: Domain, pool: str = POOL) -> AsyncIterator[Record]:
    """A record that begins now."""
    async with mongo_client(domain) as client:
        async with await client[domain.database][pool].watch(max_await_time_ms=100) as stream:
            record = Record()
            keeping = asyncio.create_task(record.keep(stream), name="record")
            try:
                yield record
            finally:
                record.over = True
                await keeping
