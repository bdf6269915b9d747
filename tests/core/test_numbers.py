"""Which number is granted next: never-used ones ascending, then the one free longest, then the unknown."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from drsm_agent.core.numbers import FreeNumbers, beside_go, go_knows


def test_never_used_numbers_ascend() -> None:
    """From 0, and on from where the last request ended."""
    free = FreeNumbers(10)
    assert [free.take(3, ()), free.take(2, ()), free.take(0, ())] == [[0, 1, 2], [3, 4], []]


def test_an_agent_that_starts_goes_on_above_the_highest() -> None:
    """What lies below may have been free for long or short: it comes last."""
    free = FreeNumbers(6, highest=3)
    assert free.take(6, {1, 3}) == [4, 5, 0, 2]


def test_then_the_one_free_longest() -> None:
    """In the order of release, and before those of which nobody knows since when."""
    free = FreeNumbers(5, highest=4)
    for n in (3, 1, 4):
        free.freed(n)
    assert free.take(5, {0}) == [3, 1, 4, 2]


def test_a_number_released_twice_counts_from_the_last_time() -> None:
    """It was in use in between."""
    free = FreeNumbers(3)
    free.take(3, ())
    for n in (0, 1, 0):
        free.freed(n)
    assert free.take(3, ()) == [1, 0]


def test_released_numbers_come_after_never_used_ones() -> None:
    """A number rests as long as possible."""
    free = FreeNumbers(4)
    free.take(2, ())
    free.freed(0)
    assert free.take(4, {1}) == [2, 3, 0]


def test_a_release_above_all_that_was_used_is_nothing_new() -> None:
    """It is one of the never-used ones, and not granted twice."""
    free = FreeNumbers(3)
    free.freed(2)
    assert free.take(5, ()) == [0, 1, 2]


def test_numbers_used_by_others_are_skipped() -> None:
    """Go pods take numbers without asking; such a number is granted once it was released."""
    free = FreeNumbers(5)
    assert free.take(2, {0, 1, 3}) == [2, 4]
    free.freed(3)
    assert free.take(2, {0, 1, 2, 4}) == [3]


def test_an_exhausted_pool_gives_what_it_has() -> None:
    """Fewer than asked for, then none, at once."""
    free = FreeNumbers(3)
    assert [free.take(5, {1}), free.take(5, {0, 1, 2})] == [[0, 2], []]
    free.freed(1)
    assert free.take(1, {0, 2}) == [1]


def test_no_number_comes_twice_in_one_answer() -> None:
    """One that was in use at the start and then released is both free and below the highest."""
    free = FreeNumbers(3, highest=2)
    free.freed(1)
    assert free.take(5, ()) == [1, 0, 2]


def test_a_huge_pool_costs_nothing() -> None:
    """2**54 chunks, nearly none of them in use; also with one at the very end."""
    capacity = 2**54
    assert FreeNumbers(capacity).take(3, ()) == [0, 1, 2]
    free = FreeNumbers(capacity, highest=capacity - 1)
    assert free.take(3, {0, capacity - 1}) == [1, 2, 3]


def test_a_run_of_no_use_costs_nothing_however_long_it_is() -> None:
    """Half of 2**54 chunks, at the start, in between and at the end."""
    half = 2**53
    assert FreeNumbers(2 * half, barren=[(0, half - 1), (half + 1, half + 1)]).take(2, ()) == [half, half + 2]
    assert FreeNumbers(2 * half, barren=[(1, 2 * half - 1)]).take(2, ()) == [0]
    free = FreeNumbers(2 * half, highest=2 * half - 1, barren=[(0, half - 1)])
    assert free.take(1, ()) == [half]


CAPACITY = 8


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Numbers as (first, last), ascending."""
    firsts = sorted(n for n in numbers if n - 1 not in numbers)
    return list(zip(firsts, sorted(n for n in numbers if n + 1 not in numbers), strict=True))


class AgainstAPlainModel(RuleBasedStateMachine):
    """Any order of grants, releases and others' doings, in a pool of eight chunks of which some were
    in use when the agent started, and some are of no use."""

    @initialize(used=st.sets(st.integers(0, CAPACITY - 1)), barren=st.sets(st.integers(0, CAPACITY)))
    def start(self, used: set[int], barren: set[int]) -> None:
        """A leader begins. What is barren now may have been in use before."""
        highest = max(used, default=-1)
        self.used, self.barren = set(used), barren
        self.free = FreeNumbers(CAPACITY, highest, runs(barren))
        self.fresh = list(range(highest + 1, CAPACITY))  # this leader has never come to them
        self.rested: list[int] = []  # released, the one free longest first
        self.unknown = list(range(highest + 1))  # perhaps free, since nobody knows when

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        """A request: as many as are free, each once; whatever stands in a list may be in use meanwhile."""
        free = set(range(CAPACITY)) - self.used - self.barren
        expected: list[int] = []
        for known in (self.fresh, self.rested, self.unknown):
            while known and len(expected) < count:
                n = known.pop(0)
                if n in free and n not in expected:
                    expected.append(n)
        taken = self.free.take(count, self.used)
        assert taken == expected
        assert len(taken) == min(count, len(free))
        self.used.update(taken)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A chunk comes back, whoever took it. One that the leader never came to stays where it is."""
        n = data.draw(st.sampled_from(sorted(self.used)))
        self.used.remove(n)
        self.free.freed(n)
        if n not in self.fresh:
            self.rested = [known for known in self.rested if known != n] + [n]

    @rule(n=st.integers(0, CAPACITY - 1))
    def others(self, n: int) -> None:
        """A Go pod takes a number by itself."""
        self.used.add(n)


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
TestAgainstAPlainModel.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)


# --- Beside Go pods -------------------------------------------------------------------------------


def test_beside_go_pods_the_lowest_number_that_was_used_before_comes_first() -> None:
    """Whatever is granted for the first time, Go pods never take any more."""
    assert beside_go(1, 1024, {0, 1, 5, 900}, {3, 700}) == [3]
    assert beside_go(4, 1024, {0, 1, 5, 900}, {3, 700}) == [3, 700, 2, 4]


def test_a_leader_that_knows_nothing_of_what_was_used_grants_the_lowest() -> None:
    """As those before it did: what was used and is free is among them."""
    assert beside_go(3, 1024, {0, 2, 5}, set()) == [1, 3, 4]


def test_never_used_numbers_are_kept_for_go_pods_once_they_know_three_quarters() -> None:
    """They draw until they find one that they do not know."""
    assert beside_go(5, 16, set(range(11)), set()) == [11]
    assert beside_go(5, 16, set(range(12)), set()) == []
    assert beside_go(5, 16, set(range(11)), {11}) == [11]


def test_numbers_outside_of_the_pool_are_none_that_go_pods_know_of_it() -> None:
    """A Go pod with more bits owns such."""
    outside = set(range(100, 112))
    assert go_knows(16, outside, {50: 1, 3: 1}) == 1
    assert beside_go(2, 16, outside, set()) == [0, 1]


def test_beside_go_pods_too_what_is_of_no_use_is_passed_over() -> None:
    """Numbers whose ids are never issued, or whose documents cannot be read."""
    assert beside_go(2, 16, {2}, {3, 5}, lambda n: n in {0, 3}) == [5, 1]


@given(st.sets(st.integers(0, 63)), st.sets(st.integers(0, 63)), st.integers(1, 64))
def test_numbers_beside_go_pods_are_free_and_each_once(owned: set[int], free: set[int], count: int) -> None:
    """Whatever is known."""
    free -= owned
    numbers = beside_go(count, 64, owned, free)
    assert len(set(numbers)) == len(numbers) <= count
    assert not set(numbers) & owned
    assert len(owned | free | set(numbers)) <= max(48, len(owned | free))
