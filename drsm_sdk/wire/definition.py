"""What a pool is: its number space, or the several that its chunks are cut into, and how they are used."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from drsm_sdk.wire.space import EXCLUDED_MAX, Interval, Item, Space, merged

SPACES = "spaces"
"""The kind of a pool that has several spaces."""
SPACES_MAX = 8


@dataclass(frozen=True, kw_only=True)
class Definition(Space):
    """One pool. Raises ValueError that names the field and the rule.

    With `spaces` empty the pool is a number space itself, with that one's fields. Otherwise owning chunk `n`
    means owning block `n` of each space, and these fields stay empty.

    usage_lag_ms    `W`: within this time an issued id becomes visible to the application's scan
    quarantine_ms   a released id is not issued again before this time has passed
    unscanned       what becomes of a claimed chunk whose owner cannot scan: `keep` it marked, or
                    `free` it after the hold
    revision        rises with every change of the definition
    """

    spaces: tuple[Space, ...] = ()
    usage_lag_ms: int = 10_000
    quarantine_ms: int = 0
    unscanned: str = "keep"
    revision: int = 1

    def _check_place(self) -> None:
        self._require("usage_lag_ms", self.usage_lag_ms >= 0, "0 or above")
        self._require("quarantine_ms", self.quarantine_ms >= 0, "0 or above")
        self._require("unscanned", self.unscanned in {"keep", "free"}, "'keep' or 'free'")
        self._require("revision", self.revision >= 1, "1 or above")
        if self.spaces or self.kind == SPACES:
            self._check_spaces()
        else:
            super()._check_place()
        self._keep("_parts", self.spaces or (self,))
        barren = merged(run for space in self.parts for run in space.barren())
        self._keep("_barren", tuple(barren))

    def _check_spaces(self) -> None:
        self._require("spaces", 1 <= len(self.spaces) <= SPACES_MAX, f"1..{SPACES_MAX} of them")
        names = [space.name for space in self.spaces]
        self._require("spaces", len(set(names)) == len(names), "each name once", names)
        listed = sum(len(s.ranges) + len(s.reserved) + len(s.excluded) for s in self.spaces)
        most = f"at most {EXCLUDED_MAX} ranges, reserved and excluded in all"
        self._require("spaces", listed <= EXCLUDED_MAX, most, listed)
        for field in fields(Space):
            own = {"name": self.name, "kind": SPACES}.get(field.name)
            unset = getattr(self, field.name) in (own, field.default)
            self._require(field.name, unset, "none of it beside spaces; each space has its own")
        self._keep("kind", SPACES)

    @property
    def parts(self) -> tuple[Space, ...]:
        """The spaces; of a pool that is one itself, only this one."""
        return self.__dict__["_parts"]  # type: ignore[no-any-return]

    @property
    def capacity(self) -> int:
        """How many chunks there can be; they are numbered from 0."""
        return min(space.capacity for space in self.parts) if self.spaces else super().capacity

    @property
    def usable(self) -> int:
        """How many chunks can issue at least one id of each space."""
        end = self.capacity
        return end - sum(min(last + 1, end) - min(first, end) for first, last in self.barren_chunks)

    @property
    def barren_chunks(self) -> tuple[Interval, ...]:
        """Runs of chunks that cannot issue a single id in one of the spaces."""
        return self.__dict__["_barren"]  # type: ignore[no-any-return]

    @property
    def ids_per_chunk(self) -> int:
        """Of the space that has fewest."""
        return min(space.slots for space in self.parts)

    def index(self, space: str | None) -> int:
        """The place of a space among `parts`; None means the only one. Raises ValueError."""
        if space is None and len(self.parts) == 1:
            return 0
        for i, part in enumerate(self.parts):
            if part.name == space:
                return i
        names = ", ".join(part.name for part in self.parts)
        found = "none" if space is None else f"{space!r:.40}"
        raise ValueError(f"space: expected one of {names}, found {found}")

    def chunk_of(self, item: Item, space: str | None = None) -> int | None:
        """The number of the chunk that covers an id, or None for one outside. Raises ValueError."""
        part = self.parts[self.index(space)]
        ordinal = part.ordinal(item)
        n = None if ordinal is None else ordinal >> part.block_bits
        return n if n is not None and n < self.capacity else None

    def keeps(self, other: "Definition", n: int) -> bool:
        """Whether chunk `n` lies where it lies in `other`."""
        return len(self.parts) == len(other.parts) and all(
            mine.keeps_block(its, n) for mine, its in zip(self.parts, other.parts, strict=True)
        )

    def grows_from(self, other: "Definition") -> bool:
        """Whether every chunk of `other` lies where it lay."""
        corners = {n for part in (*self.parts, *other.parts) for n in part.corners()}
        return all(self.keeps(other, n) for n in corners if n < other.capacity)

    def prefixes(self, chunks: Sequence[int]) -> dict[str, tuple[str, ...]]:
        """Of each space of addresses, by its name, what these chunks are as prefixes, in their order. Empty
        text for one that the pool does not have: a Go pod numbers chunks as it likes."""
        if not chunks:
            return {}
        capacity = self.capacity
        return {
            part.name: tuple(part.block(n) if n < capacity else "" for n in chunks)
            for part in self.parts
            if part.ranges
        }

    @property
    def _called(self) -> str:
        return "pool"
