"""Where clients turn that lost their server, and when: a thousand of them do not come back in one moment."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from drsm_agent.bus.nats_bus import RECONNECT_WAIT_MAX, NatsBus, _Client
from drsm_sdk.nats_transport import RECONNECT_FIRST, RECONNECT_MOST, NatsTransport

Choose = Callable[[list[Any]], tuple[Any, float]]


def of_the_agent(lost: str) -> Choose:
    bus = NatsBus(_Client(tls=False))
    bus._client._current_server = server(lost)  # type: ignore[assignment]
    return lambda servers: bus._next_server(servers, None)


def of_the_sdk(lost: str) -> Choose:
    client: Any = SimpleNamespace(_current_server=server(lost), _transport=None)
    transport = NatsTransport("nats://127.0.0.1:4222", _client=client)
    return lambda servers: transport._next_server(servers, {})


def server(uri: str, tries: int = 0) -> SimpleNamespace:
    return SimpleNamespace(uri=uri, reconnects=tries)


@pytest.mark.parametrize("tries", [0, 3, 100])
@pytest.mark.parametrize(
    ("made", "first", "most"),
    [(of_the_agent, 0.1, RECONNECT_WAIT_MAX), (of_the_sdk, RECONNECT_FIRST, RECONNECT_MOST)],
    ids=["agent", "sdk"],
)
async def test_each_try_to_reconnect_waits_another_time_within_its_bound(
    made: Callable[[str], Choose], first: float, most: float, tries: int
) -> None:
    """Longer after more tries, never longer than the bound, and spread over much of it."""
    choose, longest = made("a"), min(most, first * 2**tries)
    waits = [choose([server("a", tries)])[1] for _ in range(100)]
    assert len(set(waits)) > 50
    assert min(waits) >= 0
    assert max(waits) <= longest
    assert max(waits) - min(waits) > longest / 4


@pytest.mark.parametrize("made", [of_the_agent, of_the_sdk], ids=["agent", "sdk"])
async def test_the_server_that_was_just_lost_is_tried_after_those_that_failed_no_more(
    made: Callable[[str], Choose],
) -> None:
    """It may hang: then each try costs a time-out."""
    for lost in "abc":
        choose = made(lost)
        chosen = {choose([server(uri) for uri in "abc"])[0].uri for _ in range(50)}
        assert lost not in chosen
        assert choose([server(lost), *(server(uri, 1) for uri in "xy")])[0].uri == lost
        assert choose([server(lost)])[0].uri == lost
