"""Two clocks that disagree: the holder of a lease has always stopped before its grantor's is over."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from drsm_agent.core.lease import (
    CHECK,
    RATE,
    Leases,
    check_usage_lag,
    holder_duration,
    renew_period,
)
from drsm_agent.core.session import LivenessLeases
from drsm_sdk.lease import Leases as PodLeases

RATES = st.one_of(st.floats(1 - RATE, 1 + RATE), st.sampled_from([1 - RATE, 1.0, 1 + RATE]))
LEASES = st.one_of(st.floats(0.5, 100_000), st.sampled_from([1.0, 2.5, 3.0, 300.0]))

KEY = ("amf-1", 1)


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


class TwoDriftingClocks(RuleBasedStateMachine):
    """A pod and the leader, each with the class that it counts with. Either clock runs at any rate within
    `r`, another one each moment; requests and answers are lost, late, doubled and reordered; the number of
    pods, and with it `L`, changes. In between any time may pass."""

    def __init__(self) -> None:
        super().__init__()
        self.pod_clock = self.leader_clock = 1000.0
        self.pod = PodLeases()
        self.leader = LivenessLeases()
        self.leases = Leases(liveness=3.0, allocation=7.0, leader=1.0)
        self.may_issue_until = float("-inf")  # the allocation lease, as the leader counts it
        self.requests: list[float] = []  # on the pod's clock
        self.answers: list[tuple[float, int, int]] = []
        self.over = False

    @rule(seconds=st.floats(0, 4), rates=st.tuples(RATES, RATES))
    def time_passes(self, seconds: float, rates: tuple[float, float]) -> None:
        self.pod_clock += seconds * rates[0]
        self.leader_clock += seconds * rates[1]

    @rule(liveness=st.booleans(), rates=st.sampled_from([(1 - RATE, 1 + RATE), (1.0, 1.0)]))
    def time_passes_up_to_the_pods_deadline(self, liveness: bool, rates: tuple[float, float]) -> None:
        """Where it matters most: the pod's clock as slow, the leader's as fast as can be."""
        deadline = self.pod.liveness_until if liveness else self.pod.allocation_until
        if deadline > self.pod_clock:
            seconds = (deadline - self.pod_clock) / rates[0]
            self.pod_clock = deadline - 1e-7
            self.leader_clock += seconds * rates[1]

    @rule()
    def the_pod_asks(self) -> None:
        self.requests.append(self.pod_clock)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), pods=st.sampled_from([1, 1300, 3000]))
    def the_leader_hears(self, data: st.DataObject, pods: int) -> None:
        """Any request that was ever sent. The lease is extended before the answer leaves."""
        sent = data.draw(st.sampled_from(self.requests))
        lease = self.leases.effective_liveness(pods)
        if self.leader.extend(KEY, self.leader_clock + lease):
            self.may_issue_until = max(self.may_issue_until, self.leader_clock + self.leases.allocation)
            liveness, allocation = holder_duration(lease), holder_duration(self.leases.allocation)
            self.answers.append((sent, int(liveness * 1000), int(allocation * 1000)))

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def the_pod_hears(self, data: st.DataObject) -> None:
        """Any answer that was ever given."""
        self.pod.granted(*data.draw(st.sampled_from(self.answers)))

    @rule()
    def the_leader_judges(self) -> None:
        if due := self.leader.due(self.leader_clock):
            self.leader.end(due, "expired")
            self.over = True

    @invariant()
    def whatever_the_pod_may_begin_takes_effect_before_its_lease_is_over(self) -> None:
        """A check now, an effect `D` later, on a leader's clock that is as fast as can be."""
        effect = self.leader_clock + CHECK * (1 + RATE) - 1e-6
        state = self.pod.state(self.pod_clock)
        if state == "live":
            assert not self.over
            assert not self.leader.lapsed(KEY, effect)
        if state != "lapsed":
            assert effect < self.may_issue_until


TestTwoDriftingClocks = TwoDriftingClocks.TestCase
TestTwoDriftingClocks.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


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


def test_all_broken_relations_are_told_at_once() -> None:
    """Else an operator would mend one after the other."""
    with pytest.raises(ValueError, match="DRSM_LEADER_TTL") as refused:
        Leases(liveness=2, allocation=1, leader=0.5)
    assert [line.split(":")[0] for line in str(refused.value).split("\n")] == [
        "DRSM_LEADER_TTL",
        "DRSM_LIVENESS_TTL",
        "DRSM_ALLOCATION_TTL",
    ]


@pytest.mark.parametrize("usage_lag", [300.001, math.nan])
def test_a_usage_lag_above_the_allocation_lease_is_refused(usage_lag: float) -> None:
    """W <= A, by pool."""
    text = f"usage_lag_ms of pool amfid: expected W <= A (300 s), found {usage_lag} s"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        check_usage_lag("amfid", usage_lag, 300)
