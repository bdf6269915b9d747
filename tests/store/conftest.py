"""The same tests for both stores: each gets a database, or a memory, that nobody else uses."""

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from drsm_agent.store.memory import MemoryStore
from drsm_agent.store.mongo import MongoStore
from tests.store.tools import PATIENCE_SECONDS, POOLS, AnyStore, Stand


@pytest.fixture(params=["memory", "mongo"])
def make(request: pytest.FixtureRequest, database: str) -> Callable[[], AnyStore]:
    """Makes the store of this test; real ones share a database, so that two can meet in it."""
    if request.param == "memory":
        return lambda: MemoryStore(POOLS)
    url = request.getfixturevalue("mongo_url")
    return lambda: MongoStore(url, database, dict.fromkeys(POOLS, database), timeout=PATIENCE_SECONDS)


@pytest_asyncio.fixture
async def store(make: Callable[[], AnyStore]) -> AsyncIterator[AnyStore]:
    store = make()
    yield store
    await store.close()


@pytest_asyncio.fixture
async def mongo(mongo_url: str, database: str) -> AsyncIterator[Stand]:
    """A MongoStore with the driver's client beside it, to do what operators and Go pods do."""
    async with Stand.open(mongo_url, database) as stand:
        yield stand
