"""Tests with the real Go module. Where there is no Go to build it with, none of them runs, and the summary
says so: users need none, and CI has it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from drsm_agent.embedded import Stack
from tests.harness import Domain
from tests.mixed.fleet import Fleet, fleet_of
from tests.mixed.original import GO, built

if GO is None:
    collect_ignore_glob = ["test_*.py"]


@pytest_asyncio.fixture(scope="session")
async def program() -> Path:
    """The program of a Go pod."""
    return await asyncio.to_thread(built)


@pytest_asyncio.fixture
async def fleet(domain: Domain, stack: Stack, program: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet in which, as is looked at in the end, no id was issued twice at a time."""
    async with fleet_of(domain, stack.scratch, program, tmp_path) as fleet:
        yield fleet


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Who asked for these tests alone has not mistyped a name."""
    if GO is None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if GO is None:
        terminalreporter.write_line(
            "tests/mixed did not run: no `go` on PATH to build the original DRSM with"
        )
