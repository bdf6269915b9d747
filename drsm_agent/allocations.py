"""Requests about chunks: acquire, release, scanned. Each is one guarded write for each chunk.

Handlers look at the table, never at MongoDB; what they write comes back through the change stream, is
published, and only then answered (G4). Requests of one moment share one bulk write (`Flight`).
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from drsm_agent.core import writes
from drsm_agent.core.documents import GO_INCARNATION, Chunk, Owner, chunk_key
from drsm_agent.core.events import RELEASED
from drsm_agent.core.numbers import FreeNumbers, beside_go, go_knows
from drsm_agent.core.session import Key
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import Refused, StoreUnavailable
from drsm_agent.feed import Entry
from drsm_agent.flight import Flight
from drsm_agent.go_pods import go_knows_too_many
from drsm_agent.mirrors import Mirrors
from drsm_agent.reign import Reign
from drsm_agent.restorer import Restorer
from drsm_agent.sessions import Sessions
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition

FORMER_MIN, FORMER_SHARE = 2, 0.1
"""A pod with more chunks of its former lives on hold, and more than such a share of the pool, gets none."""
ALLOCATION_ROUNDS_MAX = 8
"""Times that other allocators may pick the same numbers first before a requester is told to try again."""
CHUNKS_PER_FLIGHT_MAX = 10_000
"""Inserts of one bulk: 0.2 s on a small replica set. When more are asked for at once, all get fewer."""


log = structlog.get_logger("drsm_agent.allocations")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request for chunks, aboard a flight."""

    owner: Owner
    count: int
    request_id: str


class Allocations:
    """Gives chunks to the sessions of one lead, and takes them back."""

    def __init__(
        self,
        reign: Reign,
        restorer: Restorer,
        sessions: Sessions,
        mirrors: Mirrors,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._table, self._relay, self._definitions = reign.table, reign.relay, reign.definitions
        self._chance, self._metrics = reign.chance, reign.metrics
        self._grants, self._restorer, self._sessions = reign.grants, restorer, sessions
        self._mirrors, self._go_pods = mirrors, mirrors.go_pods
        self._free = {
            name: _free_numbers(reign.definitions[name], pool) for name, pool in reign.table.pools.items()
        }
        leases, lag_ms = reign.leases, max(pool.usage_lag_ms for pool in reign.definitions.values())
        self._longest_ms = round((leases.liveness + leases.allocation) * 1000) + lag_ms
        """Until a chunk that a dead pod has just left can be scanned, as a rule."""
        self._looping: set[tuple[str, str]] = set()
        """Pods of which it was said that they end again and again."""
        self._odd: dict[str, set[int]] = {name: set() for name in reign.table.pools}
        """Numbers whose documents are there and cannot be read: of no use to anybody."""
        self._acquires = {name: Flight(tasks, partial(self._acquire_all, name)) for name in reign.table.pools}
        self._releases = {name: Flight(tasks, partial(self._release_all, name)) for name in reign.table.pools}
        self._scans = {name: Flight(tasks, partial(self._scanned_all, name)) for name in reign.table.pools}

    def note(self, entry: Entry) -> None:
        """Chunk numbers that became free are granted again, last."""
        for event in entry.events:
            if event.kind == RELEASED:
                for n in event.chunks:
                    self._free[event.pool].freed(n)

    # --- Requests ----------------------------------------------------------------------------------

    async def acquire(self, pool: PoolTable, request: m.Acquire) -> m.Acquired:
        session = await self._sessions.member(pool, request.pod, request.incarnation)
        if not self._grants.allowed():
            message = "the database lost documents: nothing is granted while their chunks may be in use"
            raise Refused("store_unavailable", message, reason="data_lost", retry=True)
        wanted = _Wanted(session.owner, request.count, request.request_id)
        granted = self._granted(pool, wanted)
        if not granted:
            granted = await self._acquires[pool.name].board((session.key, request.request_id), wanted)
        version = pool.version
        await self._relay.caught_up()  # what the table showed just now, consumers have then heard (G4)
        self._sessions.session(request.pod, request.incarnation)
        return m.Acquired(
            chunks=tuple((chunk.n, chunk.grant) for chunk in granted),
            version=version,
            revision=self._definitions[pool.name].revision,
        )

    async def release(self, pool: PoolTable, request: m.ChunkList) -> m.Released:
        session = await self._sessions.member(pool, request.pod, request.incarnation)
        self._restorer.check_reported(session)
        owned = self._owned(pool, session.key, request.chunks)
        if owned := [chunk for chunk in owned if not (chunk.marked or self._go_pods.may_live(pool, chunk))]:
            await self._releases[pool.name].board((session.key, request.chunks), owned)
        still = {chunk.n for chunk in self._owned(pool, session.key, request.chunks)}
        return m.Released(tuple(n for n, _ in request.chunks if n not in still))

    async def scanned(self, pool: PoolTable, request: m.ChunkList) -> m.Cleared:
        session = await self._sessions.member(pool, request.pod, request.incarnation)
        owned = self._owned(pool, session.key, request.chunks)
        if marked := [chunk for chunk in owned if chunk.marked]:
            await self._scans[pool.name].board((session.key, request.chunks), marked)
        owned = self._owned(pool, session.key, request.chunks)
        return m.Cleared(tuple(chunk.n for chunk in owned if not chunk.marked))

    # --- Flights: one bulk write for all that wait -------------------------------------------------

    async def _acquire_all(self, pool: str, wanted: Sequence[_Wanted]) -> Sequence[list[Chunk] | Exception]:
        """Insert chunks for all; numbers that another allocator took first are replaced by others."""
        await self._relay.read_back()
        table = self._table.pools[pool]
        await self._mirrors.ensure(table, {want.owner for want in wanted})
        left = _left_by_the_dead(table)
        refusals = [self._refusal(table, want.owner, left[want.owner.name]) for want in wanted]
        share = max(1, CHUNKS_PER_FLIGHT_MAX // len(wanted))
        missing = [
            0 if refusal or self._granted(table, want) else min(want.count, share)
            for want, refusal in zip(wanted, refusals, strict=True)
        ]
        exhausted = False
        for _ in range(ALLOCATION_ROUNDS_MAX):
            numbers = self._numbers(table, sum(missing))
            exhausted = len(numbers) < sum(missing)
            inserts, takers = self._inserts(pool, wanted, missing, numbers)
            if not inserts:
                break
            outcome = await self._insert(pool, inserts, numbers)
            for i, taker in enumerate(takers):
                missing[taker] -= i not in outcome.refused
            if not outcome.refused:
                break
            self._odd[pool] |= {
                n for i, n in enumerate(numbers) if i in outcome.refused
            } - table.chunks.keys()
            self._metrics.conflicts.inc(len(outcome.refused))
        return [
            self._granted(table, want) or refusal or self._none(exhausted, table)
            for want, refusal in zip(wanted, refusals, strict=True)
        ]

    def _numbers(self, pool: PoolTable, count: int) -> list[int]:
        """Up to so many free chunk numbers, in the order in which they are granted."""
        if not pool.has_go:
            return self._free[pool.name].take(count, pool.chunks)
        capacity = self._definitions[pool.name].capacity
        barren, odd = self._definitions[pool.name].barren_chunks, self._odd[pool.name]

        def unusable(n: int) -> bool:
            return n in odd or any(first <= n <= last for first, last in barren)

        return beside_go(count, capacity, pool.chunks, pool.known_free, unusable)

    def _inserts(
        self, pool: str, wanted: Sequence[_Wanted], missing: Sequence[int], numbers: Sequence[int]
    ) -> tuple[list[writes.Insert], list[int]]:
        """One insert per number, with the index of the request that gets it; everyone gets one first.

        In the order of the requests: neighbours of one owner then go out as one event."""
        turns = sorted((turn, i) for i, count in enumerate(missing) for turn in range(count))
        takers = sorted(i for _, i in turns[: len(numbers)])
        inserts = [
            writes.allocate(pool, n, wanted[i].owner, self._chance.token(), wanted[i].request_id)
            for n, i in zip(numbers, takers, strict=False)
        ]
        return inserts, takers

    async def _insert(
        self, pool: str, inserts: Sequence[writes.Insert], numbers: Sequence[int]
    ) -> writes.Outcome:
        chunks = self._table.pools[pool].chunks
        keys = {insert.document["_id"]: insert.document["drsm"]["grant"] for insert in inserts}

        def shown() -> bool:
            return all((chunk := chunks.get(n)) and chunk.grant == keys[chunk_key(n)] for n in numbers)

        try:
            return await self._relay.commit(inserts, shown)
        except Exception:
            for n in numbers:  # if some were written after all, `take` skips them
                self._free[pool].freed(n)
            raise

    async def _release_all(self, pool: str, lists: Sequence[list[Chunk]]) -> Sequence[Exception | None]:
        await self._relay.commit([writes.release(pool, chunk) for chunks in lists for chunk in chunks])
        return [None] * len(lists)

    async def _scanned_all(self, pool: str, lists: Sequence[list[Chunk]]) -> Sequence[Exception | None]:
        await self._relay.commit([writes.clear_mark(pool, chunk) for chunks in lists for chunk in chunks])
        return [None] * len(lists)

    # --- Looking at the table ----------------------------------------------------------------------

    def _granted(self, pool: PoolTable, wanted: _Wanted) -> list[Chunk]:
        """What this request got already. More than it asked for only if a write thought lost came late;
        the pod hears of the rest when checksums differ."""
        numbers = pool.requests.get(wanted.request_id, ())
        chunks = [chunk for n in numbers if (chunk := pool.chunks[n]).owner == wanted.owner]
        return chunks[: wanted.count]

    def _refusal(self, pool: PoolTable, owner: Owner, unclaimed: int) -> Refused | None:
        """Why a pod gets no fresh chunk at this moment; None if it may. `unclaimed` are its former lives'."""
        if not self._mirrors.may_receive(pool, owner):
            return self._mirrors.refusal(pool, owner)
        return self._loops(pool, owner, unclaimed)

    def _loops(self, pool: PoolTable, owner: Owner, unclaimed: int) -> Refused | None:
        """A pod that dies again and again leaves a chunk on hold each time, and would have the whole pool."""
        held = pool.held.get(owner.key)
        owned = (pool.chunks[n] for n in held.numbers if n in pool.marked) if held else ()
        former = [chunk.hold_ms for chunk in owned if chunk.drsm and chunk.drsm.returned]
        former += [self._longest_ms] * unclaimed  # not claimed before it is certain that nobody renews
        most = max(FORMER_MIN, int(self._definitions[pool.name].usable * FORMER_SHARE))
        if len(former) <= most:
            self._looping.discard((pool.name, owner.name))
            return None
        if (pool.name, owner.name) not in self._looping:
            self._looping.add((pool.name, owner.name))
            log.error(
                "pod_crash_loops",
                pool=pool.name,
                pod=owner.name,
                chunks=len(former),
                action="this pod ended again and again; it gets no fresh chunk before its former lives' "
                "chunks were on hold and scanned: look why it ends",
            )
        wait_ms = min(former)
        message = (
            f"pod {owner.name} has {len(former)} chunks of its former lives on hold, more than {most}; it "
            f"gets a fresh one once such a chunk was scanned, in at most {wait_ms / 1000:.0f} s"
        )
        return Refused("pool_exhausted", message, reason="former_lives", wait_ms=wait_ms)

    def _none(self, exhausted: bool, pool: PoolTable) -> Exception:
        if not exhausted:
            return StoreUnavailable("other allocators took every number that was tried")
        usable = self._definitions[pool.name].usable
        level = f"{len(pool.chunks)} of {usable} owned, {len(pool.marked)} of them not scanned yet"
        if go_knows_too_many(pool, self._definitions[pool.name].capacity):
            known = go_knows(self._definitions[pool.name].capacity, pool.chunks, pool.known_free)
            level += f"; the Go pods know {known} numbers, and never used ones are kept for them"
        return Refused("pool_exhausted", f"not one chunk of pool {pool.name} is free: {level}", retry=False)

    def _owned(self, pool: PoolTable, key: Key, listed: Sequence[tuple[int, str]]) -> list[Chunk]:
        """Of the listed chunks those that the session owns by just that grant."""
        return [
            chunk
            for n, grant in dict.fromkeys(listed)
            if (chunk := pool.chunks.get(n)) and chunk.grant == grant and chunk.owner.key == key
        ]


def _left_by_the_dead(pool: PoolTable) -> Counter[str]:
    """How many chunks nobody has claimed yet, by the names of the dead SDK pods that had them."""
    left: Counter[str] = Counter()
    for (name, incarnation), held in pool.held.items():
        if incarnation != GO_INCARNATION and (name, incarnation) not in pool.live:
            left[name] += len(held.numbers)
    return left


def _free_numbers(definition: Definition, pool: PoolTable) -> FreeNumbers:
    capacity = definition.capacity
    ours = (n for n, chunk in pool.chunks.items() if chunk.drsm and n < capacity)
    return FreeNumbers(capacity, max(ours, default=-1), definition.barren_chunks)
