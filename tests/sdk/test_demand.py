"""How much stock a pod wants."""

from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk import demand


def test_an_idle_pod_wants_one_chunk() -> None:
    assert demand.wanted(0.0, 1000) == 1000
    assert demand.chunks_to_ask(1000, 1000, 1000) == 0
    assert demand.chunks_to_ask(999, 1000, 1000) == 1


def test_a_busy_pod_wants_what_a_minute_takes() -> None:
    assert demand.wanted(100.0, 1000) == 6000
    assert demand.chunks_to_ask(500, 6000, 1000) == 6


def test_one_request_never_asks_for_more_than_the_protocol_allows() -> None:
    assert demand.chunks_to_ask(0, 10**9, 1000) == 256


def test_a_steady_pace_is_found_and_then_forgotten_slowly() -> None:
    """The rate rises within half a minute, and after ten seconds of silence most of it is still there."""
    rate = demand.Rate()
    for second in range(31):
        rate.sample(float(second), second * 100)
    assert 90 < rate.value <= 100
    for second in range(31, 41):
        rate.sample(float(second), 3000)
    assert rate.value > 75


def test_a_burst_does_not_empty_a_small_pool() -> None:
    """1500 ids in one second are a burst, not a need for ninety chunks."""
    rate = demand.Rate()
    rate.sample(0.0, 0)
    rate.sample(1.0, 1500)
    assert demand.wanted(rate.value, 1000) < 10_000


def test_issuing_and_releasing_in_balance_needs_no_stock() -> None:
    rate = demand.Rate()
    for second in range(60):
        rate.sample(float(second), 7)
    assert rate.value == 0.0


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(-1000, 1000)), max_size=50))
def test_a_rate_is_never_negative_and_never_above_the_highest_pace(steps: list[tuple[float, int]]) -> None:
    rate = demand.Rate()
    now, total, highest = 0.0, 0, 0.0
    rate.sample(now, total)
    for passed, drawn in steps:
        before = now
        now, total = now + passed, total + drawn
        rate.sample(now, total)
        highest = max(highest, drawn / (now - before))
        assert 0.0 <= rate.value <= highest + 1e-6


def test_while_a_pool_runs_out_a_chunk_without_all_its_ids_will_do() -> None:
    """The first one of a range of addresses lacks network and gateway; another would be asked for at once."""
    assert demand.sparing(256) <= 254
    assert demand.sparing(1) == 1
