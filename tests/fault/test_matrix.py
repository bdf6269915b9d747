"""Every fault under load: nobody has to notice it, and afterwards all is as it was (G1, G4 to G7)."""

import os

import pytest

from tests.fault.faults import FAULTS
from tests.fault.world import TEST_SECONDS, World

pytestmark = [
    pytest.mark.timeout(TEST_SECONDS),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
"""nats-py forgets the connection on which a paused server did not greet it; the collector closes it."""


OFTEN = (
    "MongoDB primary killed",
    "NATS all paused (half-open)",
    "leader paused and back",
    "rolling update",
    "leader cut from both",
)
"""One of each sort, in every run of the tests; `make faults` strikes with all of them."""


@pytest.mark.parametrize("name", FAULTS if os.environ.get("FAULTS") == "all" else OFTEN)
async def test_a_fault_costs_no_allocation_and_leaves_nothing_behind(broken: World, name: str) -> None:
    """No duplicate, no allocation failed that stock could serve, no session lost that was not away, demuxes
    equal to MongoDB, agents up and no larger; `World.strike` judges."""
    fault = FAULTS[name]
    row = await broken.strike(name, fault)
    assert row.issued > 0
    if name == "rolling update":
        assert row.waited > 0  # or it was nothing that no allocation failed
    if fault.may_lose:
        assert row.sessions_lost == len(fault.may_lose)
