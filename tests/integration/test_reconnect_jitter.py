"""A thousand clients that lost their server together do not come back in one moment."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from drsm_agent.bus.nats_bus import RECONNECT_WAIT_MAX, NatsBus, _Client
from drsm_sdk.nats_transport import RECONNECT_FIRST, RECONNECT_MOST, NatsTransport

Wait = Callable[[list[SimpleNamespace]], float]


def of_the_agent() -> Wait:
    bus = NatsBus(_Client(tls=False))
    return lambda servers: bus._next_server(servers, None)[1]


def of_the_sdk() -> Wait:
    transport = NatsTransport("nats://127.0.0.1:4222")
    return lambda servers: transport._next_server(servers, {})[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("tries", [0, 3, 100])
@pytest.mark.parametrize(
    ("made", "first", "most"),
    [(of_the_agent, 0.1, RECONNECT_WAIT_MAX), (of_the_sdk, RECONNECT_FIRST, RECONNECT_MOST)],
    ids=["agent", "sdk"],
)
async def test_each_try_to_reconnect_waits_another_time_within_its_bound(
    made: Callable[[], Wait], first: float, most: float, tries: int
) -> None:
    """Longer after more tries, never longer than the bound, and spread over much of it."""
    wait, longest = made(), min(most, first * 2**tries)
    waits = [wait([SimpleNamespace(reconnects=tries)]) for _ in range(100)]
    assert len(set(waits)) > 50
    assert min(waits) >= 0
    assert max(waits) <= longest
    assert max(waits) - min(waits) > longest / 4
