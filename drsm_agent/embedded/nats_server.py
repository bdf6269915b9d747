"""A real nats-server; core NATS, unless JetStream is asked for."""

import asyncio
from pathlib import Path

from drsm_agent.embedded.binaries import find_nats_server
from drsm_agent.embedded.scratch import Scratch
from drsm_agent.embedded.server import Server


class NatsServer(Server):
    """One nats-server on 127.0.0.1; the port is kept over restarts."""

    def __init__(
        self,
        scratch: Scratch,
        binary: Path,
        *,
        port: int | None = None,
        config: str = "",
        jetstream: bool = False,
    ) -> None:
        super().__init__(scratch, "nats-server", ready="Server is ready", port=port)
        file = self.home / "nats.conf"
        file.write_text(config)
        self.argv = [str(binary), "--addr", "127.0.0.1", "--config", str(file)]
        if jetstream:
            self.argv += ["--jetstream", "--store_dir", str(self.home)]

    @property
    def url(self) -> str:
        return f"nats://{self.address}"


async def start_nats_server(
    scratch: Scratch, *, port: int | None = None, config: str = "", jetstream: bool = False
) -> NatsServer:
    """Start a nats-server and wait until it takes connections; `config` is text of its configuration file."""
    binary = await asyncio.to_thread(find_nats_server)
    server = NatsServer(scratch, binary, port=port, config=config, jetstream=jetstream)
    await server.start()
    return server
