"""Where an id lies and which are never issued: every shape of a space against lists made by `ipaddress`."""

import itertools
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import IPV4, IPV6, WIDTH, Space

BASE = {"ipv4": int(IPv4Address("10.45.0.0")), "ipv6": int(IPv6Address("2001:db8::"))}
NETWORK = {"ipv4": IPv4Network, "ipv6": IPv6Network}
CELL = 3
"""Ranges are placed in cells of 2**CELL blocks, so some of them touch and some do not."""


@st.composite
def address_spaces(draw: st.DrawFn, name: str = "ue") -> Space:
    """Small enough to be listed: up to three ranges of different sizes, any prefix as an item, exclusions."""
    kind = draw(st.sampled_from(["ipv4", "ipv6"]))
    block_bits = draw(st.integers(1, 4))
    prefix = draw(st.sampled_from([WIDTH[kind], WIDTH[kind] - 4, 64 if kind == "ipv6" else 29]))
    longest = prefix - block_bits
    ranges = []
    for cell in draw(st.permutations(range(4)))[: draw(st.integers(1, 3))]:
        extra = draw(st.integers(0, CELL))
        block = (cell << CELL) + (draw(st.integers(0, (1 << CELL) - 1)) >> extra << extra)
        first = BASE[kind] + (block << WIDTH[kind] - longest)
        ranges.append(NETWORK[kind]((first, longest - extra)))
    excluded = [draw(parts_of(draw(st.sampled_from(ranges)), prefix)) for _ in range(draw(st.integers(0, 3)))]
    return Space(
        name=name,
        kind=kind,
        ranges=tuple(map(str, ranges)),
        prefix=prefix,
        block_bits=block_bits,
        slots=draw(st.integers(0, 2**block_bits)),
        excluded=tuple(excluded),
    )


@st.composite
def parts_of(draw: st.DrawFn, network: Any, prefix: int) -> str:
    """An address or a prefix within a range, longer than an item or shorter."""
    length = draw(st.integers(network.prefixlen, min(prefix + 2, network.max_prefixlen)))
    at = draw(st.integers(0, (1 << length - network.prefixlen) - 1))
    first = int(network.network_address) + (at << network.max_prefixlen - length)
    part = type(network)((first, length))
    return str(part.network_address if length == network.max_prefixlen else part)


@st.composite
def integer_spaces(draw: st.DrawFn, name: str = "id") -> Space:
    """Of ten bits, with reserved ranges."""
    edges = st.tuples(st.integers(0, 1023), st.integers(0, 1023)).map(lambda two: (min(two), max(two)))
    block_bits = draw(st.integers(1, 9))
    return Space(
        name=name,
        bits=10,
        block_bits=block_bits,
        slots=draw(st.integers(0, 2**block_bits)),
        reserved=tuple(draw(st.lists(edges, max_size=4))),
    )


spaces = st.one_of(address_spaces(), integer_spaces())


def blocks_of(space: Space) -> list[list[Any]]:
    """The ids of each block, issued or not, in order."""
    if not space.ranges:
        return [
            list(range(first, first + 2**space.block_bits))
            for first in range(0, 2**space.bits, 2**space.block_bits)
        ]
    single = space.prefix == WIDTH[space.kind]
    return [
        [item.network_address if single else item for item in block.subnets(new_prefix=space.prefix)]
        for text in space.ranges
        for block in ip_network(text).subnets(new_prefix=space.prefix - space.block_bits)
    ]


def forbidden(space: Space, item: Any) -> bool:
    """By the rules, whatever its slot."""
    if not space.ranges:
        return item == 0 or any(first <= item <= last for first, last in space.reserved)
    itself: Any = ip_network(item)
    if any(itself.overlaps(ip_network(text)) for text in space.excluded):
        return True
    if space.prefix < WIDTH[space.kind]:
        return False
    (home,) = [network for text in space.ranges if item in (network := ip_network(text))]
    ends = [home[0], home[1]] + ([home[-1]] if space.kind == "ipv4" else [])
    return item in ends


def issuable(space: Space, items: list[Any]) -> list[Any]:
    return [item for item in items[: space.slots] if not forbidden(space, item)]


# --- one space --------------------------------------------------------------------------------------


@given(spaces)
def test_ordinal_and_item_are_inverse_and_an_id_is_of_the_block_it_is_issued_from(space: Space) -> None:
    blocks = blocks_of(space)
    assert space.capacity == len(blocks)
    for n, items in enumerate(blocks):
        ordinals = [space.ordinal(item) for item in items]
        assert ordinals == list(range(space.first_id(n), space.last_id(n) + 1))
        assert [space.item(ordinal) for ordinal in ordinals if ordinal is not None] == items
        assert {space.chunk_of(item) for item in items} == {n}
        assert [space.item(ordinal) for ordinal in space.ids(n)] == issuable(space, items)


@given(spaces)
def test_what_a_block_issues_is_what_is_not_never_issued(space: Space) -> None:
    for n, items in enumerate(blocks_of(space)):
        ordinals = range(space.first_id(n), space.last_id(n) + 1)
        issued = [ordinal for ordinal in ordinals if not space.never_issued(ordinal)]
        assert issued == space.ids(n)
        assert len(issued) == len(issuable(space, items))


@given(spaces)
def test_barren_are_the_blocks_without_an_id_in_ascending_runs(space: Space) -> None:
    """The agent grants none of them."""
    runs = list(space.barren())
    assert runs == sorted(runs)
    listed = [n for first, last in runs for n in range(first, last + 1)]
    assert listed == [n for n, items in enumerate(blocks_of(space)) if not issuable(space, items)]


@given(address_spaces())
def test_a_blocks_prefix_covers_exactly_its_ids(space: Space) -> None:
    """So that a load balancer can route by it."""
    for n, items in enumerate(blocks_of(space)):
        first, last = ip_network(items[0]), ip_network(items[-1])
        prefix = ip_network(space.block(n))
        assert (prefix[0], prefix[-1]) == (first[0], last[-1])


@given(address_spaces())
def test_an_address_may_be_text_and_stands_for_the_item_it_lies_in(space: Space) -> None:
    for n, items in enumerate(blocks_of(space)):
        for item in items:
            around = ip_network(item)
            texts = (str(around), str(around[0]), str(around[-1]))
            assert {space.ordinal(text) for text in texts} == {space.ordinal(item)}
            assert {space.chunk_of(address) for address in (around[0], around[-1])} == {n}


@pytest.mark.parametrize(
    "asked",
    [
        "::ffff:10.45.0.2",
        "::FFFF:0a2d:0002",
        " 10.45.0.2\n",
        "10.45.0.2/32",
        "::ffff:10.45.0.2/128",
        IPv6Address("::ffff:10.45.0.2"),
        IPv6Network("::ffff:10.45.0.2/128"),
    ],
)
def test_an_ipv4_address_may_be_written_in_any_form_that_means_no_other(asked: Any) -> None:
    space = Space(name="a", kind="ipv4", ranges=("10.45.0.0/16",))
    assert space.ordinal(asked) == space.ordinal(IPv4Address("10.45.0.2")) is not None


@pytest.mark.parametrize("asked", ["2001:db8:0:7::/64", "2001:db8:0:7::1/64", "2001:DB8:0:7::9/128"])
def test_a_prefix_may_be_asked_about_by_any_network_within_it(asked: str) -> None:
    """Also with host bits, as tools print an interface's address."""
    space = Space(name="a", kind="ipv6", ranges=("2001:db8::/48",), prefix=64)
    assert space.ordinal(asked) == space.ordinal(IPv6Network("2001:db8:0:7::/64")) is not None


@pytest.mark.parametrize("asked", ["::ffff:0:0/96", "fe80::1%eth0", "010.45.0.2", "10.45.2", "::10.45.0.2"])
def test_a_form_that_could_mean_another_address_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="expected an ipv4 address"):
        Space(name="a", kind="ipv4", ranges=("10.45.0.0/16",)).ordinal(asked)


@given(address_spaces(), st.data())
def test_what_lies_in_no_range_has_no_chunk(space: Space, data: st.DataObject) -> None:
    """Right before and behind each range, and anywhere else."""
    ranges: list[Any] = [ip_network(text) for text in space.ranges]
    edges = [address for one in ranges for address in (one[0] - 1, one[-1] + 1)]
    anywhere = type(ranges[0][0])(data.draw(st.integers(0, 2 ** WIDTH[space.kind] - 1)))
    for address in (*edges, anywhere):
        inside = any(address in one for one in ranges)
        assert (space.ordinal(address) is not None) == inside
        assert (space.chunk_of(address) is not None) == inside


@given(spaces, st.data())
def test_spans_are_neighbouring_ids_cut_where_a_range_ends(space: Space, data: st.DataObject) -> None:
    """For telling which ids were issued: each span lies in one range, and together they are all."""
    items = [item for block in blocks_of(space) for item in block]
    two = data.draw(st.tuples(*[st.integers(0, len(items) - 1)] * 2))
    first, last = min(two), max(two)
    place = {item: i for i, item in enumerate(items)}
    spans = list(space.spans(first, last))
    together = [i for low, high in spans for i in range(place[low], place[high] + 1)]
    assert together == list(range(first, last + 1))
    for low, high in spans if space.ranges else []:
        assert any(
            ip_network(low).subnet_of(home) and ip_network(high).subnet_of(home)  # type: ignore[arg-type]
            for home in map(ip_network, space.ranges)
        )


WIDE = [
    (kind, prefix, block_bits)
    for kind, prefixes in {"ipv4": (32, 30, 28), "ipv6": (128, 64, 56, 48)}.items()
    for prefix in prefixes
    for block_bits in range(1, 17)
]


@given(st.sampled_from(WIDE), st.data())
def test_large_ranges_and_blocks_of_every_size_have_the_same_places(
    shape: tuple[str, int, int], data: st.DataObject
) -> None:
    """By counting from the range's first address, in ranges that nobody could list."""
    kind, prefix, block_bits = shape
    longest = prefix - block_bits
    lengths = st.integers(max(longest - 20, 4), longest)
    ranges: list[Any] = []
    first = 0x20 << WIDTH[kind] - 8
    for length in data.draw(st.lists(lengths, min_size=1, max_size=4)):
        size = 1 << WIDTH[kind] - length
        first = -(-first // size) * size
        ranges.append(NETWORK[kind]((first, length)))
        first += size
    data.draw(st.randoms(use_true_random=False)).shuffle(ranges)
    space = Space(name="ue", kind=kind, prefix=prefix, block_bits=block_bits, ranges=tuple(map(str, ranges)))
    sizes = [2 ** (prefix - one.prefixlen) for one in ranges]
    assert space.capacity << block_bits == sum(sizes)
    which = data.draw(st.integers(0, len(ranges) - 1))
    at = data.draw(st.integers(0, sizes[which] - 1))
    ordinal = sum(sizes[:which]) + at
    address = ranges[which].network_address + (at << WIDTH[kind] - prefix)
    item = address if prefix == WIDTH[kind] else NETWORK[kind]((int(address), prefix))
    assert space.item(ordinal) == item
    assert space.ordinal(item) == space.ordinal(str(item)) == ordinal
    assert space.chunk_of(item) == ordinal // 2**block_bits
    assert ip_network(item).subnet_of(ip_network(space.block(ordinal // 2**block_bits)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("space", "item", "says"),
    [
        (Space(name="a"), "5", "expected an id as int, found str"),
        (Space(name="a"), True, "expected an id as int, found bool"),
        (Space(name="a", kind="ipv4", ranges=("10.0.0.0/16",)), 5, "expected an ipv4 address, found int"),
        (
            Space(name="a", kind="ipv4", ranges=("10.0.0.0/16",)),
            "10.0.0.300",
            "expected an ipv4 address, found text that is none",
        ),
        (
            Space(name="a", kind="ipv4", ranges=("10.0.0.0/16",)),
            "10.0.0.0/24",
            "expected an ipv4 address, found IPv4Network",
        ),
        (
            Space(name="a", kind="ipv4", ranges=("10.0.0.0/16",)),
            IPv6Address("::1"),
            "expected an ipv4 address, found IPv6Address",
        ),
        (
            Space(name="a", kind="ipv6", ranges=("2001:db8::/48",), prefix=64),
            "2001:db8::/56",
            "expected an ipv6 prefix of 64 bits, found IPv6Network",
        ),
    ],
)
def test_what_cannot_be_an_id_is_an_error_that_says_what_was_expected(
    space: Space, item: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{says}$"):
        space.ordinal(item)


def test_network_gateway_broadcast_and_listed_addresses_are_never_issued() -> None:
    """Of each range, and what was listed as an address or a prefix; of IPv6 no broadcast."""
    space = Space(
        name="ue",
        kind="ipv4",
        ranges=("10.45.0.0/29", "10.60.0.0/29"),
        block_bits=3,
        excluded=("10.45.0.4/31", "10.60.0.3"),
    )
    issued = [str(space.item(ordinal)) for n in range(2) for ordinal in space.ids(n)]
    assert issued == [
        "10.45.0.2",
        "10.45.0.3",
        "10.45.0.6",
        "10.60.0.2",
        "10.60.0.4",
        "10.60.0.5",
        "10.60.0.6",
    ]
    v6 = Space(name="ue", kind="ipv6", ranges=("2001:db8::/126",), block_bits=2)
    assert [str(v6.item(ordinal)) for ordinal in v6.ids(0)] == ["2001:db8::2", "2001:db8::3"]


# --- several spaces ---------------------------------------------------------------------------------


def alone(space: Space, **changed: Any) -> Definition:
    """The pool that is this space."""
    fields = {name: getattr(space, name) for name in Space.__dataclass_fields__}
    return Definition(**fields | {"name": "pool"} | changed)


@st.composite
def pools(draw: st.DrawFn) -> Definition:
    """Of one space, or of two or three."""
    if draw(st.booleans()):
        return alone(draw(spaces))
    count = draw(st.integers(2, 3))
    return Definition(
        name="pool",
        spaces=tuple(draw(st.one_of(address_spaces(f"s{i}"), integer_spaces(f"s{i}"))) for i in range(count)),
    )


@given(pools())
def test_a_chunk_is_usable_if_it_has_an_id_of_each_space(pool: Definition) -> None:
    """There are as many chunks as the smallest space has blocks."""
    listed = [blocks_of(part) for part in pool.parts]
    assert pool.capacity == min(map(len, listed))
    useful = [
        n
        for n in range(pool.capacity)
        if all(issuable(part, blocks[n]) for part, blocks in zip(pool.parts, listed, strict=True))
    ]
    barren = {n for first, last in pool.barren_chunks for n in range(first, last + 1)}
    assert pool.usable == len(useful)
    assert set(useful) == set(range(pool.capacity)) - barren


@given(pools())
def test_owning_a_chunk_means_owning_its_block_of_each_space(pool: Definition) -> None:
    for part in pool.parts:
        for n, items in enumerate(blocks_of(part)):
            expected = n if n < pool.capacity else None
            assert {pool.chunk_of(item, part.name) for item in items} == {expected}
    told = pool.prefixes(range(pool.capacity))
    for part in pool.parts:
        expected_prefixes = tuple(part.block(n) for n in range(pool.capacity))
        assert told.get(part.name, ()) == (expected_prefixes if part.ranges else ())


@st.composite
def changed(draw: st.DrawFn, pool: Definition) -> Definition:
    """The pool with one range cut into halves, of which one or both stay, or with blocks of another size."""
    if not pool.ranges:
        return draw(pools())
    at = draw(st.integers(0, len(pool.ranges) - 1))
    halves = list(map(str, ip_network(pool.ranges[at]).subnets(prefixlen_diff=1)))
    kept = draw(st.sampled_from([halves, halves[:1], halves[1:], halves[::-1]]))
    ranges = (*pool.ranges[:at], *kept, *pool.ranges[at + 1 :])
    longest = pool.prefix - pool.block_bits
    blocks = pool.block_bits if all(ip_network(text).prefixlen <= longest for text in ranges) else 1
    assume(all(ip_network(text).prefixlen <= pool.prefix - blocks for text in ranges))
    return replace(pool, ranges=ranges, block_bits=blocks, slots=0, excluded=())


@given(st.data())
def test_a_pool_grows_if_each_chunk_that_there_was_lies_where_it_lay(data: st.DataObject) -> None:
    """`grows_from` looks at the corners of ranges only, `keeps` at one chunk: both as all ids say."""
    one = data.draw(st.one_of(address_spaces().map(alone), pools()))
    for old, new in itertools.permutations((one, data.draw(changed(one)))):
        places, now = (list(map(blocks_of, pool.parts)) for pool in (old, new))
        alike = [(part.name, part.kind) for part in old.parts] == [
            (part.name, part.kind) for part in new.parts
        ]
        stays = [
            alike and n < new.capacity and all(a[n] == b[n] for a, b in zip(places, now, strict=True))
            for n in range(old.capacity)
        ]
        assert [new.keeps(old, n) for n in range(old.capacity)] == stays
        assert new.grows_from(old) == all(stays)


@given(address_spaces(), st.integers(0, 3), st.integers(0, 2))
def test_a_further_range_at_the_end_is_growth_and_one_in_front_is_not(
    space: Space, more: int, places: int
) -> None:
    """Chunks are numbered one range after the other, so only what comes last moves nothing."""
    longest = space.prefix - space.block_bits
    far = BASE[space.kind] + (64 + (places << 3) << WIDTH[space.kind] - longest)
    further = str(NETWORK[space.kind]((far, longest - more)))
    old = alone(space)
    behind = alone(space, ranges=(*space.ranges, further), revision=2)
    before = alone(space, ranges=(further, *space.ranges), revision=2)
    assert behind.grows_from(old)
    assert not before.grows_from(old)
    assert not old.grows_from(behind)


@pytest.mark.parametrize(
    ("ranges", "prefix", "block_bits", "chunks"),
    [
        (("10.45.0.0/16",), 0, 8, 256),
        (("10.45.0.0/20",), 0, 8, 16),
        (("10.45.0.0/22",), 0, 6, 16),
        (("10.45.0.0/24",), 0, 4, 16),
        (("10.45.0.0/24", "10.45.8.0/22"), 0, 4, 80),
        (("10.45.0.0/29",), 0, 1, 4),
        (("2001:db8::/48",), 64, 8, 256),
        (("2001:db8::/58",), 64, 2, 16),
        (("2001:db8::/62",), 64, 1, 2),
    ],
)
def test_a_small_range_has_small_blocks_so_that_several_pods_can_have_one(
    ranges: tuple[str, ...], prefix: int, block_bits: int, chunks: int
) -> None:
    """Sixteen at least, where there are as many pairs of addresses. A range that is added later changes
    nothing."""
    kind = IPV6 if ":" in ranges[0] else IPV4
    space = Space(name="ue", kind=kind, ranges=ranges, prefix=prefix)
    assert (space.block_bits, space.capacity) == (block_bits, chunks)
    more = "2001:db9::/48" if kind == IPV6 else "10.46.0.0/16"
    assert Space(name="ue", kind=kind, ranges=(*ranges, more), prefix=prefix).block_bits == block_bits
