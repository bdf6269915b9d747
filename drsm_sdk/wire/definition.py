"""What a pool's definition says about its numbers: id <-> chunk and slot, and how many there are."""

from dataclasses import dataclass

from drsm_sdk.wire.subjects import valid_pool_name

BITS_MIN, BITS_MAX = 10, 64
SLOTS_DEFAULT = 1000
"""Go DRSM issues 1000 of the 1024 ids of a chunk; both can then live on one collection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One pool of integer ids. Raises ValueError that names the field and the rule.

    name            `[a-z0-9][a-z0-9_-]{0,31}`, not beginning with `drsm_`
    bits            width of an id, 10..64
    block_bits      width of the slot within a chunk, 1..bits-1 and at most 16
    slots           how many slots of a chunk are issued, 1..2**block_bits; 0 means the default,
                    min(1000, 2**block_bits)
    reserved        id ranges (first, last) that are never issued; id 0 never is
    usage_lag_ms    `W`: within this time an issued id becomes visible to the application's scan
    quarantine_ms   a released id is not issued again before this time has passed
    unscanned       what becomes of a claimed chunk whose owner cannot scan: `keep` it marked, or
                    `free` it after the hold
    revision        rises with every change of the definition
    """

    name: str
    kind: str = "integer"
    bits: int = 24
    block_bits: int = 10
    slots: int = 0
    reserved: tuple[tuple[int, int], ...] = ()
    usage_lag_ms: int = 10_000
    quarantine_ms: int = 0
    unscanned: str = "keep"
    revision: int = 1

    def __post_init__(self) -> None:
        if not valid_pool_name(self.name):
            raise ValueError(
                f"name: expected [a-z0-9][a-z0-9_-]{{0,31}} not beginning with drsm_, got {self.name!r:.60}"
            )
        self._require("kind", self.kind == "integer", "'integer'")
        self._require("bits", BITS_MIN <= self.bits <= BITS_MAX, f"{BITS_MIN}..{BITS_MAX}")
        self._require("block_bits", 1 <= self.block_bits <= min(16, self.bits - 1), "1..16 and below bits")
        if self.slots == 0:
            object.__setattr__(self, "slots", min(SLOTS_DEFAULT, 2**self.block_bits))
        self._require("slots", 1 <= self.slots <= 2**self.block_bits, f"1..{2**self.block_bits}")
        self._require("usage_lag_ms", self.usage_lag_ms >= 0, "0 or above")
        self._require("quarantine_ms", self.quarantine_ms >= 0, "0 or above")
        self._require("unscanned", self.unscanned in {"keep", "free"}, "'keep' or 'free'")
        self._require("revision", self.revision >= 1, "1 or above")
        for first, last in self.reserved:
            self._require("reserved", 0 <= first <= last < 2**self.bits, "ranges [first, last] within bits")

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"pool {self.name}: {field}: expected {rule}, got {getattr(self, field)!r:.60}")

    @property
    def capacity(self) -> int:
        """How many chunks there can be; they are numbered from 0."""
        return 1 << (self.bits - self.block_bits)

    def chunk_of(self, id_: int) -> int | None:
        """The number of the chunk that covers `id_`, or None for an id outside of the pool."""
        return id_ >> self.block_bits if 0 <= id_ < 1 << self.bits else None

    def first_id(self, n: int) -> int:
        """The id of chunk `n`'s slot 0."""
        return n << self.block_bits

    def last_id(self, n: int) -> int:
        """The id of the last slot of chunk `n` that may be issued."""
        return (n << self.block_bits) + self.slots - 1

    def excluded(self, id_: int) -> bool:
        """Whether `id_` is never issued: 0, reserved, or above its chunk's slots."""
        return (
            id_ == 0
            or id_ & ((1 << self.block_bits) - 1) >= self.slots
            or any(first <= id_ <= last for first, last in self.reserved)
        )

    def ids(self, n: int) -> list[int]:
        """The ids that chunk `n` can issue, ascending."""
        first, last = self.first_id(n), self.last_id(n)
        if first > 0 and not any(low <= last and high >= first for low, high in self.reserved):
            return list(range(first, last + 1))
        return [id_ for id_ in range(first, last + 1) if not self.excluded(id_)]
