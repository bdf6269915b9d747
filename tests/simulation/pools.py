"""The pools that simulated worlds use: one space of integers, one of addresses, or several."""

from typing import Any

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Item

POOL = "amfid"
INTEGERS, ADDRESSES, SPACES = "integers", "addresses", "spaces"
BITS = 10
SLOTS = 12

Id = tuple[str, int]
"""A space's name, and the ordinal of an id in it."""


def settings_of(kind: str, block_bits: int) -> dict[str, Any]:
    """What the settings say of the pool, but for durations: about 1000 ids, of which few are used."""
    integers = {"bits": BITS, "block_bits": block_bits, "slots": SLOTS}
    if kind == ADDRESSES:
        ranges = ("10.45.0.0/23", "10.9.0.0/23")
        excluded = ("10.45.0.64/29", "10.9.1.1")
        return {
            "kind": "ipv4",
            "ranges": ranges,
            "excluded": excluded,
            "block_bits": block_bits,
            "slots": SLOTS,
        }
    if kind == SPACES:
        prefixes = {"kind": "ipv6", "ranges": ("2001:db8::/54",), "prefix": 64, "block_bits": block_bits}
        return {
            "spaces": [
                {"name": "ngapid"} | integers,
                {"name": "tmsi", "order": "spread"} | integers,
                {"name": "ue", "slots": SLOTS // 2} | prefixes,
            ]
        }
    return integers


class Places:
    """Where the ids of a definition lie."""

    def __init__(self, definition: Definition) -> None:
        self.names = [part.name for part in definition.parts]
        self.capacity = definition.capacity
        self._parts = {part.name: part for part in definition.parts}

    def chunk_of(self, id_: Id) -> int:
        space, ordinal = id_
        return ordinal >> self._parts[space].block_bits

    def never_issued(self, id_: Id) -> bool:
        space, ordinal = id_
        return self._parts[space].never_issued(ordinal)

    def item(self, id_: Id) -> Item:
        space, ordinal = id_
        return self._parts[space].item(ordinal)

    def id(self, space: str, item: Item) -> Id:
        ordinal = self._parts[space].ordinal(item)
        assert ordinal is not None
        return space, ordinal

    def between(self, space: str, first: Item, last: Item) -> list[Id]:
        """All ids of a space from one to another."""
        low, high = self.id(space, first), self.id(space, last)
        return [(space, ordinal) for ordinal in range(low[1], high[1] + 1)]
