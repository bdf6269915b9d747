"""What goes over NATS: one request at a time, until its answer is here."""

from itertools import count

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.bench.measure import Row, in_turns, seconds
from tests.bench.raw import RawMongo
from tests.bench.setting import Setting, served
from tests.harness import renewing

NAME = "pod-1"


async def acquire(setting: Setting) -> list[Row]:
    """One chunk: written, seen in the change stream, published, flushed, answered."""
    async with served(setting) as here, RawMongo(here.domain.mongo_url, f"{here.domain.database}raw") as raw:
        incarnation = (await here.asking.open(NAME)).incarnation
        numbers = count()

        async def ours() -> float:
            request_id = f"request-{next(numbers)}"
            return await seconds(here.asking.acquire(NAME, incarnation, 1, request_id))

        async def bare() -> float:
            return await seconds(raw.insert_and_see())

        async with renewing(here.asking, (NAME, incarnation)):
            samples, beside = await in_turns(setting.scale.requests, ours, bare)
    against = "majority insert + its change event"
    return [Row(what="acquire one chunk", samples=samples, against=against, raw=beside)]


async def renew(setting: Setting) -> list[Row]:
    """What every pod asks twice a second; it writes nothing."""
    async with served(setting) as here:
        echo, asker = await nats.connect(here.domain.nats_url), await nats.connect(here.domain.nats_url)
        try:
            subject = f"{here.domain.prefix}.echo"
            await echo.subscribe(subject, cb=_answer)
            await echo.flush()
            incarnation = (await here.asking.open(NAME)).incarnation

            async def ours() -> float:
                return await seconds(here.asking.renew(NAME, incarnation))

            async def bare() -> float:
                return await seconds(_request(asker, subject))

            samples, beside = await in_turns(setting.scale.requests, ours, bare)
        finally:
            await echo.close()
            await asker.close()
    return [Row(what="renew a session", samples=samples, against="NATS request to an echo", raw=beside)]


async def _answer(message: Msg) -> None:
    await message.respond(message.data)


async def _request(asker: Client, subject: str) -> None:
    await asker.request(subject, b"x" * 60, timeout=5.0)
