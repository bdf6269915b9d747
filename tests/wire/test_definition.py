"""What a pool's numbers mean: every id has one chunk and slot, and every rule one message."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Space

WIDTHS = [(bits, block) for bits in range(10, 65) for block in range(1, min(16, bits - 1) + 1)]


@st.composite
def shapes(draw: st.DrawFn) -> Definition:
    """Any definition, of any width."""
    bits, block_bits = draw(st.sampled_from(WIDTHS))
    slots = draw(st.integers(0, 2**block_bits))
    return Definition(name="p", bits=bits, block_bits=block_bits, slots=slots)


def test_the_defaults_are_those_of_go_drsm() -> None:
    """24 bits, chunks of 1024 of which 1000 are issued, 10 s until an id is visible to the scan."""
    pool = Definition(name="amfid")
    assert (pool.bits, pool.block_bits, pool.slots, pool.capacity) == (24, 10, 1000, 16384)
    assert (pool.usage_lag_ms, pool.quarantine_ms, pool.unscanned, pool.revision) == (10_000, 0, "keep", 1)


@pytest.mark.parametrize(("block_bits", "slots"), [(1, 2), (9, 512), (10, 1000), (16, 1000)])
def test_a_chunk_has_a_thousand_slots_or_all(block_bits: int, slots: int) -> None:
    """The default is min(1000, 2**block_bits)."""
    assert Definition(name="p", block_bits=block_bits).slots == slots


def test_chunks_cover_all_ids_of_every_width() -> None:
    """The first and the last id, and both sides of every border between two chunks."""
    for bits, block_bits in WIDTHS:
        pool = Definition(name="p", bits=bits, block_bits=block_bits)
        size, last = 2**block_bits, 2**bits - 1
        assert pool.capacity * size == 2**bits
        assert [pool.chunk_of(id_) for id_ in (0, size - 1, size, last)] == [0, 0, 1, pool.capacity - 1]
        assert [pool.chunk_of(id_) for id_ in (-1, 2**bits, 2**64)] == [None, None, None]
        assert pool.first_id(pool.capacity - 1) + size - 1 == last


@given(shapes(), st.data())
def test_an_id_is_in_the_chunk_that_it_is_issued_from(pool: Definition, data: st.DataObject) -> None:
    """From the first id of a chunk to its last, and only there."""
    n = data.draw(st.integers(0, pool.capacity - 1))
    id_ = data.draw(st.integers(pool.first_id(n), pool.last_id(n)))
    assert pool.chunk_of(id_) == n
    assert pool.first_id(n) == n * 2**pool.block_bits
    assert pool.last_id(n) - pool.first_id(n) + 1 == 2**pool.block_bits
    assert pool.never_issued(id_) is (id_ == 0 or id_ - pool.first_id(n) >= pool.slots)


@given(shapes(), st.data())
def test_any_id_is_the_chunks_number_and_the_slot(pool: Definition, data: st.DataObject) -> None:
    """`n << block_bits | slot`; slots from `slots` on are never issued."""
    id_ = data.draw(st.integers(0, 2**pool.bits - 1))
    n, slot = divmod(id_, 2**pool.block_bits)
    assert pool.chunk_of(id_) == n
    assert pool.first_id(n) | slot == id_
    assert pool.never_issued(id_) is (id_ == 0 or slot >= pool.slots)


@given(st.data())
def test_a_chunks_ids_are_those_not_excluded(data: st.DataObject) -> None:
    """Ascending, without 0, reserved ids and slots above, whichever way they are counted."""
    block_bits = data.draw(st.integers(1, 6))
    edges = st.integers(0, 2**10 - 1)
    ranges = data.draw(st.lists(st.tuples(edges, edges).map(lambda pair: (min(pair), max(pair))), max_size=4))
    pool = Definition(
        name="p",
        bits=10,
        block_bits=block_bits,
        slots=data.draw(st.integers(0, 2**block_bits)),
        reserved=tuple(ranges),
    )
    n = data.draw(st.integers(0, pool.capacity - 1))
    reserved = set(itertools.chain.from_iterable(range(first, last + 1) for first, last in ranges))
    covered = range(n * 2**block_bits, n * 2**block_bits + pool.slots)
    assert pool.ids(n) == [id_ for id_ in covered if id_ != 0 and id_ not in reserved]
    assert pool.ids(n) == [id_ for id_ in covered if not pool.never_issued(id_)]


def test_reserved_ranges_include_both_ends() -> None:
    """And nothing beside them."""
    pool = Definition(name="p", bits=10, block_bits=4, reserved=((20, 22), (22, 23), (31, 32)))
    assert pool.ids(1) == [16, 17, 18, 19, 24, 25, 26, 27, 28, 29, 30]
    assert [pool.never_issued(id_) for id_ in (19, 20, 23, 24)] == [False, True, True, False]
    for single in (32, 40, 47):
        alone = Definition(name="p", bits=10, block_bits=4, reserved=((single, single),))
        assert alone.ids(2) == [id_ for id_ in range(32, 48) if id_ != single]


def test_a_chunk_may_have_no_id_at_all() -> None:
    """When everything of it is reserved."""
    assert Definition(name="p", bits=10, block_bits=4, reserved=((0, 31),)).ids(1) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": ""}, "name: expected [a-z0-9][a-z0-9_-]{0,31} not beginning with drsm_, got ''"),
        (
            {"name": "drsm_x"},
            "name: expected [a-z0-9][a-z0-9_-]{0,31} not beginning with drsm_, got 'drsm_x'",
        ),
        ({"kind": "ipx"}, "pool p: kind: expected 'integer', 'ipv4' or 'ipv6', got 'ipx'"),
        ({"bits": 9, "block_bits": 1}, "pool p: bits: expected 10..64, got 9"),
        ({"bits": 65}, "pool p: bits: expected 10..64, got 65"),
        ({"block_bits": -1}, "pool p: block_bits: expected 1..16 and below bits, got -1"),
        ({"block_bits": 17}, "pool p: block_bits: expected 1..16 and below bits, got 17"),
        ({"bits": 10, "block_bits": 10}, "pool p: block_bits: expected 1..16 and below bits, got 10"),
        (
            {"block_bits": 2**70},
            "pool p: block_bits: expected 1..16 and below bits, got 1180591620717411303424",
        ),
        ({"slots": 1025}, "pool p: slots: expected 1..1024, got 1025"),
        ({"slots": -1}, "pool p: slots: expected 1..1024, got -1"),
        (
            {"reserved": ((2, 1),)},
            "pool p: reserved: expected ranges [first, last] within bits, got ((2, 1),)",
        ),
        (
            {"reserved": ((-1, 1),)},
            "pool p: reserved: expected ranges [first, last] within bits, got ((-1, 1),)",
        ),
        (
            {"reserved": ((1, 2), (5, 2**24))},
            "pool p: reserved: expected ranges [first, last] within bits, got ((1, 2), (5, 16777216))",
        ),
        ({"usage_lag_ms": -1}, "pool p: usage_lag_ms: expected 0 or above, got -1"),
        ({"quarantine_ms": -1}, "pool p: quarantine_ms: expected 0 or above, got -1"),
        ({"unscanned": ""}, "pool p: unscanned: expected 'keep' or 'free', got ''"),
        ({"revision": 0}, "pool p: revision: expected 1 or above, got 0"),
        ({"order": "lifo"}, "pool p: order: expected 'fifo', 'random' or 'spread', got 'lifo'"),
        (
            {"ranges": ("10.0.0.0/8",)},
            "pool p: ranges: expected none of it for integers, got ('10.0.0.0/8',)",
        ),
        (
            {"excluded": ("10.0.0.1",)},
            "pool p: excluded: expected none of it for integers, got ('10.0.0.1',)",
        ),
        ({"prefix": 64}, "pool p: prefix: expected none of it for integers, got 64"),
    ],
)
def test_a_bad_field_is_named_with_its_rule(fields: dict[str, Any], text: str) -> None:
    """What was expected, and what was found."""
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Definition(**{"name": "p"} | fields)


UES = {"kind": "ipv4", "ranges": ("10.45.0.0/16", "10.60.0.0/24")}
V6 = {"kind": "ipv6", "ranges": ("2001:db8::/48",), "prefix": 64}
V4_PREFIX = "ipv4 prefixes without host bits, such as 10.45.0.0/16"
V6_PREFIX = "ipv6 prefixes without host bits, such as 2001:db8::/48"
APART = "prefixes that do not overlap"
WITHIN = "addresses and prefixes within one of the ranges"
BESIDE = "none of it beside spaces; each space has its own"


@pytest.mark.parametrize(
    ("place", "changed", "rule", "found"),
    [
        (UES, {"ranges": ()}, "1..256 prefixes", ()),
        (UES, {"ranges": ("10.45.0.0/16", "10.45.9.0/24")}, APART, "10.45.0.0/16 and 10.45.9.0/24"),
        (UES, {"ranges": ("10.45.0.0/24", "10.45.0.0/24")}, APART, "10.45.0.0/24 and 10.45.0.0/24"),
        (UES, {"ranges": ("10.45.0.1/16",)}, V4_PREFIX, "10.45.0.1/16"),
        (UES, {"ranges": ("2001:db8::/48",)}, V4_PREFIX, "2001:db8::/48"),
        (V6, {"ranges": ("10.45.0.0/16",)}, V6_PREFIX, "10.45.0.0/16"),
        (
            UES | {"block_bits": 8},
            {"ranges": ("10.45.0.0/25",)},
            "prefixes of at most 24 bits, as a block has 8 of 32",
            "10.45.0.0/25",
        ),
        (
            V6 | {"block_bits": 8},
            {"ranges": ("2001:db8::/60",)},
            "prefixes of at most 56 bits, as a block has 8 of 64",
            "2001:db8::/60",
        ),
        (
            {"kind": "ipv6"},
            {"ranges": ("2001:db8::/32",)},
            "prefixes of more than 57 bits, or larger blocks",
            "2001:db8::/32",
        ),
        (UES, {"prefix": 33}, "2..32", 33),
        (UES, {"prefix": 1}, "2..32", 1),
        (V6, {"prefix": 129}, "2..128", 129),
        (UES, {"block_bits": 17}, "1..16", 17),
        (UES | {"prefix": 8}, {"block_bits": 8}, "1..7, below prefix", 8),
        (UES, {"slots": 257}, "1..256", 257),
        (UES, {"bits": 24}, "none of it for addresses", 24),
        (UES, {"reserved": ((1, 2),)}, "none of it for addresses", ((1, 2),)),
        (UES, {"excluded": ("10.46.0.1",)}, WITHIN, "10.46.0.1"),
        (UES, {"excluded": ("10.44.0.0/15",)}, WITHIN, "10.44.0.0/15"),
        (UES, {"excluded": ("10.45.0.0/15",)}, V4_PREFIX, "10.45.0.0/15"),
        (UES, {"excluded": ("10.45.0.300",)}, V4_PREFIX, "10.45.0.300"),
    ],
)
def test_a_bad_field_of_addresses_is_named_with_its_rule(
    place: dict[str, Any], changed: dict[str, Any], rule: str, found: Any
) -> None:
    """Of a pool, and the same of a space."""
    (field,) = changed
    for kind, called in ((Definition, "pool"), (Space, "space")):
        text = f"{called} p: {field}: expected {rule}, got {found!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            kind(**{"name": "p"} | place | changed)


TWO = (Space(name="a", bits=32), Space(name="b", bits=64))


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"spaces": (TWO[0], TWO[0])}, "spaces: expected each name once, got ['a', 'a']"),
        ({"spaces": tuple(Space(name=f"s{i}") for i in range(9))}, "spaces: expected 1..8 of them, got "),
        ({"spaces": (), "kind": "spaces"}, "spaces: expected 1..8 of them, got ()"),
        ({"kind": "ipv4"}, f"kind: expected {BESIDE}, got 'ipv4'"),
        ({"bits": 24}, f"bits: expected {BESIDE}, got 24"),
        ({"slots": 9}, f"slots: expected {BESIDE}, got 9"),
        ({"order": "random"}, f"order: expected {BESIDE}, got 'random'"),
        ({"ranges": ("10.0.0.0/8",)}, f"ranges: expected {BESIDE}, got ('10.0.0.0/8',)"),
        ({"reserved": ((1, 2),)}, f"reserved: expected {BESIDE}, got ((1, 2),)"),
    ],
)
def test_what_spaces_cannot_be_is_named_with_its_rule(changed: dict[str, Any], rule: str) -> None:
    """Each has a name of its own, and the pool has no place beside them."""
    with pytest.raises(ValueError, match=f"^pool p: {re.escape(rule)}"):
        Definition(**{"name": "p", "spaces": TWO} | changed)


def test_the_limits_themselves_are_fine() -> None:
    """The smallest and the largest of each."""
    small = Definition(name="0", bits=10, block_bits=1, slots=1, usage_lag_ms=0, quarantine_ms=0)
    large = Definition(name="a" * 32, bits=64, block_bits=16, slots=2**16, reserved=((0, 2**64 - 1),))
    assert (small.capacity, large.capacity, large.last_id(2**48 - 1)) == (512, 2**48, 2**64 - 1)


def test_a_chunk_that_the_pool_does_not_have_has_no_prefix() -> None:
    """Nor has it a neighbour's: a Go pod numbers chunks as it likes."""
    pool = Definition(name="ue", kind="ipv4", ranges=("10.45.0.0/16",))
    assert pool.prefixes((255, 256, 10**18)) == {"ue": ("10.45.255.0/24", "", "")}
    narrow = Definition(
        name="p",
        kind="spaces",
        spaces=(Space(name="tmsi", bits=11), Space(name="ue", kind="ipv4", ranges=("10.45.0.0/16",))),
    )
    assert narrow.prefixes((1, 2)) == {"ue": ("10.45.1.0/24", "")}


def test_all_ranges_together_have_no_more_blocks_than_can_be_numbered() -> None:
    """A chunk's number has to fit its document's `_id`, and a message."""
    ranges = tuple(f"{i:x}00::/8" for i in range(0x20, 0x23))
    fields: dict[str, Any] = {"name": "p", "kind": "ipv6", "prefix": 78, "block_bits": 8}
    assert Definition(ranges=ranges[:2], **fields).capacity == 2**63
    with pytest.raises(ValueError, match=r"ranges: expected prefixes of at most 2\*\*63 blocks in all"):
        Definition(ranges=ranges, **fields)
