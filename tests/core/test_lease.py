"""Two clocks that disagree: the holder of a lease has always stopped before its grantor's is over."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_agent.core.lease import (
    CHECK,
    RATE,
    Leases,
    check_usage_lag,
    holder_duration,
    renew_period,
)

RATES = st.one_of(st.floats(1 - RATE, 1 + RATE), st.sampled_from([1 - RATE, 1.0, 1 + RATE]))
LEASES = st.one_of(st.floats(0.5, 100_000), st.sampled_from([1.0, 2.5, 3.0, 300.0]))


def effect(held: float, holder_rate: float, sent: float, delay: float) -> float:
    """True time of the last effect of a holder that counts `held` seconds of its own clock from `sent`,
    acts until its deadline, and needs `delay` from the check to the effect."""
    return sent + held / holder_rate + delay


def freed(lease: float, grantor_rate: float, received: float) -> float:
    """True time at which a grantor, that counts `lease` seconds of its own clock, gives it to another."""
    return received + lease / grantor_rate


@pytest.mark.parametrize(("lease", "expected"), [(3.0, 2.721399), (300.0, 296.766175), (1.0, 0.741300)])
def test_the_holders_duration_is_the_rules_formula(lease: float, expected: float) -> None:
    """(L/(1+r) - D) * (1-r), with r = 0.5 % and D = 0.25 s."""
    assert (RATE, CHECK) == (0.005, 0.25)
    assert holder_duration(lease) == pytest.approx(expected, abs=1e-6)
    assert holder_duration(lease) == pytest.approx((lease / 1.005 - 0.25) * 0.995)


@given(LEASES, st.tuples(RATES, RATES), st.floats(0, CHECK), st.floats(0, 1000), st.floats(0, 1000))
def test_the_holder_stops_before_the_grantors_lease_is_over(
    lease: float, rates: tuple[float, float], delay: float, sent: float, transit: float
) -> None:
    """For any two clock rates within r, any effect within D of its check, any time on the way."""
    last = effect(holder_duration(lease), rates[0], sent, delay)
    assert last <= freed(lease, rates[1], sent + transit) + 1e-6


@given(LEASES, st.floats(1.0001, 2))
def test_a_longer_duration_would_not_be_safe(lease: float, factor: float) -> None:
    """The formula is the longest one that holds: a little more, and two clocks break it."""
    held = max(holder_duration(lease), 0.01) * factor
    assert effect(held, 1 - RATE, 0, CHECK) > freed(lease, 1 + RATE, 0)


@given(st.floats(2.5, 1000), st.floats(0.05, 10))
def test_counting_from_receipt_would_not_be_safe(lease: float, answer_transit: float) -> None:
    """The grantor counts from when it took the request: a holder that counts from the answer is late."""
    last = effect(holder_duration(lease), 1 - RATE, answer_transit, CHECK)
    assert last > freed(lease, 1 + RATE, 0)


@pytest.mark.parametrize(
    ("pods", "period"), [(0, 0.5), (1, 0.5), (1000, 0.5), (1001, 0.5005), (20_000, 10.0)]
)
def test_many_pods_renew_more_seldom(pods: int, period: float) -> None:
    """max(0.5 s, pods / 2000 s)."""
    assert renew_period(pods) == pytest.approx(period)


@pytest.mark.parametrize(("pods", "liveness"), [(0, 3.0), (1200, 3.0), (1201, 3.0025), (20_000, 50.0)])
def test_the_liveness_lease_lasts_five_periods(pods: int, liveness: float) -> None:
    """max(L, 5 x period)."""
    assert Leases(liveness=3, allocation=300, leader=3).effective_liveness(pods) == pytest.approx(liveness)


def test_the_least_settings_are_fine() -> None:
    """Each relation at its border."""
    leases = Leases(liveness=2.5, allocation=2.5001, leader=1.0)
    assert (leases.liveness, leases.allocation, leases.leader) == (2.5, 2.5001, 1.0)
    check_usage_lag("amfid", 300, 300)
    check_usage_lag("amfid", 0, 300)


@pytest.mark.parametrize(
    ("liveness", "allocation", "leader", "text"),
    [
        (3, 300, 0.999, "DRSM_LEADER_TTL: expected T >= 1.0 s, found 0.999 s"),
        (2.499, 300, 3, "DRSM_LIVENESS_TTL: expected L >= 5 x 0.5 s, found 2.499 s"),
        (3.0, 3.0, 3, "DRSM_ALLOCATION_TTL: expected A > L (3.0 s), found 3.0 s"),
        (3.0, 2.0, 3, "DRSM_ALLOCATION_TTL: expected A > L (3.0 s), found 2.0 s"),
        (3, 300, math.nan, "DRSM_LEADER_TTL: expected T >= 1.0 s, found nan s"),
        (math.nan, 300, 3, "DRSM_LIVENESS_TTL: expected L >= 5 x 0.5 s, found nan s"),
        (3.0, math.nan, 3, "DRSM_ALLOCATION_TTL: expected A > L (3.0 s), found nan s"),
        (math.inf, math.inf, 3, "DRSM_ALLOCATION_TTL: expected A > L (inf s), found inf s"),
    ],
)
def test_a_broken_relation_is_refused(liveness: float, allocation: float, leader: float, text: str) -> None:
    """The message has the setting, the relation and the value."""
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        Leases(liveness=liveness, allocation=allocation, leader=leader)


@pytest.mark.parametrize("usage_lag", [300.001, math.nan])
def test_a_usage_lag_above_the_allocation_lease_is_refused(usage_lag: float) -> None:
    """W <= A, by pool."""
    text = f"usage_lag_ms of pool amfid: expected W <= A (300 s), found {usage_lag} s"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        check_usage_lag("amfid", usage_lag, 300)
