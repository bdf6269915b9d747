"""`drsm-agent`: run the service, or a whole stack for development, or the demonstration.

Exit codes: 0 stopped by a signal, or seen to happen; 1 ended by a fault; 2 refused to start.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

import structlog
import typer

from drsm_agent import logs, settings
from drsm_agent.errors import AgentError, Misconfigured
from drsm_agent.service import running

FAULT, REFUSED = 1, 2

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
log = structlog.get_logger("drsm_agent")


@app.command()
def run() -> None:
    """Run the agent. Settings come from the environment (`DRSM_...`) or a TOML file (`DRSM_CONFIG`)."""
    _finish(_run)


def main() -> None:
    """The command `drsm-agent`."""
    app()


async def _run() -> None:
    configured = settings.load()
    logs.configure(configured.log_format, configured.log_level)
    stop = asyncio.Event()
    with _signals(stop):
        async with running(configured) as agent:
            log.info("running", agent=agent.name, http_port=agent.http_port)
            await stop.wait()
            log.info("stopping", reason="signal")


def _finish(work: Callable[[], Awaitable[None]]) -> None:
    """Run to the end and turn faults into one line and an exit code."""
    try:
        asyncio.run(_awaited(work))
    except* Misconfigured as group:
        _fail(group, REFUSED)
    except* AgentError as group:
        _fail(group, FAULT)


async def _awaited(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def _fail(group: "BaseExceptionGroup[AgentError]", code: int) -> None:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"drsm-agent: {error}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; a second one has its ordinary effect."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _once(loop, number, stop))
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _once(loop: asyncio.AbstractEventLoop, number: signal.Signals, stop: asyncio.Event) -> Callable[[], None]:
    def handle() -> None:
        loop.remove_signal_handler(number)
        stop.set()

    return handle
