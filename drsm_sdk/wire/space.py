"""One number space, cut into blocks: where an id lies, and which ids are never issued.

An application's id is an integer, an IP address or an IP prefix (an *item* of its space). Inside, every id is
its *ordinal*: `chunk << block_bits | slot`, an integer. For integers the two are the same. For addresses a
block is an aligned sub-prefix, and the blocks of all ranges are numbered one range after the other.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from itertools import pairwise
from typing import Any

from drsm_sdk.wire.subjects import valid_pool_name

INTEGER, IPV4, IPV6 = "integer", "ipv4", "ipv6"
BITS_MIN, BITS_MAX, BITS_DEFAULT = 10, 64, 24
BLOCK_BITS_MAX = 16
BLOCK_BITS_INTEGER, BLOCK_BITS_ADDRESS = 10, 8
"""As they are if not given. Go DRSM knows no other one than 10."""
BLOCKS_MIN_BITS = 4
"""The first range of an address space has at least so many bits of blocks, if `block_bits` is not given: 16
blocks, so that as many pods can have one."""
SLOTS_DEFAULT = 1000
"""Go DRSM issues 1000 of the 1024 ids of a chunk; both can then live on one collection."""
RANGES_MAX, EXCLUDED_MAX = 256, 1000
"""A definition is in every snapshot, and in the answer to every `open`: in all its spaces together it has no
more than 40 KiB of these."""
CHUNK_NUMBER_BITS_MAX = 63
"""A chunk's number is part of its document's `_id`, and at most this wide."""
FIFO, RANDOM, SPREAD = "fifo", "random", "spread"

WIDTH = {IPV4: 32, IPV6: 128}
MAPPED_BITS = WIDTH[IPV6] - WIDTH[IPV4]
"""Before the IPv4 address in an IPv4-mapped IPv6 address."""
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Item = Any
"""An id as the application has it: int, IPv4Address, IPv6Address, IPv4Network or IPv6Network."""
Interval = tuple[int, int]
"""First and last, both included."""


@dataclass(frozen=True, slots=True)
class Range:
    """One range of addresses: its first block as a number (the block's prefix bits), how many blocks it has,
    and the number of the chunk that its first block belongs to."""

    text: str
    first_block: int
    blocks: int
    first_chunk: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """One number space. Raises ValueError that names the field and the rule.

    name        as of a pool: `[a-z0-9][a-z0-9_-]{0,31}`
    kind        `integer`, `ipv4`, `ipv6`
    bits        integer: width of an id, 10..64; 0 means 24
    ranges      addresses: prefixes such as `10.45.0.0/16`, none overlapping another
    prefix      addresses: length of the prefix that is one id; 0 means a single address (32, 128)
    block_bits  a block has 2**block_bits ids, 1..16; 0 means 10, and for addresses 8, or less where the first
                range would have fewer than 16 blocks
    slots       how many ids of a block are issued, 1..2**block_bits; 0 means min(1000, 2**block_bits), and
                all of them for addresses
    reserved    integer: id ranges (first, last) that are never issued; id 0 never is
    excluded    addresses: addresses and prefixes that are never issued. Of a range of single addresses the
                first two (network, gateway) and, with IPv4, the last one (broadcast) never are
    order       `fifo`: ascending, then as they were released; `random`: not to be guessed; `spread`: random,
                and even over the low bits at any time (paging, TS 23.501 5.9.4)
    """

    name: str
    kind: str = INTEGER
    bits: int = 0
    ranges: tuple[str, ...] = ()
    prefix: int = 0
    block_bits: int = 0
    slots: int = 0
    reserved: tuple[Interval, ...] = ()
    excluded: tuple[str, ...] = ()
    order: str = FIFO

    def __post_init__(self) -> None:
        if not valid_pool_name(self.name):
            raise ValueError(
                f"name: expected [a-z0-9][a-z0-9_-]{{0,31}} not beginning with drsm_, got {self.name!r:.60}"
            )
        self._check_place()

    def _check_place(self) -> None:
        """Fill in the defaults, check every rule, and work out what the rest of this class looks at."""
        self._require("kind", self.kind in {INTEGER, IPV4, IPV6}, "'integer', 'ipv4' or 'ipv6'")
        self._require("order", self.order in {FIFO, RANDOM, SPREAD}, "'fifo', 'random' or 'spread'")
        if self.kind == INTEGER:
            self._check_integer()
        else:
            self._check_address()
        self._require("slots", 1 <= self.slots <= 2**self.block_bits, f"1..{2**self.block_bits}")
        self._keep("_barred", tuple(merged(self._bars())))
        self._keep("_barred_from", [first for first, _ in self.barred])

    def _check_integer(self) -> None:
        self._default("bits", BITS_DEFAULT)
        self._default("block_bits", BLOCK_BITS_INTEGER)
        self._require("bits", BITS_MIN <= self.bits <= BITS_MAX, f"{BITS_MIN}..{BITS_MAX}")
        most = min(BLOCK_BITS_MAX, self.bits - 1)
        self._require("block_bits", 1 <= self.block_bits <= most, f"1..{BLOCK_BITS_MAX} and below bits")
        self._default("slots", min(SLOTS_DEFAULT, 2**self.block_bits))
        for name in ("ranges", "excluded", "prefix"):
            self._require(name, not getattr(self, name), "none of it for integers")
        self._require("reserved", len(self.reserved) <= EXCLUDED_MAX, f"at most {EXCLUDED_MAX} ranges")
        for first, last in self.reserved:
            self._require("reserved", 0 <= first <= last < 2**self.bits, "ranges [first, last] within bits")

    def _block_bits_of(self, first: str) -> int:
        """Of the first range alone: ranges that are added later leave every block where it is."""
        bits = self.prefix - self._network("ranges", first).prefixlen
        return min(BLOCK_BITS_ADDRESS, max(bits - BLOCKS_MIN_BITS, 1))

    def _check_address(self) -> None:
        for name in ("bits", "reserved"):
            self._require(name, not getattr(self, name), "none of it for addresses")
        width = WIDTH[self.kind]
        self._default("prefix", width)
        self._require("prefix", 2 <= self.prefix <= width, f"2..{width}")
        self._require("ranges", 1 <= len(self.ranges) <= RANGES_MAX, f"1..{RANGES_MAX} prefixes")
        self._default("block_bits", self._block_bits_of(self.ranges[0]))
        self._require("block_bits", 1 <= self.block_bits <= BLOCK_BITS_MAX, f"1..{BLOCK_BITS_MAX}")
        self._require("excluded", len(self.excluded) <= EXCLUDED_MAX, f"at most {EXCLUDED_MAX}")
        longest = self.prefix - self.block_bits
        self._require("block_bits", longest >= 1, f"1..{self.prefix - 1}, below prefix")
        self._default("slots", 2**self.block_bits)
        ranges: list[Range] = []
        for text in self.ranges:
            network = self._network("ranges", text)
            self._require(
                "ranges",
                network.prefixlen <= longest,
                f"prefixes of at most {longest} bits, as a block has {self.block_bits} of {self.prefix}",
                text,
            )
            self._require(
                "ranges",
                longest - network.prefixlen < CHUNK_NUMBER_BITS_MAX,
                f"prefixes of more than {longest - CHUNK_NUMBER_BITS_MAX} bits, or larger blocks",
                text,
            )
            last = ranges[-1] if ranges else None
            first_chunk = last.first_chunk + last.blocks if last else 0
            first_block = int(network.network_address) >> (width - longest)
            ranges.append(Range(str(network), first_block, 1 << (longest - network.prefixlen), first_chunk))
        self._check_overlaps(ranges)
        fits = sum(one.blocks for one in ranges) <= 1 << CHUNK_NUMBER_BITS_MAX
        self._require("ranges", fits, f"prefixes of at most 2**{CHUNK_NUMBER_BITS_MAX} blocks in all")
        self._keep("_placed", tuple(ranges))
        self._keep("ranges", tuple(one.text for one in ranges))

    def _check_overlaps(self, ranges: list[Range]) -> None:
        ordered = sorted(ranges, key=lambda one: one.first_block)
        for one, other in pairwise(ordered):
            apart = one.first_block + one.blocks <= other.first_block
            self._require("ranges", apart, "prefixes that do not overlap", f"{one.text} and {other.text}")

    # --- where an id lies -------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many blocks there are; they are numbered from 0."""
        if self.kind == INTEGER:
            return 1 << (self.bits - self.block_bits)
        return sum(one.blocks for one in self._ranges)

    def ordinal(self, item: Item) -> int | None:
        """The ordinal of an id, or None for one outside. Of a prefix pool also any address within an item.
        Raises ValueError for what cannot be an id of this space."""
        if self.kind == INTEGER:
            if type(item) is not int:
                raise ValueError(f"expected an id as int, found {type(item).__name__}")
            return item if 0 <= item < 1 << self.bits else None
        value = self._value(item) >> (WIDTH[self.kind] - self.prefix)
        block, slot = value >> self.block_bits, value & (1 << self.block_bits) - 1
        for one in self._ranges:
            if 0 <= block - one.first_block < one.blocks:
                return one.first_chunk + block - one.first_block << self.block_bits | slot
        return None

    def item(self, ordinal: int) -> Item:
        """The id of an ordinal, as the application has it."""
        if self.kind == INTEGER:
            return ordinal
        width = WIDTH[self.kind]
        one = self._range_of(ordinal >> self.block_bits)
        value = ordinal + (one.first_block - one.first_chunk << self.block_bits) << (width - self.prefix)
        if self.prefix == width:
            return IPv4Address(value) if self.kind == IPV4 else IPv6Address(value)
        return IPv4Network((value, self.prefix)) if self.kind == IPV4 else IPv6Network((value, self.prefix))

    def chunk_of(self, item: Item) -> int | None:
        """The number of the chunk that covers an id, or None for one outside. Raises ValueError."""
        ordinal = self.ordinal(item)
        return None if ordinal is None else ordinal >> self.block_bits

    def first_id(self, n: int) -> int:
        """The ordinal of block `n`'s slot 0."""
        return n << self.block_bits

    def last_id(self, n: int) -> int:
        """The ordinal of block `n`'s last slot, issued or not."""
        return (n + 1 << self.block_bits) - 1

    def block(self, n: int) -> str:
        """Addresses: the prefix of block `n`, for routes; empty if there is none. Integers: its first
        and last id."""
        if self.kind == INTEGER:
            return f"{self.first_id(n)}-{self.last_id(n)}"
        if n >= self.capacity:
            return ""
        one = self._range_of(n)
        length = self.prefix - self.block_bits
        value = one.first_block + n - one.first_chunk << (WIDTH[self.kind] - length)
        return str(IPv4Network((value, length)) if self.kind == IPV4 else IPv6Network((value, length)))

    def spans(self, first: int, last: int) -> Iterator[tuple[Item, Item]]:
        """Neighbouring ordinals as ids: one (first, last), or more where a range ends in between."""
        while self.kind != INTEGER:
            one = self._range_of(first >> self.block_bits)
            end = (one.first_chunk + one.blocks << self.block_bits) - 1
            if last <= end:
                break
            yield self.item(first), self.item(end)
            first = end + 1
        yield self.item(first), self.item(last)

    def keeps_block(self, other: "Space", n: int) -> bool:
        """Whether block `n` lies where it lies in `other`."""
        shapes = [(one.name, one.kind, one.prefix, one.block_bits) for one in (self, other)]
        return (
            shapes[0] == shapes[1]
            and n < min(self.capacity, other.capacity)
            and self.block(n) == other.block(n)
        )

    def corners(self) -> Iterator[int]:
        """Of each range the first block and the last: what lies between them moves with them."""
        if self.kind == INTEGER:
            yield from (0, self.capacity - 1)
            return
        for one in self._ranges:
            yield from (one.first_chunk, one.first_chunk + one.blocks - 1)

    # --- what is never issued ---------------------------------------------------------------------

    @property
    def barred(self) -> tuple[Interval, ...]:
        """Ordinals that are never issued, ascending; beside the slots above `slots`."""
        return self._barred  # type: ignore[attr-defined,no-any-return]

    def never_issued(self, ordinal: int) -> bool:
        """Whether an ordinal is never issued: 0, reserved, excluded, or above its block's slots."""
        if ordinal & ((1 << self.block_bits) - 1) >= self.slots:
            return True
        at = bisect_right(self._barred_from, ordinal) - 1  # type: ignore[attr-defined]
        return at >= 0 and ordinal <= self.barred[at][1]

    def ids(self, n: int) -> list[int]:
        """The ordinals that block `n` can issue, ascending."""
        first, end = self.first_id(n), self.first_id(n) + self.slots
        ids: list[int] = []
        for low, high in self._bars_within(first, end - 1):
            ids += range(first, low)
            first = high + 1
        ids += range(first, end)
        return ids

    def barren(self) -> Iterator[Interval]:
        """Runs of blocks that cannot issue a single id, ascending."""
        for low, high in self.barred:
            first = -(-low >> self.block_bits)  # the first block that begins in here
            last = (high - self.slots + 1) >> self.block_bits  # the last one whose slots end in here
            if first <= last:
                yield first, last

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _ranges(self) -> tuple[Range, ...]:
        return self.__dict__["_placed"]  # type: ignore[no-any-return]

    def _range_of(self, n: int) -> Range:
        return next(one for one in reversed(self._ranges) if one.first_chunk <= n)

    def _bars(self) -> Iterator[Interval]:
        """What the definition bars, as ordinals, in any order."""
        if self.kind == INTEGER:
            yield 0, 0
            yield from self.reserved
            return
        single = self.prefix == WIDTH[self.kind]
        for one in self._ranges if single else ():
            first = one.first_chunk << self.block_bits
            yield first, first + 1
            if self.kind == IPV4:
                last = (one.first_chunk + one.blocks << self.block_bits) - 1
                yield last, last
        for text in self.excluded:
            network = self._network("excluded", text)
            low, high = self.ordinal(network[0]), self.ordinal(network[-1])
            inside = low is not None and high is not None and high - low == self._items(network) - 1
            self._require("excluded", inside, "addresses and prefixes within one of the ranges", text)
            yield low or 0, high or 0

    def _items(self, network: Network) -> int:
        return 1 << max(self.prefix - network.prefixlen, 0)

    def _bars_within(self, first: int, last: int) -> Iterator[Interval]:
        """Those of `barred` that have a number in common with these."""
        at = max(bisect_right(self._barred_from, first) - 1, 0)  # type: ignore[attr-defined]
        for low, high in self.barred[at:]:
            if low > last:
                return
            if high >= first:
                yield low, high

    def _network(self, field: str, text: str) -> Network:
        try:
            return IPv4Network(text) if self.kind == IPV4 else IPv6Network(text)
        except ValueError:
            example = "10.45.0.0/16" if self.kind == IPV4 else "2001:db8::/48"
            self._require(field, False, f"{self.kind} prefixes without host bits, such as {example}", text)
            raise

    def _value(self, item: Item) -> int:
        """The address, or a prefix's first address, as an integer."""
        if isinstance(item, str):
            try:
                text = item.strip()
                item = ip_network(text, strict=False) if "/" in text else ip_address(text)
            except ValueError:
                raise ValueError(f"expected an {self.kind} address, found text that is none") from None
        v4 = self.kind == IPV4
        if v4 and not isinstance(item, IPv4Address):
            item = _as_ipv4(item)
        if isinstance(item, IPv4Network if v4 else IPv6Network) and item.prefixlen >= self.prefix:
            item = item.network_address
        if not isinstance(item, IPv4Address if v4 else IPv6Address):
            what = "address" if self.prefix == WIDTH[self.kind] else f"prefix of {self.prefix} bits"
            raise ValueError(  # noqa: TRY004  # as for every other id that cannot be
                f"expected an {self.kind} {what}, found {type(item).__name__}"
            )
        return int(item)

    def _default(self, field: str, value: int) -> None:
        if getattr(self, field) == 0:
            self._keep(field, value)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require(self, field: str, holds: bool, rule: str, found: Any = None) -> None:
        if not holds:
            found = getattr(self, field) if found is None else found
            raise ValueError(f"{self._called} {self.name}: {field}: expected {rule}, got {found!r:.60}")

    @property
    def _called(self) -> str:
        return "space"


def _as_ipv4(item: Item) -> Item:
    """An IPv4-mapped IPv6 address, or a network of such ones, as the IPv4 one that it stands for (RFC 4291,
    section 2.5.5.2)."""
    if isinstance(item, IPv6Address) and not item.scope_id:
        return item.ipv4_mapped or item
    if isinstance(item, IPv6Network) and item.prefixlen >= MAPPED_BITS:
        mapped = item.network_address.ipv4_mapped
        return item if mapped is None else IPv4Network((mapped, item.prefixlen - MAPPED_BITS))
    return item


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same numbers as ascending intervals that neither overlap nor touch."""
    joined: list[Interval] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return joined
