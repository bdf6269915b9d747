"""MongoDB and NATS together: all that an agent needs to run, in one `async with`."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from drsm_agent.embedded.mongod import ELECTION_TIMEOUT_MS, OPLOG_MB, ReplicaSet, start_replica_set
from drsm_agent.embedded.nats_server import NatsServer, start_nats_server
from drsm_agent.embedded.scratch import Scratch
from drsm_agent.embedded.server import together


@dataclass(kw_only=True)
class Stack:
    """`async with Stack() as stack:`; inside it both servers are ready, after it nothing is left of them.

    More servers that live as long can be started in `stack.scratch`.
    """

    mongo_members: int = 1
    mongo_port: int | None = None
    mongo_parameters: Mapping[str, object] | None = None
    oplog_mb: int = OPLOG_MB
    election_timeout_ms: int = ELECTION_TIMEOUT_MS
    nats_port: int | None = None
    nats_config: str = ""

    scratch: Scratch = field(init=False)
    mongo: ReplicaSet = field(init=False)
    nats: NatsServer = field(init=False)

    @property
    def mongo_url(self) -> str:
        return self.mongo.url

    @property
    def nats_url(self) -> str:
        return self.nats.url

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as cleanup:
            self.scratch = await cleanup.enter_async_context(Scratch())
            await together(self._start_mongo(), self._start_nats())
            self._cleanup = cleanup.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._cleanup.__aexit__(kind, error, trace)

    async def ended(self) -> str:
        """Returns when one of the servers has ended by itself, with its name, exit code and last words."""
        servers = [*self.mongo.members, self.nats]
        waits = [asyncio.create_task(server.wait()) for server in servers]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        server = next(server for server in servers if server.returncode is not None)
        return f"{server.name} ended with {server.returncode}. Its last words:\n{server.log_tail()}"

    async def _start_mongo(self) -> None:
        self.mongo = await start_replica_set(
            self.scratch,
            self.mongo_members,
            port=self.mongo_port,
            oplog_mb=self.oplog_mb,
            election_timeout_ms=self.election_timeout_ms,
            parameters=self.mongo_parameters,
        )

    async def _start_nats(self) -> None:
        self.nats = await start_nats_server(self.scratch, port=self.nats_port, config=self.nats_config)
