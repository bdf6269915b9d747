"""What asyncio and libraries do to a cancellation, and how it is heeded all the same.

A task group whose child fails while the group is being cancelled raises the child's error in place of
the cancellation, and leaves the count of cancellations wrong (until Python 3.13); nats-py and drivers
drop one here and there. A loop that goes on after that never ends.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


def heed() -> None:
    """Raise the CancelledError that somebody on the way has swallowed. Not for a task that has had a task
    group of its own: its count is not reliable."""
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


async def isolated(scope: Coroutine[Any, Any, None]) -> None:
    """Run a scope with task groups in a task of its own. Its errors are raised here, except when the caller
    is cancelled: then that counts, whatever else happens."""
    task = asyncio.create_task(scope)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen, and of no use to anybody any more
        raise
    task.result()
