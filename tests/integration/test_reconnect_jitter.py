"""A thousand clients that lost their server together do not come back in one moment."""

from types import SimpleNamespace

import pytest

from drsm_agent.bus.nats_bus import RECONNECT_WAIT_MAX, NatsBus, _Client


@pytest.mark.parametrize("tries", [0, 3, 100])
async def test_each_try_to_reconnect_waits_another_time_within_its_bound(tries: int) -> None:
    """Longer after more tries, and never longer than the bound."""
    bus = NatsBus(_Client(tls=False))
    servers = [SimpleNamespace(reconnects=tries)]
    waits = [bus._next_server(servers, None)[1] for _ in range(100)]
    assert len(set(waits)) > 50
    assert min(waits) >= 0
    assert max(waits) <= min(RECONNECT_WAIT_MAX, 0.1 * 2 ** min(tries, 5))
