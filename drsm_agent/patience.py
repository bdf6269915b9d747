"""How often to try again what MongoDB did not do.

For ever while it does not answer: an outage may last for hours, demuxes and pods go on meanwhile, and a new
process could do no better. But what it refuses, or loses again at once after everything was read anew, no
waiting mends; then the process ends and says what to do.
"""

import asyncio

from drsm_agent.errors import PositionLost, StoreBroken, StoreUnavailable
from drsm_agent.ports import Chance, Clock

PAUSE_MIN, PAUSE_MAX = 0.05, 1.0
"""Seconds between two attempts, doubling. Longer ones would only delay the recovery."""
REFUSALS_MIN = 5
REFUSED_SECONDS = 30.0
"""So many refusals in a row, over so long: rights that are moved from one role to another, or a new password
that has not reached every server yet, are there by then."""


class Patience:
    """For one thing that is tried in a loop. Where several share MongoDB, each has its own."""

    def __init__(self, clock: Clock, chance: Chance) -> None:
        self._clock, self._chance = clock, chance
        self.restore()

    def restore(self) -> None:
        """It worked."""
        self._pause = PAUSE_MIN
        self._refusals, self._since = 0, 0.0

    def count(self, error: StoreUnavailable | PositionLost) -> None:
        """It failed. Raises StoreBroken when nothing but refusals has come for too long."""
        if isinstance(error, StoreUnavailable) and error.end == StoreUnavailable.end:
            self._refusals = 0  # an outage: nothing is known meanwhile
            return
        now = self._clock()
        self._since = self._since if self._refusals else now
        self._refusals += 1
        if self._refusals >= REFUSALS_MIN and (over := now - self._since) >= REFUSED_SECONDS:
            raise StoreBroken(f"gave up after {self._refusals} attempts in {over:.0f} s: {error}") from error

    async def wait(self, error: StoreUnavailable | PositionLost) -> None:
        """Pause before the next attempt. Raises as `count` does."""
        self.count(error)
        await asyncio.sleep(self._chance.jitter(self._pause))
        self._pause = min(2 * self._pause, PAUSE_MAX)
