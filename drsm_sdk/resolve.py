"""Host names to addresses, in threads of our own.

asyncio asks for them in the loop's default executor, which is the application's: one that keeps all its
threads busy would keep a pod from connecting again, until its leases are over.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache

THREADS_MAX = 4
"""A name server that hangs holds one for each name that is asked for, until the system gives up."""


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="drsm-resolve")


async def addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, in the order in which to try them. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_threads(), _ask, host, port)
    return list(dict.fromkeys(found))


def _ask(host: str, port: int) -> list[str]:
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
