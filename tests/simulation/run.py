"""One seed, from its beginning to its judgement."""

import asyncio
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import structlog

from drsm_agent.core import lease
from drsm_sdk import demand, supply
from tests.simulation import go_pod
from tests.simulation.loop import Spinning, Stuck, VirtualLoop
from tests.simulation.loop import run as run_loop
from tests.simulation.mixed import MixedWorld
from tests.simulation.profiles import PROFILES
from tests.simulation.world import ANY, Profile, World

Run = tuple[int, str]
"""A seed and the name of a profile."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a seed: the error that ended it, if any, and what happened until then."""

    seed: int
    error: BaseException | None
    timeline: list[str]
    issued: int
    claims: int
    profile: str
    contradicted: int
    """Incarnations that were declared dead while they counted on their lease."""
    alarms: int
    """How often a pod noticed that."""
    faults: frozenset[str]
    """What befell the world."""

    @property
    def story(self) -> str:
        """Readable, with the command that replays it."""
        ended = f"broke: {self.error}" if self.error is not None else "held"
        replay = f"python -m tests.simulation --seed {self.seed} --profile {self.profile}"
        return "\n".join([*self.timeline, f"seed {self.seed} {ended}", f"again: {replay}"])


def simulate(seed: int, profile: Profile = ANY) -> Outcome:
    worlds: list[World] = []

    async def live() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        world = (MixedWorld if profile.go else World)(loop, seed, profile)
        worlds.append(world)
        try:
            await world.live()
        finally:
            await world.end()

    error: BaseException | None = None
    with (
        quiet(),
        scaled(profile),
        patch.object(lease, "RATE", profile.rate),
        patch.object(supply, "IDLE", profile.idle),
        patch.object(demand, "AHEAD", profile.ahead),
    ):
        try:
            run_loop(live())
        except (AssertionError, Exception, Spinning, Stuck) as failure:
            error = failure
    observer = worlds[0].observer
    return Outcome(
        seed,
        error,
        observer.timeline,
        observer.issued,
        observer.claims,
        profile.name,
        contradicted=len(observer.contradicted),
        alarms=worlds[0].alarms,
        faults=frozenset(worlds[0].faults),
    )


@contextmanager
def scaled(profile: Profile) -> Iterator[None]:
    """Where there are Go pods, the seconds that both sides count are fewer, in proportion."""
    with ExitStack() as stack:
        for module, name, seconds in go_pod.SCALED if profile.go else ():
            stack.enter_context(patch.object(module, name, seconds))
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """A hundred simulated agents have nothing to say to a terminal."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        structlog.configure(**before)


def outcome(run: Run) -> Outcome:
    seed, profile = run
    return simulate(seed, PROFILES[profile])


def outcomes(runs: Sequence[Run]) -> Iterator[Outcome]:
    """Every run's outcome, on all processors. New processes now and then: what piles up ends with them."""
    with multiprocessing.get_context("spawn").Pool(maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(outcome, runs, chunksize=5)
