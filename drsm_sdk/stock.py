"""One pool's ids in this pod: which chunks it holds, and which of their ids are free, issued or resting.

Pure: no clock, no waiting; `now` is seconds of the pod's clock. Not for use from several threads.

A chunk is *open* when ids may be issued from it. A claimed chunk comes *marked* and closed: what its
former owners issued is not known. It opens when its scan is finished, and stays marked until the agent
has confirmed that. A chunk that goes back is *retired* first: from then on nothing is issued under its
grant, but it counts as held until the agent has answered.

Order of issue: from the fullest chunk first, so that sparse ones empty and can go back; within a chunk
fresh ids ascending, then released ones in the order of their release, none before its quarantine.
"""

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from drsm_sdk.errors import NotAllocated, NotOwner
from drsm_sdk.wire.checksum import MODULUS, holding
from drsm_sdk.wire.definition import Definition

SEEN_MAX = 10_000
"""Grants remembered so that none is taken up twice. A doubled or late message is at most some minutes
old, and a pod takes up far fewer chunks in that time."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One held chunk. `released` is None until a scan began; then the ids released since, in order."""

    n: int
    grant: str
    serial: int
    hold_until: float | None
    marked: bool
    open: bool
    empty_since: float
    free: deque[int]
    used: dict[int, float]  # id -> when it was issued; oldest first
    resting: int = 0
    released: dict[int, None] | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """How full a stock is: ids issued and free, the age of the longest issued one in seconds, chunks held,
    how many of them are closed (held back or being scanned), and ids in quarantine."""

    issued: int
    free: int
    oldest: float
    chunks: int
    closed: int
    resting: int


class Stock:
    """The chunks of one pool under one session.

    `free`   how many ids could be issued now
    """

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.free = 0
        self._opened = 0
        self._shift = definition.block_bits
        self._quarantine = definition.quarantine_ms / 1000
        self._chunks: dict[int, Chunk] = {}
        self._retired: set[tuple[int, str]] = set()
        self._seen: dict[tuple[int, str], None] = {}
        self._resting: deque[tuple[float, Chunk, int]] = deque()
        self._checksum = 0
        self._serial = 0
        # The chunk that is issued from, and all others with free ids: a heap by fullness. Those others can
        # only become less full, so a stale entry is one that claims too much, and is put right when it
        # comes to the top.
        self._current: Chunk | None = None
        self._others: list[tuple[int, int, Chunk]] = []

    # --- single ids -----------------------------------------------------------------------------

    def take(self, now: float) -> int | None:
        """Issue one id, or None when there is none."""
        if self._resting:
            self.thaw(now)
        chunk = self._current
        if chunk is None or not chunk.free:
            chunk = self._pick()
            if chunk is None:
                return None
        id_ = chunk.free.popleft()
        chunk.used[id_] = now
        self.free -= 1
        return id_

    def put_back(self, id_: int) -> None:
        """Undo the `take` that just returned `id_`: it was not handed out after all."""
        chunk = self._chunks[id_ >> self._shift]
        del chunk.used[id_]
        chunk.free.appendleft(id_)
        self.free += 1

    def release(self, id_: int, now: float) -> None:
        """Take `id_` back. Raises NotOwner or NotAllocated, and then nothing has changed.

        In a marked chunk: before its scan began nothing changes (the scan decides), after that the release
        wins over the scan's result.
        """
        chunk = self._chunks.get(id_ >> self._shift)
        if chunk is None:
            raise NotOwner(self.definition.name, id_)
        if not chunk.open:
            self._release_closed(chunk, id_)
            return
        try:
            del chunk.used[id_]
        except KeyError:
            raise self._not_issued(id_) from None
        if not chunk.used:
            chunk.empty_since = now
        if self._quarantine:
            self._rest(chunk, id_, now)
        else:
            self._make_free(chunk, id_)

    def issued(self, id_: int) -> bool:
        """Whether `id_` counts as issued by this pod; in a closed chunk every id does that is not known
        to be released."""
        chunk = self._chunks.get(id_ >> self._shift)
        if chunk is None:
            return False
        if chunk.open:
            return id_ in chunk.used
        return not self.definition.excluded(id_) and id_ not in (chunk.released or ())

    def grant(self, id_: int) -> str:
        """The grant of the chunk that `id_` lies in. Raises NotOwner."""
        chunk = self._chunks.get(id_ >> self._shift)
        if chunk is None or self.definition.excluded(id_):
            raise NotOwner(self.definition.name, id_)
        return chunk.grant

    def thaw(self, now: float) -> int:
        """Free the ids whose quarantine is over; returns how many."""
        resting, before = self._resting, self.free
        while resting and resting[0][0] <= now:
            _, chunk, id_ = resting.popleft()
            if self._chunks.get(chunk.n) is chunk:
                chunk.resting -= 1
                self._make_free(chunk, id_)
        return self.free - before

    # --- chunks ---------------------------------------------------------------------------------

    def __contains__(self, n: int) -> bool:
        return n in self._chunks

    def seen(self, n: int, grant: str) -> bool:
        """Whether this grant was taken up before."""
        return (n, grant) in self._seen

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())

    def get(self, n: int, grant: str) -> Chunk | None:
        """The chunk, if it is held by that grant."""
        chunk = self._chunks.get(n)
        return chunk if chunk is not None and chunk.grant == grant else None

    def add(self, n: int, grant: str, now: float, hold_until: float | None = None) -> Chunk | None:
        """Take up a chunk; marked when it comes with a hold. None, and nothing happens, when this grant
        was taken up before, or the chunk is held by another (drop that one first)."""
        if self.seen(n, grant) or n in self._chunks:
            return None
        self._remember(n, grant)
        self._serial += 1
        marked = hold_until is not None
        chunk = Chunk(n, grant, self._serial, hold_until, marked, not marked, now, deque(), {})
        self._chunks[n] = chunk
        self._count(chunk, +1)
        if chunk.open:
            self._open(chunk, self.definition.ids(n))
        return chunk

    def drop(self, n: int) -> list[int]:
        """Hold chunk `n` no longer; returns the ids that were issued from it."""
        chunk = self._chunks[n]
        self._count(chunk, -1)
        self._forget(chunk)
        return list(chunk.used)

    def begin_scan(self, n: int, grant: str) -> bool:
        """A scan of a closed chunk begins: from now on releases count. False if there is nothing to scan."""
        chunk = self.get(n, grant)
        if chunk is None or chunk.open:
            return False
        if chunk.released is None:
            chunk.released = {}
        return True

    def finish_scan(self, n: int, grant: str, in_use: Iterable[int], now: float) -> tuple[int, int] | None:
        """Open a closed chunk: `in_use` ids are issued, the rest is free; what was released meanwhile rests
        first, or comes last. Returns (issued, not issued); None if there was nothing to scan."""
        chunk = self.get(n, grant)
        if chunk is None or chunk.open:
            return None
        released = chunk.released or {}
        ids = self.definition.ids(n)
        used = set(in_use) - released.keys()
        chunk.used = {id_: now for id_ in ids if id_ in used}
        chunk.open, chunk.released, chunk.hold_until = True, None, None
        chunk.empty_since = now
        fresh = [id_ for id_ in ids if id_ not in used and id_ not in released]
        self._open(chunk, fresh if self._quarantine else [*fresh, *released])
        if self._quarantine:
            for id_ in released:
                self._rest(chunk, id_, now)
        return len(chunk.used), len(ids) - len(chunk.used)

    def unreported(self) -> list[Chunk]:
        """Chunks whose scan is finished but whose mark the agent has not cleared yet."""
        return [chunk for chunk in self._chunks.values() if chunk.open and chunk.marked]

    def set_mark(self, n: int, grant: str, *, marked: bool) -> None:
        """What the agent says of an open chunk's mark; of a closed one the scan decides."""
        chunk = self.get(n, grant)
        if chunk is not None and chunk.open and chunk.marked != marked:
            self._count(chunk, -1)
            chunk.marked = marked
            self._count(chunk, +1)

    # --- giving back ----------------------------------------------------------------------------

    def retire(self, now: float, *, idle: float, keep: int, most: int) -> list[int]:
        """Retire up to `most` chunks that nothing was issued from for `idle` seconds, as long as `keep` ids
        stay free. Returns their numbers; ask for them with `retired`, and repeat until answered."""
        chosen: list[int] = []
        for chunk in sorted(self._chunks.values(), key=lambda chunk: -chunk.serial):
            if len(chosen) == most:
                break
            if _empty(chunk) and chunk.empty_since + idle <= now and self.free - len(chunk.free) >= keep:
                self._forget(chunk)
                self._retired.add((chunk.n, chunk.grant))
                chosen.append(chunk.n)
        return chosen

    def retired(self) -> list[tuple[int, str]]:
        """(number, grant) of chunks that were retired and not answered yet."""
        return sorted(self._retired)

    def retire_again(self, n: int, grant: str) -> None:
        """A chunk that this pod has let go of, and that the agent still counts as its own: to be given back.
        Nothing happens for one that is held, or was never taken up."""
        if self.seen(n, grant) and self.get(n, grant) is None and (n, grant) not in self._retired:
            self._retired.add((n, grant))
            self._checksum += holding(n, grant, marked=False)

    def settle(self, n: int, grant: str) -> None:
        """The agent has taken a retired chunk back."""
        if (n, grant) in self._retired:
            self._retired.remove((n, grant))
            self._checksum -= holding(n, grant, marked=False)

    # --- summaries ------------------------------------------------------------------------------

    @property
    def drawn(self) -> int:
        """How many more ids were issued, ever, than became free again. (Counting them as they go would cost
        each id more than its deque does.)"""
        return self._opened - self.free

    def held(self) -> tuple[int, int]:
        """Count and checksum of the chunks held, as `session.renew` carries them."""
        return len(self._chunks) + len(self._retired), self._checksum % MODULUS

    def all_issued(self) -> list[int]:
        """Every id that is issued now."""
        return [id_ for chunk in self._chunks.values() for id_ in chunk.used]

    def level(self, now: float) -> Level:
        chunks: Collection[Chunk] = self._chunks.values()
        first = min((next(iter(chunk.used.values())) for chunk in chunks if chunk.used), default=now)
        return Level(
            issued=sum(len(chunk.used) for chunk in chunks),
            free=self.free,
            oldest=now - first,
            chunks=len(chunks),
            closed=sum(not chunk.open for chunk in chunks),
            resting=sum(chunk.resting for chunk in chunks),
        )

    # --- inside ---------------------------------------------------------------------------------

    def _pick(self) -> Chunk | None:
        """Make the fullest chunk with free ids the current one."""
        others = self._others
        while others:
            claimed, serial, chunk = others[0]
            if claimed == -len(chunk.used):
                heapq.heappop(others)
                self._current = chunk
                return chunk
            heapq.heapreplace(others, (-len(chunk.used), serial, chunk))
        return None

    def _offer(self, chunk: Chunk) -> None:
        if chunk is not self._current:
            heapq.heappush(self._others, (-len(chunk.used), chunk.serial, chunk))

    def _open(self, chunk: Chunk, ids: Iterable[int]) -> None:
        chunk.free = deque(ids)
        self.free += len(chunk.free)
        self._opened += len(chunk.free)
        if chunk.free:
            self._offer(chunk)

    def _make_free(self, chunk: Chunk, id_: int) -> None:
        if not chunk.free:
            self._offer(chunk)
        chunk.free.append(id_)
        self.free += 1

    def _rest(self, chunk: Chunk, id_: int, now: float) -> None:
        chunk.resting += 1
        self._resting.append((now + self._quarantine, chunk, id_))

    def _release_closed(self, chunk: Chunk, id_: int) -> None:
        if self.definition.excluded(id_):
            raise NotOwner(self.definition.name, id_)
        if chunk.released is None:
            return
        if id_ in chunk.released:
            raise NotAllocated(self.definition.name, id_)
        chunk.released[id_] = None

    def _not_issued(self, id_: int) -> Exception:
        excluded = self.definition.excluded(id_)
        return (NotOwner if excluded else NotAllocated)(self.definition.name, id_)

    def _count(self, chunk: Chunk, sign: int) -> None:
        self._checksum += sign * holding(chunk.n, chunk.grant, marked=chunk.marked)

    def _remember(self, n: int, grant: str) -> None:
        self._seen[n, grant] = None
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]

    def _forget(self, chunk: Chunk) -> None:
        """Nothing is issued from `chunk` any more."""
        del self._chunks[chunk.n]
        self.free -= len(chunk.free)
        self._opened -= len(chunk.free)
        if chunk is self._current:
            self._current = None
        else:
            self._others = [entry for entry in self._others if entry[2] is not chunk]
            heapq.heapify(self._others)


def _empty(chunk: Chunk) -> bool:
    return chunk.open and not chunk.marked and not chunk.used and not chunk.resting
