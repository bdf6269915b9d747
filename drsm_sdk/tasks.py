"""Background tasks that never end unseen."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("drsm_sdk")


class Tasks:
    """Tasks that belong to one object. The first unexpected exception of any is kept as `failure`,
    logged, told to `on_failure`, and ends the others; none is lost, and `stop` leaves none behind."""

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._running: dict[asyncio.Task[Any], None] = {}  # ordered: a simulator must see no chance here
        self._on_failure = on_failure
        self.stopped = False
        self.failure: BaseException | None = None

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` until it ends or `stop`."""
        task = asyncio.get_running_loop().create_task(work, name=f"drsm-{name}")
        self._running[task] = None
        task.add_done_callback(self._ended)
        if self.stopped:
            task.cancel()
        return task

    async def stop(self) -> None:
        """Cancel all and wait until they are gone. Cancelled again each second: a driver below may
        swallow one cancellation."""
        self.stopped = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running, timeout=1.0)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._running.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.critical("task %s failed; nothing more is issued", task.get_name(), exc_info=error)
        if self.failure is None:
            self.failure, self.stopped = error, True
            self._on_failure()
            for other in self._running:
                other.cancel()
