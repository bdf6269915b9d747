"""A pool's table as a consumer holds it: chunk -> owner, kept true by snapshots and events.

Pure. The consumer's rule: events above the version in hand are applied, others dropped; a gap (`prev`
above what is held), a `reset` or another history under no lower term needs a snapshot, and so does a
`sync` that contradicts the table for longer than messages take. Messages of a lower term with another
history are a fallen leader's and dropped; so is a snapshot of the same history that is older.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from drsm_sdk.pods import Owner
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.checksum import MODULUS, ownership
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import INTEGER, Item

Key = tuple[str, int]
GO_INCARNATION = 0


class Verdict(Enum):
    """What became of an event."""

    APPLIED = auto()
    DROPPED = auto()
    """Held already, or from a fallen leader."""
    CONFIRMED = auto()
    """A sync that says exactly what the table says."""
    DOUBT = auto()
    """A sync that says something else; events may still be under way."""
    GAP = auto()
    """A snapshot is needed."""


@dataclass(slots=True)
class Holder:
    """One pod and how many chunks it owns. Its chunks point here, so that `down` is one assignment."""

    owner: Owner
    chunks: int = 0


class Mirror:
    """One pool's table. Empty, and knowing nothing, until the first `load`. `shift` is the number of bits
    of a slot in a pool that is one space of integers, else None."""

    def __init__(self) -> None:
        self.version: wire.Version = (0, 0)
        self.history = ""
        self.term = 0
        self.loaded = False
        self.checksum = 0
        self.definition: Definition | None = None
        self.shift: int | None = None
        self._chunks: dict[int, Holder] = {}
        self._holders: dict[Key, Holder] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def owner(self, id_: Item, space: str | None = None) -> Owner | None:
        """Whose id it is; None when nobody owns its chunk. Raises ValueError for what cannot be an id of the
        pool, or of the space."""
        if self.shift is not None and id_.__class__ is int and space is None:
            holder = self._chunks.get(id_ >> self.shift)
            return holder.owner if holder is not None else None
        n = self.definition.chunk_of(id_, space) if self.definition is not None else None
        return self.owner_of(n) if n is not None else None

    def owner_of(self, n: int) -> Owner | None:
        """Whose chunk it is; None when nobody owns it."""
        holder = self._chunks.get(n)
        return holder.owner if holder is not None else None

    def pods(self) -> list[Owner]:
        """Every pod that is up or owns a chunk, by name."""
        return sorted((holder.owner for holder in self._holders.values()), key=lambda owner: owner.key)

    def chunks(self) -> dict[int, Owner]:
        """The whole table: chunk number -> owner."""
        return {n: holder.owner for n, holder in self._chunks.items()}

    def fallen(self, term: int, history: str) -> bool:
        """Whether a message with this term and history comes from a leader that has fallen."""
        return term < self.term and history != self.history

    def load(self, snapshot: Snapshot) -> bool:
        """Take a snapshot in place of the table; False if what is in hand is newer."""
        older = snapshot.history == self.history and snapshot.version < self.version
        if self.loaded and (older or self.fallen(snapshot.term, snapshot.history)):
            return False
        self._chunks, self._holders, self.checksum = {}, {}, 0
        for owner in snapshot.owners:
            self._holders[owner.key] = Holder(owner)
        for key, numbers in snapshot.chunks:
            self._give(numbers, self._holders[key])
        self._define(snapshot.definition)
        self.version, self.history = snapshot.version, snapshot.history
        self.term = max(self.term, snapshot.term)
        self.loaded = True
        self._sweep(*self._holders)
        return True

    def _define(self, definition: Definition) -> None:
        self.definition = definition
        self.shift = definition.block_bits if definition.kind == INTEGER else None

    def distrust(self) -> None:
        """What is in hand may rest on a forged message: the next snapshot is taken, whatever its version."""
        self.loaded, self.term = False, 0

    def apply(self, head: wire.EventHead, body: wire.EventBody) -> Verdict:
        """Fold one event into the table."""
        if not self.loaded:
            return Verdict.GAP
        if self.fallen(head.term, head.history):
            return Verdict.DROPPED
        if head.history != self.history:
            return Verdict.GAP
        self.term = max(self.term, head.term)
        if isinstance(body, wire.Sync):
            if self.definition is not None and body.revision > self.definition.revision:
                return Verdict.GAP  # the pool was redefined
            return Verdict.CONFIRMED if self._agrees(head, body) else Verdict.DOUBT
        if head.version <= self.version:
            return Verdict.DROPPED
        if isinstance(body, wire.Reset) or head.prev > self.version:
            return Verdict.GAP
        self._fold(body)
        self.version = head.version
        return Verdict.APPLIED

    def contradicts(self, head: wire.EventHead, body: wire.Sync) -> bool:
        """Whether the table still is not what a doubtful sync said, once what was under way has arrived.
        A table that has moved on past the sync is for a later one to judge."""
        return head.history == self.history and head.version >= self.version and not self._agrees(head, body)

    def _agrees(self, head: wire.EventHead, body: wire.Sync) -> bool:
        said = (head.version, body.checksum, body.chunks)
        return said == (self.version, self.checksum, len(self._chunks))

    def _fold(self, body: wire.EventBody) -> None:
        match body:
            case wire.PodUp(pod):
                self._holder(pod).owner = Owner.of(pod, "live")
            case wire.PodDown(pod, reason):
                unknown = pod.incarnation == GO_INCARNATION and reason == "deleted"
                self._holder(pod).owner = Owner.of(pod, "unknown" if unknown else "down")
                self._sweep(_key(pod))
            case wire.ChunkAllocated(owner, chunks) | wire.ChunkClaimed(owner, _, chunks):
                former = self._holders_of(chunks)
                self._give(chunks, self._holder(owner))
                self._sweep(*former)
            case wire.ChunkReleased(_, chunks):
                former = self._holders_of(chunks)
                for n in chunks:
                    self._take(n)
                self._sweep(*former)

    def _holders_of(self, numbers: Iterable[int]) -> set[Key]:
        return {holder.owner.key for n in numbers if (holder := self._chunks.get(n)) is not None}

    def _holder(self, ref: wire.OwnerRef) -> Holder:
        """A pod that nobody announced is not up: its chunks are orphans. But a Go pod has chunks before its
        first keepalive."""
        key = _key(ref)
        if key not in self._holders:
            self._holders[key] = Holder(
                Owner.of(ref, "unknown" if ref.incarnation == GO_INCARNATION else "down")
            )
        return self._holders[key]

    def _give(self, numbers: Iterable[int], holder: Holder) -> None:
        name, incarnation = holder.owner.key
        for n in numbers:
            self._take(n)
            self._chunks[n] = holder
            holder.chunks += 1
            self.checksum = (self.checksum + ownership(n, name, incarnation)) % MODULUS

    def _take(self, n: int) -> None:
        holder = self._chunks.pop(n, None)
        if holder is not None:
            holder.chunks -= 1
            self.checksum = (self.checksum - ownership(n, *holder.owner.key)) % MODULUS

    def _sweep(self, *keys: Key) -> None:
        """Forget those of these pods that are not up and own nothing; a Go pod that is down has a keepalive
        that says so, and is known as long as that is there."""
        for key in keys:
            holder = self._holders.get(key)
            forgotten = "unknown" if key[1] == GO_INCARNATION else "down"
            if holder is not None and not holder.chunks and holder.owner.state == forgotten:
                del self._holders[key]


def _key(ref: wire.OwnerRef) -> Key:
    return ref.name, ref.incarnation
