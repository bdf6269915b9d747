"""Lease arithmetic: who may count on what, when two clocks disagree (rules R1 and R3).

Durations are seconds on the holder's own clock, which counts suspended time. `RATE` bounds how far
one machine's clock rate is off, so two machines differ by at most twice that; `CHECK` is the longest
time from a lease check to its effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass

RATE = 0.005
CHECK = 0.25
RENEW_MIN = 0.5
RENEWALS_PER_SECOND = 2000
"""What one leader answers without effort; more pods renew less often (Nomad does the same)."""
RENEWALS_PER_LEASE = 5
LEADER_TTL_MIN = 1.0


def holder_duration(lease: float) -> float:
    """What the holder of a lease of `lease` seconds counts from before it sent: `(L/(1+r) - D) * (1-r)`."""
    return (lease / (1 + RATE) - CHECK) * (1 - RATE)


def whole_ms(seconds: float) -> int:
    """Whole milliseconds, never more than there are: a holder must not count on the rest."""
    return int(seconds * 1000)


def renew_period(pods: int) -> float:
    """Seconds between two renewals of one pod."""
    return max(RENEW_MIN, pods / RENEWALS_PER_SECOND)


@dataclass(frozen=True, slots=True)
class Leases:
    """The three configured durations, in seconds. Raises ValueError with a line for each broken relation."""

    liveness: float
    allocation: float
    leader: float

    def __post_init__(self) -> None:
        if broken := "\n".join(self._broken()):
            raise ValueError(broken)

    def _broken(self) -> Iterator[str]:
        least = RENEWALS_PER_LEASE * RENEW_MIN
        if not self.leader >= LEADER_TTL_MIN:
            yield _found(f"T >= {LEADER_TTL_MIN} s", "DRSM_LEADER_TTL", self.leader)
        if not self.liveness >= least:
            yield _found(f"L >= {RENEWALS_PER_LEASE} x {RENEW_MIN} s", "DRSM_LIVENESS_TTL", self.liveness)
        if not self.allocation > self.liveness:
            yield _found(f"A > L ({self.liveness} s)", "DRSM_ALLOCATION_TTL", self.allocation)

    def effective_liveness(self, pods: int) -> float:
        """`L`, or more when so many pods renew so seldom that `L` would be less than five periods."""
        return max(self.liveness, RENEWALS_PER_LEASE * renew_period(pods))


def check_usage_lag(pool: str, usage_lag: float, allocation: float) -> None:
    """`W <= A`. Raises ValueError."""
    if not usage_lag <= allocation:
        raise ValueError(_found(f"W <= A ({allocation} s)", f"usage_lag_ms of pool {pool}", usage_lag))


def _found(relation: str, setting: str, value: float) -> str:
    return f"{setting}: expected {relation}, found {value} s; raise or lower it accordingly"
