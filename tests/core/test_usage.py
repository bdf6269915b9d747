"""What follows from what pods say of their stock: chunks asked back, and what looks like a leak."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_agent.core.usage import MARK_GRACE, Marks, asked_back, news, only_allocates

COUNTS = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("owned", "free_ids", "asked"),
    [
        (95, 5000, 0),
        (96, 5000, 4),
        (100, 5000, 4),
        (100, 2499, 1),
        (100, 1998, 1),
        (100, 1499, 0),
        (100, 0, 0),
    ],
)
def test_as_a_pool_of_a_hundred_runs_out_pods_are_asked_for_all_but_one_chunk_of_ids(
    owned: int, free_ids: int, asked: int
) -> None:
    assert asked_back(100, owned, free_ids, 1000) == asked


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 1000))
def test_a_pod_that_gives_back_what_is_asked_keeps_half_a_chunk_of_free_ids(
    capacity: int, owned: int, free_ids: int, ids_per_chunk: int
) -> None:
    """It would ask for one again at once with fewer; a chunk with ids that are never issued will do."""
    asked = asked_back(capacity, owned, free_ids, ids_per_chunk)
    assert asked >= 0
    assert asked == 0 or free_ids - asked * ids_per_chunk >= ids_per_chunk // 2


def test_three_chunks_of_ids_and_not_one_released_looks_like_a_leak() -> None:
    assert only_allocates(3000, 0, 1000)
    assert not only_allocates(2999, 0, 1000)
    assert not only_allocates(10**6, 1, 1000)


def test_a_mark_is_overdue_once_hold_and_scan_have_had_their_time() -> None:
    """Counted from when this leader first saw it, each grant for itself."""
    marks = Marks()
    assert marks.overdue([(3, "a", 10_000)], 100.0) == []
    assert marks.overdue([(3, "a", 10_000), (4, "b", 0)], 110.0 + MARK_GRACE - 1) == []
    assert marks.overdue([(3, "a", 10_000), (4, "b", 0)], 110.0 + MARK_GRACE) == [3]
    assert marks.overdue([(3, "c", 10_000), (4, "b", 0)], 109.0 + 2 * MARK_GRACE) == [4]


def test_a_mark_that_was_cleared_and_comes_again_counts_anew() -> None:
    marks = Marks()
    marks.overdue([(3, "a", 0)], 0.0)
    assert marks.overdue([], MARK_GRACE) == []
    assert marks.overdue([(3, "a", 0)], MARK_GRACE) == []


def test_each_piece_of_news_is_told_once_until_it_has_passed() -> None:
    told: set[str] = set()
    assert news({"a": True, "b": False}, told) == ["a"]
    assert news({"a": True, "b": True}, told) == ["b"]
    assert news({"b": True}, told) == []  # whom "a" was about is gone
    assert news({"a": True, "b": False}, told) == ["a"]
    assert news({"b": True}, told) == ["b"]
