"""The real servers: one MongoDB and one NATS for the whole run, a database and a subject prefix per test.

Where they cannot be started the tests fail: a run that skipped them would prove nothing.
"""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio
from hypothesis import settings

from drsm_agent.embedded import Stack
from drsm_agent.embedded.server import free_port
from tests.harness import Domain

settings.register_profile("drsm", deadline=None)  # a busy machine is no failure
settings.load_profile("drsm")


@pytest_asyncio.fixture(scope="session")
async def stack() -> AsyncIterator[Stack]:
    """A replica set of one member and a nats-server, shared by all tests: do not stop or pause them."""
    async with Stack() as stack:
        yield stack


@pytest.fixture(scope="session")
def mongo_url(stack: Stack) -> str:
    return stack.mongo_url


@pytest.fixture(scope="session")
def nats_url(stack: Stack) -> str:
    return stack.nats_url


@pytest.fixture
def database() -> str:
    """The name of a database that no other test uses."""
    return f"t{uuid4().hex[:8]}"


@pytest.fixture
def prefix() -> str:
    """A subject prefix that no other test uses."""
    return f"t{uuid4().hex[:8]}"


@pytest.fixture
def unused_tcp_port() -> int:
    """A port that nobody listens on, and that no outgoing connection is given before the test takes it, as
    one of pytest-asyncio's fixture of this name may be."""
    return free_port()


@pytest.fixture
def domain(mongo_url: str, nats_url: str, database: str, prefix: str) -> Domain:
    """A domain that no other test uses, on the shared servers."""
    return Domain(mongo_url, nats_url, database, prefix)
