"""Faults one after the other, without a rest: `python -m tests.fault.soak` for longer."""

import pytest

from tests.fault.soak import soak
from tests.fault.world import TEST_SECONDS, World

pytestmark = [
    pytest.mark.timeout(TEST_SECONDS),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
"""nats-py forgets the connection on which a paused server did not greet it; the collector closes it."""

STRIKES = 4
SEED = 66
"""By which the first faults are one of MongoDB and one of NATS, then a leader's and pods'."""


@pytest.mark.timeout(STRIKES * TEST_SECONDS)
async def test_random_faults_is_not_felt(broken: World) -> None:
    """Always the same ones; another seed is for the long soak."""
    before = len(broken.rows)
    assert await soak(broken, range(STRIKES), every=0.0, seed=SEED) == []
    assert {row.fault.split()[0] for row in broken.rows[before:]} >= {"MongoDB", "NATS"}
