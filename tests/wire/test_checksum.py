"""Checksums equal the protocol's formula, computed here in another way, and know no order."""

import hashlib
import random
import struct

from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.wire.checksum import MODULUS, holding, ownership

U64 = st.integers(0, 2**64 - 1)


def _first_64_bits(text: str) -> int:
    (value,) = struct.unpack(
        ">Q", bytes.fromhex(hashlib.new("sha256", text.encode("utf-8")).hexdigest()[:16])
    )
    assert isinstance(value, int)
    return value


@given(U64, st.text(max_size=20), U64)
def test_a_chunks_owner_is_hashed_by_the_formula(n: int, name: str, incarnation: int) -> None:
    """The first 8 bytes, big-endian, of SHA-256 of "<n> <name> <incarnation>"."""
    assert ownership(n, name, incarnation) == _first_64_bits(f"{n} {name} {incarnation}")


@given(U64, st.text("0123456789abcdef", min_size=16, max_size=16), st.booleans())
def test_a_held_chunk_is_hashed_by_the_formula(n: int, grant: str, marked: bool) -> None:
    """The same of "<n> <grant> <0|1 marked>"."""
    assert holding(n, grant, marked) == _first_64_bits(f"{n} {grant} {'1' if marked else '0'}")


def test_known_values() -> None:
    """Two hashes as any other program computes them: `printf '5 amf-1 7' | sha256sum`."""
    assert f"{ownership(5, 'amf-1', 7):016x}" == "99aca1a55319276a"
    assert f"{holding(5, '0123456789abcdef', True):016x}" == "f55f655670ce4304"


@given(st.lists(st.tuples(U64, st.text(max_size=5), U64), max_size=20, unique=True), st.randoms())
def test_a_sum_knows_no_order(chunks: list[tuple[int, str, int]], chance: random.Random) -> None:
    """Adding in any order, with others added and taken away in between, gives the same checksum."""
    shuffled = list(chunks)
    chance.shuffle(shuffled)
    total = 0
    for chunk in shuffled:
        total = (total + ownership(*chunk) + ownership(1, "x", 1)) % MODULUS
    for _ in shuffled:
        total = (total - ownership(1, "x", 1)) % MODULUS
    assert total == sum(ownership(*chunk) for chunk in chunks) % 2**64
