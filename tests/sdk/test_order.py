"""In which order free ids come: each order keeps what it promises, whatever is released in between."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk import Pod
from drsm_sdk.ambient import Chance
from drsm_sdk.order import STRATA_BITS, Queue, queue
from drsm_sdk.stock import Stock
from drsm_sdk.testing import Domain
from drsm_sdk.wire.definition import Definition

STRATA = 1 << STRATA_BITS
TMSI = Definition(name="tmsi", bits=32, block_bits=10, slots=1024, order="random")


def seeded(seed: int) -> Chance:
    return Chance(random.Random(seed))


def drawn(ids: Queue, count: int) -> list[int]:
    return [ids.popleft() for _ in range(count)]


def chi_square(seen: Counter[int], cells: int) -> float:
    expected = seen.total() / cells
    return sum((seen[cell] - expected) ** 2 / expected for cell in range(cells))


@pytest.mark.parametrize("order", ["random", "spread"])
def test_which_slot_comes_first_second_or_last_is_anybodys_guess(order: str) -> None:
    """Chi-square over 64 slots of 6400 chunks: 103.4 is exceeded by one fair sample in a thousand."""
    below = seeded(1).number
    orders = [drawn(queue(order, range(64), below), 64) for _ in range(6400)]
    for place in (0, 1, 31, 63):
        assert chi_square(Counter(one[place] for one in orders), 64) < 103.4


def test_which_free_id_of_a_claimed_chunk_comes_when_is_anybodys_guess_too() -> None:
    """What the scan leaves is shuffled anew. Chi-square over 48 ids: 82.7 is exceeded by one fair sample in
    a thousand."""
    stock = Stock(Definition(name="tmsi", bits=32, block_bits=6, slots=64, order="random"), seeded(4).number)
    orders: list[list[int | None]] = []
    for n in range(1, 3201):
        stock.add(n, "0" * 16, 0.0, hold_until=0.0)
        stock.finish_scan(n, "0" * 16, [range(n << 6, (n << 6) + 64, 4)], 0.0)
        orders.append([stock.take(0.0) for _ in range(48)])
    for place in (0, 1, 23, 47):
        drawn_there = [one[place] for one in orders]
        seen = Counter(id_ % 64 - id_ % 64 // 4 - 1 for id_ in drawn_there if id_ is not None)
        assert seen.total() == 3200
        assert chi_square(seen, 48) < 82.7


async def test_a_pod_draws_from_a_source_that_nobody_can_guess_unless_it_is_given_one() -> None:
    """The operating system's: whoever sees many ids of a Mersenne Twister knows the next ones."""
    async with Domain(TMSI) as domain, domain.drsm(Pod("amf-1", "10.0.0.1", "i")) as drsm:
        pool = await drsm.join("tmsi")
        chance = pool._stock._below.__self__  # type: ignore[attr-defined]
        assert isinstance(chance, Chance)
        assert type(chance._source) is random.SystemRandom


def test_the_next_random_id_does_not_follow_from_the_last() -> None:
    """The differences between neighbours are as those of a shuffled list: hardly ever the same twice."""
    ids = drawn(queue("random", range(1024), seeded(2).number), 1024)
    steps = Counter(later - earlier for earlier, later in pairwise(ids))
    assert max(steps.values()) < 10


def test_another_pod_has_another_order_and_so_has_a_restarted_one() -> None:
    """By default chance is the machine's, which nobody can guess or repeat."""
    orders = []
    for _ in range(4):
        stock = Stock(TMSI, Chance().number)
        stock.add(1, "0" * 16, 0.0)
        orders.append(tuple(stock.take(0.0) for _ in range(1024)))
    assert len(set(orders)) == 4
    assert {tuple(sorted(filter(None, order))) for order in orders} == {tuple(range(1024, 2048))}


@given(st.integers(0, 2**32), st.integers(0, 1024))
def test_spread_is_even_over_the_low_bits_at_any_time(seed: int, count: int) -> None:
    """After k * 32 draws each value of the lowest five bits came k times; in between k or k + 1 times."""
    ids = queue("spread", range(5 << 10, 6 << 10), seeded(seed).number)
    groups = Counter(id_ % STRATA for id_ in drawn(ids, count))
    k, more = divmod(count, STRATA)
    assert sorted(groups[i] for i in range(STRATA)) == [k] * (STRATA - more) + [k + 1] * more


def test_no_two_rounds_of_spread_are_alike() -> None:
    """Else the low bits could be guessed."""
    ids = queue("spread", range(1024), seeded(3).number)
    rounds = {tuple(id_ % STRATA for id_ in drawn(ids, STRATA)) for _ in range(32)}
    assert len(rounds) == 32


@pytest.mark.parametrize("order", ["fifo", "random", "spread"])
@given(
    ids=st.sets(st.integers(0, 200), max_size=60),
    steps=st.lists(st.integers(-1, 3), max_size=80),
    seed=st.integers(0, 9),
)
def test_each_id_comes_once_however_they_are_drawn_and_come_back(
    order: str, ids: set[int], steps: list[int], seed: int
) -> None:
    """A step draws some, or (-1) gives the oldest drawn one back."""
    free = queue(order, sorted(ids), seeded(seed).number)
    left, out = set(ids), list[int]()
    for step in steps:
        for _ in range(min(step, len(left))):
            id_ = free.popleft()
            left.remove(id_)
            out.append(id_)
        if step < 0 and out:
            back = out.pop(0)
            (free.append if back % 2 else free.appendleft)(back)
            left.add(back)
        assert (len(free), sorted(free)) == (len(left), sorted(left))
    assert sorted(drawn(free, len(free))) == sorted(left)
    with pytest.raises(IndexError):
        free.popleft()
