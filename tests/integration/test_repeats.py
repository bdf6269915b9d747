"""Log lines that an outage would repeat."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import structlog

from drsm_agent import repeats
from drsm_agent.embedded import Scratch, start_nats_server, start_replica_set
from drsm_agent.repeats import Repeats
from tests.harness import Domain, within
from tests.integration.test_start import start_agent

AWAY_SECONDS = 12.0
LINES_MAX = 8
"""Of one kind, in so short an outage and the time around it."""


class Said:
    """What is let through, by a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self._repeats = Repeats(lambda: self.now)
        self.lines: list[tuple[float, dict[str, Any]]] = []

    def say(self, event: str, level: str = "warning", **fields: Any) -> None:
        try:
            line = self._repeats(None, level, {"event": event} | fields)
        except structlog.DropEvent:
            return
        self.lines.append((self.now, dict(line)))


def test_a_line_that_is_repeated_comes_at_growing_intervals_and_counts_what_was_left_out() -> None:
    said = Said()
    for tenth in range(2000):
        said.now = tenth / 10
        said.say("not_standing")
    assert [at for at, _ in said.lines] == [0, 2, 6, 14, 30, 62, 122, 182]
    assert [line.get("repeated", 0) for _, line in said.lines][:4] == [0, 19, 39, 79]
    assert sum(line.get("repeated", 0) for _, line in said.lines) + len(said.lines) == 1821


def test_after_a_quiet_minute_it_is_said_at_once_again() -> None:
    said = Said()
    for at in (0.0, 0.5, 61.0, 61.5):
        said.now = at
        said.say("not_standing")
    assert [at for at, _ in said.lines] == [0.0, 61.0]


def test_lines_about_different_things_are_all_said_and_so_are_those_of_no_trouble() -> None:
    said = Said()
    for pod in range(5):
        said.say("session_expired", pod=f"amf-{pod}")
        said.say("session_opened", level="info", pod="amf")
        said.say("crashed", level="critical")
    assert len(said.lines) == 15


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "KINDS_MAX", 10)
    said = Said()
    for pod in range(1000):
        said.say("session_expired", pod=f"amf-{pod}")
    assert len(said.lines) == 1000
    assert len(said._repeats._kinds) == 10


@pytest.mark.parametrize("away", ["nats", "mongodb"])
async def test_an_outage_makes_few_lines_of_each_kind(domain: Domain, away: str) -> None:
    """Of an agent that leads, and of one that stands by."""
    async with Scratch() as scratch:
        nats, mongo = await start_nats_server(scratch), await start_replica_set(scratch)
        here = replace(domain, nats_url=nats.url, mongo_url=mongo.url)
        agents = [await start_agent(here, DRSM_LOG_FORMAT="json") for _ in range(2)]
        said = [asyncio.create_task(_lines(agent)) for agent in agents]
        await asyncio.sleep(AWAY_SECONDS / 3)
        server = nats if away == "nats" else mongo.members[0]
        await server.kill()
        await asyncio.sleep(AWAY_SECONDS)
        await server.start()
        await asyncio.sleep(AWAY_SECONDS / 3)
        for agent in agents:
            agent.terminate()
        counts = [Counter(line["event"] for line in await within(lines)) for lines in said]
        for agent in agents:
            await within(agent.wait())
    assert all(count for count in counts)
    assert [{event: n for event, n in count.items() if n > LINES_MAX} for count in counts] == [{}, {}]


async def _lines(agent: asyncio.subprocess.Process) -> list[dict[str, Any]]:
    assert agent.stderr is not None
    return [json.loads(line) async for line in agent.stderr if line.startswith(b"{")]
