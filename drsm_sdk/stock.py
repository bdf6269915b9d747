"""One pool's ids in this pod: which chunks it holds, and which of their ids are free, issued or resting.

Pure: no clock, no waiting; `now` is seconds of the pod's clock. Not for use from several threads. Ids are
ordinals in here (`wire.space`), the same of each space of the pool.

A chunk is *open* when ids may be issued from it. A claimed chunk comes *marked* and closed: what its
former owners issued is not known. It opens when its scan is finished, and stays marked until the agent
has confirmed that. A chunk that goes back is *retired* first: from then on nothing is issued under its
grant, but it counts as held until the agent has answered.

Order of issue: from the fullest chunk first, so that sparse ones empty and can go back; within a chunk
by default fresh ids ascending, then released ones in the order of their release, none before its quarantine.
"""

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from drsm_sdk.errors import NotAllocated, NotOwner
from drsm_sdk.order import Below, Queue, queue
from drsm_sdk.wire.checksum import MODULUS, holding
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Item

SEEN_MAX = 10_000
"""Grants that are over, remembered so that none is taken up twice. A doubled or late message is at most some
minutes old, and a pod lets go of far fewer chunks in that time. (Those held are known by their chunks.)"""
STALE_MOST = 64
"""Entries of forgotten chunks in a picker's heap, besides as many as of others, until it is cleaned."""


@dataclass(slots=True, eq=False)
class Block:
    """A chunk's ids of one space: free ones, and used ones with when they were issued, oldest first."""

    free: Queue = field(default_factory=deque[int])
    used: dict[int, float] = field(default_factory=dict)
    released: dict[int, None] = field(default_factory=dict)
    """Ids released since the chunk's scan began, in order."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One held chunk, with a block of each space. `scanning`: its scan has begun."""

    n: int
    grant: str
    serial: int
    hold_until: float | None
    marked: bool
    open: bool
    empty_since: float
    blocks: tuple[Block, ...]
    resting: int = 0
    scanning: bool = False

    @property
    def issued(self) -> int:
        return sum([len(block.used) for block in self.blocks])

    @property
    def idle(self) -> bool:
        """Whether nothing of it is in use, known or unknown."""
        return self.open and not self.marked and not self.resting and not self.issued


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


def _no_chance(_: int) -> int:
    raise ValueError("an order that needs chance was given none")


class Picker:
    """Which chunk the next ids of some spaces come from: the fullest that has a free id of each.

    The others are a heap by fullness. They can only become less full while ids come from the current one, so
    a stale entry is one that claims too much, and is put right when it comes to the top. (Where several
    draw from one chunk an entry may also claim too little; then that chunk comes a little late.)
    """

    __slots__ = ("_others", "_queued", "current", "spaces")

    def __init__(self, spaces: tuple[int, ...]) -> None:
        self.spaces = spaces
        self.current: Chunk | None = None
        self._others: list[tuple[int, int, Chunk]] = []
        self._queued: set[int] = set()

    def serves(self, chunk: Chunk) -> bool:
        """Whether the chunk has a free id of each space."""
        return all(chunk.blocks[space].free for space in self.spaces)

    def offer(self, chunk: Chunk) -> None:
        """The chunk may be issued from."""
        if chunk is not self.current and chunk.serial not in self._queued and self.serves(chunk):
            self._queued.add(chunk.serial)
            heapq.heappush(self._others, (-chunk.issued, chunk.serial, chunk))

    def pick(self) -> Chunk | None:
        """Make the fullest chunk that serves the current one."""
        others, self.current = self._others, None
        while others:
            claimed, serial, chunk = others[0]
            if serial not in self._queued:  # forgotten
                heapq.heappop(others)
            elif not self.serves(chunk):
                heapq.heappop(others)
                self._queued.discard(serial)
            elif claimed == -chunk.issued:
                heapq.heappop(others)
                self._queued.discard(serial)
                self.current = chunk
                return chunk
            else:
                heapq.heapreplace(others, (-chunk.issued, serial, chunk))
        return None

    def forget(self, chunk: Chunk) -> None:
        """Nothing is issued from the chunk any more. Its entry stays until it comes to the top, or until
        there are too many of its kind: to look for each would take as long as there are chunks."""
        if chunk is self.current:
            self.current = None
        self._queued.discard(chunk.serial)
        if len(self._others) > 2 * len(self._queued) + STALE_MOST:
            self._others = [entry for entry in self._others if entry[1] in self._queued]
            heapq.heapify(self._others)


class Stock:
    """The chunks of one pool under one session. Spaces are told by their place among `definition.parts`.

    `free`       how many ids could be issued now, of the space that has fewest
    `releases`   how many ids were released, ever
    """

    def __init__(self, definition: Definition, below: Below = _no_chance) -> None:
        self.free = self.releases = 0
        self._below = below
        self._chunks: dict[int, Chunk] = {}
        self._retired: set[tuple[int, str]] = set()
        self._seen: dict[tuple[int, str], None] = {}
        self._resting: deque[tuple[float, Chunk, int, int]] = deque()
        self._last_time: set[tuple[int, int]] = set()
        """(space, id) in use, or resting, that have been excluded since: not free again. Most often none, and
        to look at the definition would cost each release more than all the rest of it."""
        self._checksum = 0
        self._serial = 0
        self._define(definition)
        self._begin()

    # --- single ids -----------------------------------------------------------------------------

    def take(self, now: float, space: int = 0) -> int | None:
        """Issue one id, or None when there is none."""
        if self._resting:
            self.thaw(now)
        picker = self._pickers[space]
        chunk = picker.current
        if chunk is None or not chunk.blocks[space].free:
            chunk = picker.pick()
            if chunk is None:
                return None
        block = chunk.blocks[space]
        id_ = block.free.popleft()
        block.used[id_] = now
        if self._one:
            self.free -= 1
        else:
            self._add(space, -1)
        return id_

    def take_set(self, now: float, spaces: tuple[int, ...]) -> list[int] | None:
        """Issue one id of each space, all of one chunk, or None when no chunk has one of each."""
        if self._resting:
            self.thaw(now)
        picker = self._sets.get(spaces) or self._new_picker(spaces)
        chunk = picker.current
        if chunk is None or not picker.serves(chunk):
            chunk = picker.pick()
            if chunk is None:
                return None
        return [self._draw(chunk, space, now) for space in spaces]

    def take_beside(self, now: float, space: int, n: int) -> int | None:
        """Issue one id of a space from chunk `n`, or None when it has none."""
        if self._resting:
            self.thaw(now)
        chunk = self._chunks.get(n)
        if chunk is None or not chunk.blocks[space].free:
            return None
        return self._draw(chunk, space, now)

    def put_back(self, id_: int, space: int = 0) -> None:
        """Undo the `take` that just returned `id_`: it was not handed out after all."""
        chunk = self._chunks[id_ >> self._shifts[space]]
        block = chunk.blocks[space]
        del block.used[id_]
        block.free.appendleft(id_)
        self._add(space, 1)
        self._offer(chunk, space)

    def release(self, id_: int, now: float, space: int = 0) -> None:
        """Take `id_` back. Raises NotOwner or NotAllocated, and then nothing has changed.

        In a marked chunk: before its scan began nothing changes (the scan decides), after that the release
        wins over the scan's result.
        """
        chunk = self._chunks.get(id_ >> self._shifts[space])
        if chunk is None:
            raise NotOwner(self.definition.name, self._item(id_, space))
        if not chunk.open:
            self._release_closed(chunk, id_, space)
            return
        used = chunk.blocks[space].used
        try:
            del used[id_]
        except KeyError:
            raise self._not_issued(id_, space) from None
        self.releases += 1
        if not used and (self._one or not chunk.issued):
            chunk.empty_since = now
        if self._quarantine:
            self._rest(chunk, id_, space, now)
        else:
            self._make_free(chunk, id_, space)

    def issued(self, id_: int, space: int = 0) -> bool:
        """Whether `id_` counts as issued by this pod; in a closed chunk every id does that is not known
        to be released."""
        chunk = self._chunks.get(id_ >> self._shifts[space])
        if chunk is None:
            return False
        if chunk.open:
            return id_ in chunk.blocks[space].used
        return not self._never_issued(id_, space) and id_ not in chunk.blocks[space].released

    def grant(self, id_: int, space: int = 0) -> str:
        """The grant of the chunk that `id_` lies in. Raises NotOwner."""
        chunk = self._chunks.get(id_ >> self._shifts[space])
        if chunk is None or (id_ not in chunk.blocks[space].used and self._never_issued(id_, space)):
            raise NotOwner(self.definition.name, self._item(id_, space))
        return chunk.grant

    def thaw(self, now: float) -> int:
        """Free the ids whose quarantine is over; returns how many, with those that are never issued again."""
        resting, thawed = self._resting, 0
        while resting and resting[0][0] <= now:
            _, chunk, space, id_ = resting.popleft()
            if self._chunks.get(chunk.n) is chunk:
                chunk.resting -= 1
                thawed += 1
                self._make_free(chunk, id_, space)
        return thawed

    # --- chunks ---------------------------------------------------------------------------------

    def __contains__(self, n: int) -> bool:
        return n in self._chunks

    def seen(self, n: int, grant: str) -> bool:
        """Whether this grant was taken up before: it is held, or on its way back, or over."""
        return self.get(n, grant) is not None or (n, grant) in self._retired or (n, grant) in self._seen

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
        self._serial += 1
        marked = hold_until is not None
        blocks = tuple(Block() for _ in self._parts)
        chunk = Chunk(n, grant, self._serial, hold_until, marked, not marked, now, blocks)
        self._chunks[n] = chunk
        self._count(chunk, +1)
        if chunk.open:
            self._open(chunk, [part.ids(n) for part in self._parts])
        return chunk

    def drop(self, n: int) -> list[list[int]]:
        """Hold chunk `n` no longer; returns the ids that were issued from it, of each space."""
        chunk = self._chunks[n]
        self._count(chunk, -1)
        self._forget(chunk)
        return [list(block.used) for block in chunk.blocks]

    def redefine(self, definition: Definition) -> None:
        """The pool has changed: nothing is issued any more that is now excluded. More ids of a block come
        with the chunks that are taken up from now on. Drop those first that lie elsewhere now."""
        self._define(definition)
        if not self._chunks:
            self._begin()  # there may be other spaces than before
        self._last_time = set()
        for _, _, space, id_ in self._resting:
            self._note_excluded(space, (id_,))
        for chunk in self._chunks.values():
            for space, block in enumerate(chunk.blocks):
                self._note_excluded(space, block.used)
                kept = [id_ for id_ in block.free if not self._never_issued(id_, space)]
                gone = len(block.free) - len(kept)
                if gone:
                    block.free = queue(self._parts[space].order, kept, self._below)
                    self._opened[space] -= gone
                    self._add(space, -gone)

    def begin_scan(self, n: int, grant: str) -> bool:
        """A scan of a closed chunk begins: from now on releases count. False if there is nothing to scan."""
        chunk = self.get(n, grant)
        if chunk is None or chunk.open:
            return False
        chunk.scanning = True
        return True

    def finish_scan(
        self, n: int, grant: str, in_use: Sequence[Collection[int]], now: float
    ) -> tuple[int, int] | None:
        """Open a closed chunk: `in_use` ids of each space are issued, the rest is free; what was released
        meanwhile comes last. With a quarantine all of the rest rests first: it may have been released right
        before the scan. An id in use that is never issued (excluded since) is not free once it is released.
        Returns (issued, not issued); None if there was nothing to scan."""
        chunk = self.get(n, grant)
        if chunk is None or chunk.open:
            return None
        rest: list[list[int]] = []
        for part, block, used in zip(self._parts, chunk.blocks, in_use, strict=True):
            ids = part.ids(n)
            block.used = dict.fromkeys(sorted(set(used) - block.released.keys()), now)
            self._note_excluded(len(rest), block.used)
            fresh = [id_ for id_ in ids if id_ not in block.used and id_ not in block.released]
            rest.append([*fresh, *(id_ for id_ in block.released if not part.never_issued(id_))])
            block.released = {}
        chunk.open, chunk.hold_until = True, None
        chunk.empty_since = now
        self._open(chunk, [()] * len(rest) if self._quarantine else rest)
        for space, ids in enumerate(rest) if self._quarantine else ():
            for id_ in ids:
                self._rest(chunk, id_, space, now)
        return chunk.issued, sum(map(len, rest))

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
        for chunk in reversed(tuple(self._chunks.values())):  # the youngest first
            if len(chosen) == most:
                break
            if chunk.idle and chunk.empty_since + idle <= now and self._spare(chunk, keep):
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
            self._remember(n, grant)
            self._checksum -= holding(n, grant, marked=False)

    # --- summaries ------------------------------------------------------------------------------

    @property
    def drawn(self) -> int:
        """How many more ids were issued, ever, than became free again; of the space with most. (Counting them
        as they go would cost each id more than its deque does.)"""
        return max(opened - left for opened, left in zip(self._opened, self._lefts(), strict=True))

    def held(self) -> tuple[int, int]:
        """Count and checksum of the chunks held, as `session.renew` carries them."""
        return len(self._chunks) + len(self._retired), self._checksum % MODULUS

    def all_issued(self) -> list[list[int]]:
        """Every id that is issued now, of each space."""
        places = range(len(self._parts))
        return [[id_ for chunk in self for id_ in chunk.blocks[space].used] for space in places]

    def level(self, now: float) -> Level:
        """Ids of all spaces together, but of the free ones those of the space that has fewest."""
        chunks: Collection[Chunk] = self._chunks.values()
        firsts = (next(iter(b.used.values())) for chunk in chunks for b in chunk.blocks if b.used)
        return Level(
            issued=sum(chunk.issued for chunk in chunks),
            free=self.free,
            oldest=now - min(firsts, default=now),
            chunks=len(chunks),
            closed=sum(not chunk.open for chunk in chunks),
            resting=sum(chunk.resting for chunk in chunks),
        )

    # --- inside ---------------------------------------------------------------------------------

    def _define(self, definition: Definition) -> None:
        self.definition, self._parts = definition, definition.parts
        self._shifts = [part.block_bits for part in self._parts]
        self._quarantine = definition.quarantine_ms / 1000

    def _note_excluded(self, space: int, ids: Iterable[int]) -> None:
        """These are in use, or rest: those that are never issued are not to be free again."""
        part = self._parts[space]
        self._last_time |= {(space, id_) for id_ in ids if part.never_issued(id_)}

    def _begin(self) -> None:
        """Without a chunk: nothing is free in any space."""
        self.free = 0
        self._one = len(self._parts) == 1
        self._left = [0] * len(self._parts)
        self._opened = [0] * len(self._parts)
        self._pickers = [Picker((space,)) for space in range(len(self._parts))]
        self._sets: dict[tuple[int, ...], Picker] = {}

    def _draw(self, chunk: Chunk, space: int, now: float) -> int:
        block = chunk.blocks[space]
        id_ = block.free.popleft()
        block.used[id_] = now
        self._add(space, -1)
        return id_

    def _add(self, space: int, count: int) -> None:
        if self._one:
            self.free += count
        else:
            self._left[space] += count
            self.free = min(self._left)

    def _lefts(self) -> list[int]:
        """Free ids of each space. (With one space only `free` is kept: it is half of what an id costs.)"""
        return [self.free] if self._one else self._left

    def _new_picker(self, spaces: tuple[int, ...]) -> Picker:
        picker = self._sets[spaces] = Picker(spaces)
        for chunk in self._chunks.values():
            picker.offer(chunk)
        return picker

    def _offer(self, chunk: Chunk, space: int) -> None:
        self._pickers[space].offer(chunk)
        for picker in self._sets.values():
            if space in picker.spaces:
                picker.offer(chunk)

    def _open(self, chunk: Chunk, ids: Sequence[Iterable[int]]) -> None:
        for space, fresh in enumerate(ids):
            free = chunk.blocks[space].free = queue(self._parts[space].order, fresh, self._below)
            self._opened[space] += len(free)
            self._add(space, len(free))
        for space in range(len(ids)):
            self._offer(chunk, space)

    def _make_free(self, chunk: Chunk, id_: int, space: int) -> None:
        if self._last_time and (space, id_) in self._last_time:
            self._last_time.remove((space, id_))
            return
        free = chunk.blocks[space].free
        empty = not free
        free.append(id_)
        if self._one:
            self.free += 1
        else:
            self._add(space, 1)
        if empty:
            self._offer(chunk, space)

    def _rest(self, chunk: Chunk, id_: int, space: int, now: float) -> None:
        chunk.resting += 1
        self._resting.append((now + self._quarantine, chunk, space, id_))

    def _release_closed(self, chunk: Chunk, id_: int, space: int = 0) -> None:
        if self._never_issued(id_, space):
            raise NotOwner(self.definition.name, self._item(id_, space))
        if not chunk.scanning:
            return
        if id_ in chunk.blocks[space].released:
            raise NotAllocated(self.definition.name, self._item(id_, space))
        chunk.blocks[space].released[id_] = None

    def _never_issued(self, id_: int, space: int) -> bool:
        return self._parts[space].never_issued(id_)

    def _not_issued(self, id_: int, space: int) -> Exception:
        never = self._never_issued(id_, space)
        return (NotOwner if never else NotAllocated)(self.definition.name, self._item(id_, space))

    def _item(self, id_: int, space: int) -> Item:
        """An id as the application has it, for an error."""
        return self._parts[space].item(id_)

    def _spare(self, chunk: Chunk, keep: int) -> bool:
        """Whether enough ids of each space stay free without the chunk."""
        return all(
            left - len(block.free) >= keep for left, block in zip(self._lefts(), chunk.blocks, strict=True)
        )

    def _count(self, chunk: Chunk, sign: int) -> None:
        self._checksum += sign * holding(chunk.n, chunk.grant, marked=chunk.marked)

    def _remember(self, n: int, grant: str) -> None:
        self._seen.pop((n, grant), None)  # the newest are kept
        self._seen[n, grant] = None
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]

    def _forget(self, chunk: Chunk) -> None:
        """Nothing is issued from `chunk` any more."""
        del self._chunks[chunk.n]
        self._remember(chunk.n, chunk.grant)
        for space, block in enumerate(chunk.blocks):
            self._opened[space] -= len(block.free)
            self._add(space, -len(block.free))
        for picker in (*self._pickers, *self._sets.values()):
            picker.forget(chunk)
