"""The whole, simulated: real agents, pods and demuxes on virtual time, and what may befall them.

`make simulate SEEDS=100000` is the long run. A seed that breaks something prints its story, and the
command that tells it again.
"""

import pytest

from tests.simulation.ablations import ABLATIONS, Ablation
from tests.simulation.profiles import PROFILES
from tests.simulation.run import outcomes, simulate

SEEDS = 160
SEEDS_OF_A_PROFILE = 8
ABLATION_SEEDS = 100
"""A safeguard that is missing shows within so many seeds; most of them within ten."""


def test_what_happens_follows_from_the_seed_alone() -> None:
    """Else no failing seed could be told again."""
    first, again, other = simulate(1), simulate(1), simulate(2)
    assert first.timeline == again.timeline
    assert first.timeline != other.timeline


@pytest.mark.timeout(600)
def test_no_guarantee_is_broken_whatever_happens() -> None:
    runs = [(seed, "any") for seed in range(SEEDS)]
    runs += [(seed, name) for name in PROFILES for seed in range(1000, 1000 + SEEDS_OF_A_PROFILE)]
    told = list(outcomes(runs))
    broken = [one.story for one in told if one.error is not None]
    assert not broken, "\n\n".join(broken)
    assert (
        sum(one.issued for one in told) > 1000 * len(runs) / 2
    )  # a world in which nothing works proves nothing
    assert sum(one.claims for one in told) > len(runs)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_without_a_safeguard_something_breaks(ablation: Ablation) -> None:
    with ablation.applied():
        errors = (simulate(seed, ablation.profile).error for seed in range(ABLATION_SEEDS))
        assert any(isinstance(error, AssertionError) for error in errors), ablation.rule
