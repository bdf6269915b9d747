"""Requests of one moment are served by one write: while a flight is under way, the next one gathers.

A thousand pods that start at once are thus served in a few round trips, and one pod alone waits for
nobody. Two passengers with the same key are one: a repeated request joins the first.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

PASSENGERS_MAX = 1000
"""As many writes as one bulk carries; the rest takes the next flight."""

T = TypeVar("T")
R = TypeVar("R")


class Flight(Generic[T, R]):
    """`fly` gets what has gathered, and returns one result or exception for each, in the same order."""

    def __init__(
        self, tasks: asyncio.TaskGroup, fly: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]]
    ) -> None:
        self._tasks, self._fly = tasks, fly
        self._waiting: dict[Hashable, tuple[T, asyncio.Future[R]]] = {}
        self._aboard: dict[Hashable, asyncio.Future[R]] = {}
        self._flying = False

    async def board(self, key: Hashable, passenger: T) -> R:
        """Returns the passenger's result once its flight has landed."""
        if landed := self._aboard.get(key):
            return await asyncio.shield(landed)
        if key not in self._waiting:
            future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
            self._waiting[key] = (passenger, future)
        _, future = self._waiting[key]
        if not self._flying:
            self._flying = True
            self._tasks.create_task(self._fly_all())
        return await asyncio.shield(future)

    async def _fly_all(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(0)  # whoever is about to board in this turn of the loop may
                await self._fly_once()
        finally:
            self._flying = False

    async def _fly_once(self) -> None:
        boarding = dict(list(self._waiting.items())[:PASSENGERS_MAX])
        for key in boarding:
            del self._waiting[key]
        self._aboard = {key: future for key, (_, future) in boarding.items()}
        try:
            results = await self._fly([passenger for passenger, _ in boarding.values()])
        except Exception as error:
            results = [error] * len(boarding)
        finally:
            self._aboard = {}
        for (_, future), result in zip(boarding.values(), results, strict=True):
            _land(future, result)


def _land(future: "asyncio.Future[R]", result: R | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
        future.exception()  # nobody may be waiting any more; that is no fault
    else:
        future.set_result(result)
