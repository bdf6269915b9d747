"""A TCP proxy that can stop carrying: what a partition looks like to the one behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

CHUNK = 65536


class Proxy:
    """Carries between clients and one server, until `silence`; after `carry_on` all of it arrives."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._host, self._port = parts.hostname or "", parts.port or 0
        self._carrying = asyncio.Event()
        self._carrying.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    def silence(self) -> None:
        """From now on nothing passes, in either direction; nobody is told."""
        self._carrying.clear()

    def carry_on(self) -> None:
        self._carrying.set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.CancelledError):  # of `stop`: asyncio complains of handlers that end so
            await self._carry(reader, writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._carrying.wait()
        server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, server_writer))
                both.create_task(self._pump(server_reader, writer))
        except* OSError:
            pass  # one side went away: so does the other
        finally:
            writer.close()
            server_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._carrying.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # cancelled: that is what was asked for


@asynccontextmanager
async def proxy(server: str) -> AsyncIterator[Proxy]:
    """A proxy in front of `server`, at `url`."""
    carrying = Proxy(server)
    listening = await asyncio.start_server(carrying.accept, "127.0.0.1", 0)
    carrying.url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield carrying
    finally:
        listening.close()
        await carrying.stop()
