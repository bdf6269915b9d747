"""A process with a port: what mongod and nats-server have in common."""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from drsm_agent.embedded.errors import PortTaken, ServerFailed
from drsm_agent.embedded.processes import Process
from drsm_agent.embedded.scratch import Scratch

READY_SECONDS = 60.0
POLL_SECONDS = 0.02

# Below the range from which the kernel takes ports for outgoing connections (32768 and up): while a
# server is down, no client's connection can take its port.
FREE_PORTS = range(20_000, 32_000)
PORT_ATTEMPTS = 10
PORTS_REMEMBERED = len(FREE_PORTS) // 4
"""So many others are given before a port is given again: whoever has it may listen only later."""
_given: deque[int] = deque(maxlen=PORTS_REMEMBERED)


class Server(Process):
    """A process that takes `--port`, listens there on 127.0.0.1, and then logs the text `ready`.

    The log is asked and not the port, where a stranger might answer.
    """

    def __init__(self, scratch: Scratch, name: str, *, ready: str, port: int | None) -> None:
        super().__init__(scratch, name)
        self._ready = ready
        self._port = port

    @property
    def port(self) -> int:
        """The port it listens on; kept over restarts."""
        if self._port is None:
            raise RuntimeError(f"{self.name} has no port yet: await start() first")
        return self._port

    @property
    def address(self) -> str:
        """Its `host:port`."""
        return f"127.0.0.1:{self.port}"

    async def start(self, timeout: float = READY_SECONDS) -> None:
        """Start it and wait until it listens; raises ServerFailed, or PortTaken if the port was given."""
        if self._port is not None:
            return await self._start_on(self._port, timeout)
        for _ in range(PORT_ATTEMPTS - 1):
            with suppress(PortTaken):  # somebody was faster: another port will do
                return await self._start_on(free_port(), timeout)
        return await self._start_on(free_port(), timeout)

    def _command(self) -> list[str]:
        return [*self.argv, "--port", str(self.port)]

    async def _start_on(self, port: int, timeout: float) -> None:
        self._port = port
        begin = self.log.stat().st_size if self.log.exists() else 0
        await super().start()
        try:
            async with asyncio.timeout(timeout):
                await self._listening(begin)
        except TimeoutError:
            await self.kill()
            raise self._failure(ServerFailed, f"was not ready within {timeout:g} s") from None

    async def _listening(self, begin: int) -> None:
        while self._ready not in self.log_since(begin):
            if self.returncode is not None:
                raise self._early_end(begin)
            await asyncio.sleep(POLL_SECONDS)

    def _early_end(self, begin: int) -> ServerFailed:
        if "address already in use" in self.log_since(begin).lower():
            return self._failure(PortTaken, f"found its port {self.port} in use: name another one, or none")
        return self._failure(ServerFailed, f"ended with code {self.returncode} before it was ready")

    def _failure(self, kind: type[ServerFailed], what: str) -> ServerFailed:
        return kind(f"{self.name} {what}. The end of its log, {self.log}:\n{self.log_tail()}")


async def together(*starts: Coroutine[Any, Any, None]) -> None:
    """Run them at once; the first failure cancels the others and is raised alone, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(start)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def free_port() -> int:
    """A port that nobody listens on just now, and nobody else here was given lately; only listening on it
    makes sure."""
    for port in random.sample(FREE_PORTS, 100):
        if port in _given:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            _given.append(port)
            return port
    raise ServerFailed(
        f"100 ports between {FREE_PORTS.start} and {FREE_PORTS.stop} were tried: all are in use"
    )
