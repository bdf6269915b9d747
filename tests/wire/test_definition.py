"""What a pool's numbers mean: every id has one chunk and slot, and every rule one message."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.wire.definition import Definition

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
    ],
)
def test_a_bad_field_is_named_with_its_rule(fields: dict[str, Any], text: str) -> None:
    """What was expected, and what was found."""
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Definition(**{"name": "p"} | fields)


def test_the_limits_themselves_are_fine() -> None:
    """The smallest and the largest of each."""
    small = Definition(name="0", bits=10, block_bits=1, slots=1, usage_lag_ms=0, quarantine_ms=0)
    large = Definition(name="a" * 32, bits=64, block_bits=16, slots=2**16, reserved=((0, 2**64 - 1),))
    assert (small.capacity, large.capacity, large.last_id(2**48 - 1)) == (512, 2**48, 2**64 - 1)
