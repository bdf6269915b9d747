"""Real mongods: a replica set of one or three members, or a standalone one (which the agent refuses)."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from drsm_agent.embedded.binaries import find_mongod
from drsm_agent.embedded.errors import ServerFailed
from drsm_agent.embedded.scratch import Scratch
from drsm_agent.embedded.server import READY_SECONDS, Server, together
from drsm_agent.store import replica_set

SET_NAME = "rs0"
ELECTION_TIMEOUT_MS = 2000
OPLOG_MB = 64
CACHE_GB = 0.25
JOURNAL_FILE = "16MB"  # three files are made in advance, by default of 100 MB each

# What a throw-away server need not do: measure itself every second, and go on for 15 s after SIGTERM.
# The TTL monitor: Go DRSM's keepalives expire, and nobody wants to wait its usual minute for that.
PARAMETERS = {
    "ttlMonitorSleepSecs": "1",
    "diagnosticDataCollectionEnabled": "false",
    "shutdownTimeoutMillisForSignaledShutdown": "0",
}


class Mongod(Server):
    """One mongod on 127.0.0.1; port and data are kept over restarts."""

    def __init__(
        self,
        scratch: Scratch,
        binary: Path,
        *,
        port: int | None = None,
        parameters: Mapping[str, object] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(scratch, "mongod", ready='"Waiting for connections"', port=port)
        self.argv = [
            *(str(binary), "--dbpath", str(self.home), "--bind_ip", "127.0.0.1", "--nounixsocket"),
            *("--wiredTigerCacheSizeGB", str(CACHE_GB)),
            *("--wiredTigerEngineConfigString", f"log=(file_max={JOURNAL_FILE})"),
            *options,
        ]
        for name, value in {**PARAMETERS, **(parameters or {})}.items():
            self.argv += ["--setParameter", f"{name}={value}"]

    @property
    def url(self) -> str:
        """Leads to this member alone, whatever the state of its replica set."""
        return f"mongodb://{self.address}/?directConnection=true"


class ReplicaSet:
    """A running replica set; `url` is what applications are given."""

    def __init__(self, members: list[Mongod]) -> None:
        self.members = members

    @property
    def url(self) -> str:
        return f"mongodb://{','.join(self._addresses)}/?replicaSet={SET_NAME}"

    async def await_primary(self, timeout: float = READY_SECONDS) -> Mongod:
        """Wait until there is a writable primary, and say which member it is."""
        address = await replica_set.await_primary(self.url, timeout)
        return self.members[self._addresses.index(address)]

    async def await_members(self, timeout: float = READY_SECONDS) -> None:
        """Wait until the set is whole: a writable primary, and all others its secondaries."""
        await replica_set.await_primary(self.url, timeout)
        await replica_set.await_members(self.url, timeout)

    @property
    def _addresses(self) -> list[str]:
        return [member.address for member in self.members]


async def start_replica_set(
    scratch: Scratch,
    members: int = 1,
    *,
    port: int | None = None,
    oplog_mb: int = OPLOG_MB,
    election_timeout_ms: int = ELECTION_TIMEOUT_MS,
    parameters: Mapping[str, object] | None = None,
) -> ReplicaSet:
    """Start a replica set and wait until it is writable and whole.

    A given port is the first member's, the others take the next ones. `parameters` are mongod's
    (`--setParameter`), for example `{"enableTestCommands": 1, "ttlMonitorSleepSecs": 1}`.
    """
    binary = await _found()
    options = ("--replSet", SET_NAME, "--oplogSize", str(oplog_mb))
    ports = [None if port is None else port + number for number in range(members)]
    started = ReplicaSet(
        [Mongod(scratch, binary, port=port, parameters=parameters, options=options) for port in ports]
    )
    await together(*(member.start() for member in started.members))
    await replica_set.initiate([member.address for member in started.members], SET_NAME, election_timeout_ms)
    try:
        await started.await_members()
    except TimeoutError as error:
        raise ServerFailed(f"{error}\n{started.members[0].log_tail()}") from error
    return started


async def start_standalone(scratch: Scratch, *, port: int | None = None) -> Mongod:
    """Start a mongod that is no replica set, and so has no change streams."""
    mongod = Mongod(scratch, await _found(), port=port)
    await mongod.start()
    return mongod


async def _found() -> Path:
    """The mongod to use. Who is cancelled waits for the search all the same: it runs mongod once, without a
    mark, and nothing of a start may outlive its scratch."""
    finding = asyncio.ensure_future(asyncio.to_thread(find_mongod))
    try:
        return await asyncio.shield(finding)
    except asyncio.CancelledError:
        await asyncio.gather(finding, return_exceptions=True)
        raise
