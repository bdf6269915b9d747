"""Which number is granted next: never-used ones ascending, then the one free longest, then the unknown."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from drsm_agent.core.numbers import FreeNumbers


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


CAPACITY = 8


class AgainstAPlainModel(RuleBasedStateMachine):
    """Any order of grants, releases and others' doings, in a pool of eight chunks of which some were
    in use when the agent started."""

    @initialize(used=st.sets(st.integers(0, CAPACITY - 1)))
    def start(self, used: set[int]) -> None:
        """A leader begins."""
        highest = max(used, default=-1)
        self.used = set(used)
        self.free = FreeNumbers(CAPACITY, highest)
        self.untouched = list(range(highest + 1, CAPACITY))  # nobody ever had them
        self.unknown = [n for n in range(highest + 1) if n not in used]  # free since nobody knows when
        self.granted: set[int] = set()
        self.rested: list[int] = []  # granted and released, in the order of release

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        """A request: as many as are free, each once; never-used ones ascending, then the longest free."""
        free = set(range(CAPACITY)) - self.used
        taken = self.free.take(count, self.used)
        assert len(taken) == len(set(taken)) == min(count, len(free))
        assert set(taken) <= free
        fresh = [n for n in taken if n in self.untouched]
        again = [n for n in taken if n in self.rested]
        assert fresh == self.untouched[: len(fresh)]
        assert again == self.rested[: len(again)]
        assert not again or fresh == self.untouched
        last = [n for n in taken if n in self.unknown]
        assert not last or set(self.untouched + self.rested) <= set(taken)
        self.granted.update(taken)
        self._left(taken)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A chunk comes back."""
        n = data.draw(st.sampled_from(sorted(self.used)))
        self.used.remove(n)
        self.free.freed(n)
        if n in self.granted:
            self.rested.append(n)

    @rule(n=st.integers(0, CAPACITY - 1))
    def others(self, n: int) -> None:
        """A Go pod takes a number by itself."""
        self.granted.discard(n)
        self._left([n])

    def _left(self, numbers: list[int]) -> None:
        self.used.update(numbers)
        for known in (self.untouched, self.unknown, self.rested):
            known[:] = [n for n in known if n not in numbers]


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
TestAgainstAPlainModel.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
