"""The whole, simulated: real agents, pods and demuxes on virtual time, and what may befall them.

`make simulate SEEDS=100000` is the long run. A seed that breaks something prints its story, and the
command that tells it again.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.pool import AsyncResult
from typing import Any

import pytest

from drsm_sdk.stock import Stock
from tests.simulation.ablations import ABLATIONS, Ablation
from tests.simulation.observer import Violation
from tests.simulation.profiles import PROFILES, RESTORES, WRONG_CLOCKS, profile_of
from tests.simulation.run import outcomes, simulate
from tests.simulation.world import ANY, FAULTS

SEEDS = 300
SEEDS_OF_A_PROFILE = 2
SEEDS_OF_WRONG_CLOCKS = 8
"""Enough for some pods to be declared dead while they count on their lease, and to hear of it in time."""
ABLATION_SEEDS = 600
"""A safeguard that is missing shows within so many seeds; most of them within twenty."""
BUSY_SECONDS = 1200.0
"""Bound against hanging: all seeds take six minutes on two processors that have three times as much to do."""


def test_what_happens_follows_from_the_seed_alone() -> None:
    """Else no failing seed could be told again."""
    first, again, other = simulate(1), simulate(1), simulate(2)
    assert first.timeline == again.timeline
    assert first.timeline != other.timeline


def test_another_process_tells_the_same_story() -> None:
    """A seed that failed in CI can be told again anywhere, however strings are hashed there."""
    replay = [sys.executable, "-m", "tests.simulation", "--seed", "1", "--profile", RESTORES.name]
    runs = [
        subprocess.Popen(replay, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE)
        for seed in ("1", "2")
    ]
    one, other = (run.communicate()[0] for run in runs)
    assert one == other
    assert one.count(b"\n") > 50  # a story in which nothing happens is the same anywhere


@pytest.mark.timeout(BUSY_SECONDS)
def test_no_guarantee_is_broken_whatever_happens() -> None:
    runs = [(seed, "any") for seed in range(SEEDS)]
    runs += [(seed, name) for name in PROFILES for seed in range(1000, 1000 + SEEDS_OF_A_PROFILE)]
    runs += [(seed, WRONG_CLOCKS.name) for seed in range(SEEDS_OF_WRONG_CLOCKS)]
    told = list(outcomes(runs))
    broken = [one.story for one in told if one.error is not None]
    assert not broken, "\n\n".join(broken)
    assert sum(one.issued for one in told) > 100 * len(runs)  # a world in which nothing works proves nothing
    assert sum(one.claims for one in told) > len(runs)
    assert set().union(*(one.faults for one in told)) >= {*FAULTS, "change_settings", "restore"}
    assert {one.profile for one in told if one.contradicted} == {WRONG_CLOCKS.name}
    assert {one.profile for one in told if one.alarms} == {WRONG_CLOCKS.name}


def test_a_long_run_reaches_every_kind_of_world() -> None:
    told = [profile_of(seed) for seed in range(1000)]
    assert set(told) == set(PROFILES)
    assert told.count(ANY.name) > len(told) / 2  # small worlds are cheap


Searches = dict[str, "AsyncResult[int | None]"]


@pytest.fixture(scope="module")
def searches() -> Iterator[Searches]:
    """All ablations at once, on all processors."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        yield {
            ablation.name: pool.apply_async(first_violation, (number,))
            for number, ablation in enumerate(ABLATIONS)
        }


def first_violation(number: int) -> int | None:
    """The first seed at which it shows that an ablation's safeguard is missing."""
    ablation = ABLATIONS[number]
    return first_of([ablation.hint, *range(ABLATION_SEEDS)], ablation)


def first_of(seeds: Iterable[int], ablation: Ablation) -> int | None:
    """The first of some seeds at which a guarantee is broken; whatever else breaks shows nothing."""
    with ablation.applied():
        for seed in seeds:
            if isinstance(simulate(seed, ablation.profile).error, Violation):
                return seed
    return None


def test_only_a_broken_guarantee_shows_that_a_safeguard_is_missing() -> None:
    """An assertion that fails shows that the patch does not fit the code any more."""

    def fails(*_: Any) -> None:
        raise AssertionError

    misfit = Ablation("a patch that does not fit", "G1", ANY, ((Stock, "take", fails),))
    with misfit.applied():
        assert isinstance(simulate(0).error, AssertionError)
    assert first_of([0], misfit) is None


@pytest.mark.timeout(BUSY_SECONDS)
@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_without_a_safeguard_something_breaks(ablation: Ablation, searches: Searches) -> None:
    assert searches[ablation.name].get(timeout=BUSY_SECONDS) is not None, ablation.rule
