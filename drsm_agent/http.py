"""`/livez`, `/readyz` and `/metrics` over HTTP.

Liveness is the event loop only, never a dependency: a restart repairs no database. Readiness is being
connected and fresh, whether leading or standing by.
"""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from aiohttp import web
from prometheus_client import exposition

from drsm_agent.errors import Misconfigured
from drsm_agent.metrics import Metrics

ANY_IPV4 = "0.0.0.0"  # noqa: S104  # all addresses are what is meant
NO_IPV6 = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""What a kernel says whose IPv6 is turned off."""


class Observed(Protocol):
    """What is asked of an agent, or of one that waits for its servers."""

    metrics: Metrics

    def unready(self) -> list[str]:
        """What keeps it from being ready; empty when it is."""

    def measure(self) -> None:
        """Bring the metrics up to date."""


@asynccontextmanager
async def serving(host: str, port: int, agent: Observed) -> AsyncIterator[int]:
    """Serve until the block is left, on all addresses if `host` is empty; gives the port. Raises
    Misconfigured when it is taken."""

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(_: web.Request) -> web.Response:
        reasons = agent.unready()
        return web.Response(
            text="".join(f"{r}\n" for r in reasons) or "ready\n", status=503 if reasons else 200
        )

    async def show_metrics(_: web.Request) -> web.Response:
        agent.measure()
        body = exposition.generate_latest(agent.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": exposition.CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", show_metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await _listen(runner, host, port)
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host or None, port).start()
    except OSError as error:
        if not host and error.errno in NO_IPV6:
            await _listen(runner, ANY_IPV4, port)
            return
        where = f"{host or '*'}:{port}"
        raise Misconfigured(f"DRSM_HTTP_PORT: cannot listen on {where}: {error.strerror}") from None
