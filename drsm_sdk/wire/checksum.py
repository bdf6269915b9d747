"""Checksums by which two sides see that they hold the same chunks.

A checksum is the sum modulo 2**64 of one hash per chunk (the first 8 bytes, big-endian, of SHA-256),
so it can be kept up to date by adding and subtracting, in any order.
"""

from hashlib import sha256

MODULUS = 2**64


def ownership(n: int, name: str, incarnation: int) -> int:
    """A chunk's part in the checksum of `sync`: who owns it."""
    return _hash(f"{n} {name} {incarnation}")


def holding(n: int, grant: str, marked: bool) -> int:
    """A chunk's part in the checksum of `held`: by which grant a pod holds it, and whether marked."""
    return _hash(f"{n} {grant} {int(marked)}")


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
