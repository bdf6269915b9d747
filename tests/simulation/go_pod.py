"""The twin of a Go DRSM pod, `github.com/omec-project/util/drsm` v1.8.4, as its source has it.

It has no lease: it goes on issuing whatever happens, and nobody can tell it to stop. Its keepalive is a find
and then an insert or a `$set` of its own fields, each `RENEWAL` seconds, the first after so many; the end
that it writes is by its own wall clock. It learns of others by a change stream that it sees live only, and by
reading all chunks each `POLL` seconds. It claims when it sees the keepalive of a pod that it has ever heard
of deleted, its own included, by `_id` and `podId` alone, all that it believes of that pod at once. It forgets
no number.

What the twin leaves out: the original's unlocked maps, and its stream's one attempt to go on after a network
error. It keeps that an update without an answer ends the process (the driver's result is nil then).
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from drsm_agent import feed, go_pods, mirrors, reaper
from drsm_agent.core import keepalives
from drsm_agent.core.documents import Document, chunk_key, chunk_number
from drsm_agent.core.table import Change
from drsm_agent.core.writes import Delete, Insert, Update
from drsm_agent.errors import StoreUnavailable
from tests.simulation.database import Database, Hand
from tests.simulation.loop import Node
from tests.simulation.pools import POOL

SCALE = 4
"""A storm has tens of seconds, so both sides' times are so many times shorter than in production."""
RENEWAL, TTL, POLL, SCAN = 5 / SCALE, 20 / SCALE, 3 / SCALE, 5 / SCALE
REWATCH = 5 / SCALE
PATIENCE = 30 / SCALE
"""Seconds until the driver gives up an operation for which there is no primary."""
SCALED: tuple[tuple[ModuleType, str, float], ...] = (
    (keepalives, "GO_SILENCE", keepalives.GO_SILENCE / SCALE),
    (keepalives, "TTL_MONITOR", keepalives.TTL_MONITOR / SCALE),
    (keepalives, "TTL_LATE", keepalives.TTL_LATE / SCALE),
    (go_pods, "SETTLES", go_pods.SETTLES / SCALE),
    (mirrors, "SETTLES", mirrors.SETTLES / SCALE),
    (mirrors, "CHECK_INTERVAL", mirrors.CHECK_INTERVAL / SCALE),
    (mirrors, "SHOWN_AGAIN", mirrors.SHOWN_AGAIN / SCALE),
    (feed, "STILL_AFTER", feed.STILL_AFTER / SCALE),
    (reaper, "AUDIT_INTERVAL", reaper.AUDIT_INTERVAL / SCALE),
)
"""What the agent counts in such times: the module, the name and the seconds."""


@dataclass(eq=False, slots=True)
class GoChunk:
    """A chunk that a Go pod issues from. Ids are taken from the end, and come back to it."""

    free: list[int]


@dataclass(eq=False, slots=True)
class Known:
    """A pod that it has heard of, and the chunks that it believes to be that pod's: it adds, and never takes
    any away."""

    chunks: set[int] = field(default_factory=set)


class GoPod:
    """One process. `signed` hears each sign of life as it takes effect, `in_use` is the application's
    callback (None: it has none, as AMF and SMF), `crashed` is called when it ends by its own fault."""

    def __init__(
        self,
        database: Database,
        node: Node,
        chance: random.Random,
        who: tuple[str, str, str],
        *,
        capacity: int,
        slots: int,
        wrong: float,
        in_use: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.database, self.node, self.chance = database, node, chance
        self.name, self.ip, self.instance = who
        self.cut = False
        self.hung = False
        """It knows all numbers, and looks for another for ever, while nobody else in it may allocate."""
        self.signed: Callable[[], None] = lambda: None
        self.crashed: Callable[[], None] = lambda: None
        self.run: Callable[[Coroutine[Any, Any, None]], object] = node.start
        """What starts a task in the process; whoever looks on replaces it, to hear what ends one."""
        self.local: dict[int, GoChunk] = {}
        self.known: set[int] = set()
        self._capacity, self._slots, self._wrong, self._in_use = capacity, slots, wrong, in_use
        self._pods: dict[str, Known] = {}
        self._downs: asyncio.Queue[tuple[str, Change]] = asyncio.Queue()
        self._cuts = 0
        self._mutex = asyncio.Lock()

    def start(self) -> None:
        for work in (self._follow(), self._punch(), self._poll(), self._pod_down()):
            self.run(work)

    def cut_off(self) -> None:
        """From the database: its stream ends, and begins anew later, without what it has missed."""
        self.cut = True
        self._cuts += 1

    def mend(self) -> None:
        self.cut = False

    # --- What the application calls ------------------------------------------------------------------

    async def allocate(self) -> tuple[int, int]:
        """A chunk and a slot of it."""
        async with self._mutex:
            if with_free := [n for n, chunk in self.local.items() if chunk.free]:
                n = self.chance.choice(with_free)
            else:
                n = await self._new_chunk()
            return n, self.local[n].free.pop()

    def release(self, n: int, slot: int) -> None:
        if (chunk := self.local.get(n)) and slot not in chunk.free:
            chunk.free.append(slot)

    async def delete_pod(self, instance: str) -> None:
        """`DeletePod`: all keepalives of an instance, which the NRF says is down."""
        await self._way()
        for document in self.database.documents(POOL):
            if document.get("type") == "keepalive" and document.get("podInstance") == instance:
                self.database.write_now(Delete(POOL, {"_id": document["_id"]}), self._hand())

    async def _new_chunk(self) -> int:
        while True:
            if not (unknown := [n for n in range(self._capacity) if n not in self.known]):
                self.hung = True
                await asyncio.Event().wait()
            n = self.chance.choice(unknown)
            document = {"_id": chunk_key(n), "type": "chunk", "chunkId": chunk_key(n)} | self._who()
            try:
                await self._way()
            except StoreUnavailable:
                continue
            if self.database.write_now(Insert(POOL, document), self._hand()):
                self.signed()
                self.local[n] = GoChunk(list(range(self._slots)))
                return n

    # --- Keepalive -----------------------------------------------------------------------------------

    async def _punch(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL)
            try:
                await self._way()
                there = self.database.document(POOL, self.name) is not None
                await self._way()
            except StoreUnavailable:
                continue
            ends = datetime.fromtimestamp(self.database.seconds + self._wrong + TTL, UTC)
            fields = {"type": "keepalive", "expireAt": ends} | self._who()
            write = (
                Update(POOL, {"_id": self.name}, set=fields)
                if there
                else Insert(POOL, {"_id": self.name} | fields)
            )
            if self.database.write_now(write, self._hand()):
                self.signed()

    # --- The change stream and the poll --------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            cuts = self._cuts
            stream = self.database.changes(after=self.database.end)
            try:
                async for batch in stream:
                    if batch.changes:
                        await asyncio.sleep(self.database.delay())
                        await self.database.available.wait()
                    if self._cuts != cuts:
                        break
                    for one in batch.changes:
                        if one.space == POOL:
                            self._take(one)
            finally:
                await stream.aclose()
            while self.cut:
                await asyncio.sleep(REWATCH)

    def _take(self, one: Change) -> None:
        n, document = chunk_number(one.key), one.document
        if one.gone:
            if n is None and one.key in self._pods:
                self._downs.put_nowait((one.key, one))
        elif document is not None and document["type"] == "keepalive":
            self._pods.setdefault(document["podId"], Known())
        elif document is not None:
            self._add(document)
        elif n in self.known and (owner := (one.updated or {}).get("podId")) in self._pods:
            self._pods[owner].chunks.add(n)

    def _add(self, document: Document) -> None:
        n = chunk_number(document["_id"])
        assert n is not None
        self._pods.setdefault(document["podId"], Known()).chunks.add(n)
        self.known.add(n)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            try:
                await self._way()
            except StoreUnavailable:
                continue
            for document in self.database.documents(POOL):
                if document.get("type") == "chunk":
                    self._add(document)

    # --- Claims --------------------------------------------------------------------------------------

    async def _pod_down(self) -> None:
        while True:
            name, cause = await self._downs.get()
            for n in sorted(self._pods[name].chunks & self.known):
                self.run(self._claim(n, name, cause))

    async def _claim(self, n: int, former: str, cause: Change) -> None:
        try:
            await self._way()
        except StoreUnavailable:
            self.crashed()  # the driver gives no result, which nobody looks at before it is used
            return
        where = {"_id": chunk_key(n), "podId": former}
        document = self.database.document(POOL, chunk_key(n))
        if document is None or document["podId"] != former:
            return
        fields = {"type": "chunk"} | self._who()
        if self.database.write_now(Update(POOL, where, set=fields), self._hand(cause)):
            self.signed()
        if self._in_use is not None:
            self.run(self._scan(n, self._in_use))

    async def _scan(self, n: int, in_use: Callable[[int, int], bool]) -> None:
        """One id at a time; it issues from the chunk once it has asked for all."""
        free = []
        for slot in reversed(range(self._slots)):
            await asyncio.sleep(SCAN)
            if not in_use(n, slot):
                free.append(slot)
        self.local[n] = GoChunk(free)

    # --- The database --------------------------------------------------------------------------------

    def _who(self) -> dict[str, Any]:
        return {"podId": self.name, "podIp": self.ip, "podInstance": self.instance}

    def _hand(self, cause: Change | None = None) -> Hand:
        return Hand(self.name, self.node.now(), cause)

    async def _way(self) -> None:
        """To the primary, as soon as there is one. Raises StoreUnavailable."""
        await asyncio.sleep(self.database.delay())
        deadline = self.node.now() + PATIENCE
        while self.cut or not self.database.available.is_set():
            if self.node.now() >= deadline:
                raise StoreUnavailable("there was no primary")
            await asyncio.sleep(0.1)
