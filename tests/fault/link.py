"""A way from one process to one server that can be cut: black hole, one way only, late, or reset.

MongoDB's drivers do not stay with the address they were given: they ask a member for the names of all and
connect to those. So a link to MongoDB puts the links' own addresses in the place of the members' in what
the servers say. Ports have five digits, which keeps every length in the messages.
"""

import asyncio
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

from drsm_agent.embedded.server import free_port

CHUNK = 65536
LENGTH = 4  # bytes of a MongoDB message that say how long it is


class Link:
    """Carries between clients and the server at `host:port` `server`; listens at `address`."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.names: Mapping[bytes, bytes] = {}
        """Addresses that the server says, and what clients are told instead; only for MongoDB."""
        self.delay = 0.0
        self._there, self._back = _open(), _open()
        self._refusing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None

    async def start(self) -> None:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def cut(self, *, there: bool = True, back: bool = True) -> None:
        """Carry nothing any more to the server (`there`), from it (`back`); nobody is told."""
        if there:
            self._there.clear()
        if back:
            self._back.clear()

    def reset(self) -> None:
        """End every connection with a RST, and each new one until `heal`."""
        self._refusing = True
        for task in self._tasks:
            task.cancel()

    def heal(self) -> None:
        """Carry on; what waited meanwhile arrives, as TCP has it."""
        self.delay, self._refusing = 0.0, False
        self._there.set()
        self._back.set()

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.close()
        self.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if not self._refusing:
                await self._carry(reader, writer)
        except asyncio.CancelledError:  # of `reset`: asyncio complains of handlers that end so
            pass
        finally:
            _reset(writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._there.wait()
        host, port = self.server.split(":")
        try:
            server_reader, server_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, server_writer, self._there))
                both.create_task(self._pump(server_reader, writer, self._back))
        except* (OSError, EOFError):
            pass  # one side went away: so does the other
        finally:
            _reset(server_writer)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carrying: asyncio.Event
    ) -> None:
        renaming = self.names if carrying is self._back else {}
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        loop = asyncio.get_running_loop()

        async def read() -> None:
            while data := await (_message(reader, renaming) if renaming else reader.read(CHUNK)):
                await late.put((loop.time() + self.delay, data))
            raise EOFError

        async def write() -> None:
            while True:
                due, data = await late.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                await carrying.wait()
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(read())
            both.create_task(write())


async def _message(reader: asyncio.StreamReader, names: Mapping[bytes, bytes]) -> bytes:
    """One whole message of MongoDB, so that no address is torn in two."""
    head = await reader.readexactly(LENGTH)
    data = head + await reader.readexactly(struct.unpack("<i", head)[0] - LENGTH)
    for said, told in names.items():
        data = data.replace(said, told)
    return data


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _open() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
