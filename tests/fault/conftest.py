"""One world for all tests of this package, and its table of faults at the end."""

import gc
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.fault.world import World, world

_tables: list[str] = []


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def broken(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world to break. Whoever breaks it waits until it is whole again."""
    async with world() as made:
        yield made
        file = tmp_path_factory.mktemp("faults") / "faults.json"
        made.report(file)
        _tables.append(f"{made.table_of_faults()}\n(also in {file})")
    gc.collect()  # what nats-py has forgotten is told here, where it is expected, and not in a later test


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each fault was felt."""
    for table in _tables:
        terminalreporter.section("faults")
        terminalreporter.write_line(table)
