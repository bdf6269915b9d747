"""The pod's two deadlines."""

from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.lease import Leases


def test_nothing_may_be_issued_before_a_lease_was_granted() -> None:
    """A new session starts lapsed."""
    leases = Leases()
    assert leases.state(0.0) == "lapsed"
    assert leases.issue_until == float("-inf")


def test_both_leases_count_from_before_the_request_was_sent() -> None:
    """R1: the time of receipt plays no part."""
    leases = Leases()
    leases.granted(10.0, 3_000, 300_000)
    assert [leases.state(now) for now in (12.9, 13.0, 309.9, 310.0)] == [
        "live",
        "suspect",
        "suspect",
        "lapsed",
    ]


def test_a_pod_that_stops_on_silence_may_issue_only_while_it_is_live() -> None:
    """`on_silence="stop"`: the liveness lease ends issuing too."""
    leases = Leases(stop_when_suspect=True)
    leases.granted(10.0, 3_000, 300_000)
    assert leases.issue_until == 13.0
    assert leases.allocation_until == 310.0


def test_revoked_leases_are_over_at_once() -> None:
    leases = Leases()
    leases.granted(10.0, 3_000, 300_000)
    leases.revoke()
    assert leases.state(10.0) == "lapsed"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000), st.integers(1, 1_000_000)), min_size=1))
def test_late_and_reordered_answers_never_shorten_a_lease(answers: list[tuple[float, int, int]]) -> None:
    """Whatever the order, the deadlines are the furthest that any answer gave."""
    leases = Leases()
    reached = float("-inf")
    for sent, liveness_ms, allocation_ms in answers:
        leases.granted(sent, liveness_ms, allocation_ms)
        assert leases.allocation_until >= reached
        reached = leases.allocation_until
    assert leases.liveness_until == max(sent + live / 1000 for sent, live, _ in answers)
    assert leases.allocation_until == max(sent + allocation / 1000 for sent, _, allocation in answers)
