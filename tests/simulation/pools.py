"""The pools that simulated worlds use: one space of integers, one of addresses, or several."""

from typing import Any

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Item

POOL = "amfid"
INTEGERS, ADDRESSES, SPACES = "integers", "addresses", "spaces"
BITS = 10
SLOTS = 12

Id = tuple[str, Item]
"""An id of a space, by the space's name."""


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


def ids_between(definition: Definition, space: str, first: Item, last: Item) -> list[Id]:
    """All ids of a space from one to another."""
    part = definition.parts[definition.index(space)]
    low, high = part.ordinal(first), part.ordinal(last)
    assert low is not None
    assert high is not None
    return [(space, part.item(ordinal)) for ordinal in range(low, high + 1)]
