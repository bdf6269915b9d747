"""Time and chance: the two things the SDK takes from the machine, as parts a simulator can replace."""

import random
import time
from collections.abc import Callable
from functools import partial

Clock = Callable[[], float]
"""Seconds that never go back. Only differences between two readings of one clock mean anything."""

boottime: Clock = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""A clock that goes on while the machine is suspended, so that no lease outlives a sleep. A `partial`,
not a function: reading it is most of what allocating an id costs."""


class Chance:
    """Randomness for jitter and request ids. Give it a seeded `random.Random` and it repeats itself."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._source = source or random.SystemRandom()  # a forked process must not repeat its parent

    def token(self) -> str:
        """16 hex digits."""
        return f"{self._source.getrandbits(64):016x}"

    def jitter(self, seconds: float) -> float:
        """`seconds`, up to a tenth less or more."""
        return self._source.uniform(0.9, 1.1) * seconds

    def number(self, below: int) -> int:
        """From 0 to `below` - 1; by default of a source that nobody can guess."""
        return self._source.randrange(below)

    def below(self, seconds: float) -> float:
        """Between 0 and `seconds`."""
        return self._source.uniform(0.0, seconds)


class Backoff:
    """Delays that double from `first` to `most` seconds, each with jitter; `reset` after a success."""

    def __init__(self, chance: Chance, first: float, most: float) -> None:
        self._chance, self._first, self._most = chance, first, most
        self._next = first

    def reset(self) -> None:
        self._next = self._first

    def delay(self) -> float:
        """The next delay, in seconds."""
        now, self._next = self._next, min(self._next * 2, self._most)
        return self._chance.jitter(now)
