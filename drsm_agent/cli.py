"""`drsm-agent`: run the service, or a whole stack for development, or the demonstration.

Exit codes: 0 stopped by a signal, or seen to happen; 1 ended by a fault; 2 refused to start.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from enum import Enum
from functools import partial
from importlib.metadata import version
from typing import Annotated

import structlog
import typer
from rich.console import Console

from drsm_agent import logs, settings
from drsm_agent.embedded import Stack
from drsm_agent.embedded.errors import EmbeddedError
from drsm_agent.errors import AgentError, Misconfigured, leaf
from drsm_agent.restored import announce_restored
from drsm_agent.service import running
from drsm_agent.store.mongo import MongoStore

FAULT, REFUSED = 1, 2


READY = """\
MongoDB  {mongo}
NATS     {nats}
look at it: DRSM_NATS_URL={nats} drsm pools
ready; Ctrl-C stops everything"""


class ServerEnded(AgentError):
    """A server of the development stack ended by itself."""


class Members(Enum):
    """Two members are no choice: without either of them there is no majority."""

    ONE = "1"
    THREE = "3"


CHUNKS_FEW = 16
"""Of a pool, below which a warning says how few pods it can serve."""

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
log = structlog.get_logger("drsm_agent")


@app.command()
def run() -> None:
    """Run the agent. Settings come from the environment, or a TOML file that DRSM_CONFIG names.

    At least DRSM_NATS_URL, DRSM_MONGO_URL and DRSM_POOLS='[{"name": "amfid", "bits": 24}]';
    docs/settings.md has them all.
    """
    _finish(_run)


@app.command()
def restored() -> None:
    """Announce that MongoDB was restored from a backup. Stop all agents, run this, start them again.

    Takes the same settings as `run`. Then nothing is granted or claimed for `A + W`, while living pods say
    which chunks they hold; docs/guarantees.md says more.
    """
    _finish(_restored)


@app.command()
def dev(
    pool: Annotated[
        list[str] | None,
        typer.Option(help="Pool of 24-bit ids, repeatable; without any, the pools of DRSM_POOLS, or amfid."),
    ] = None,
    members: Annotated[Members, typer.Option(help="Members of the MongoDB replica set.")] = Members.ONE,
    mongo_port: Annotated[int, typer.Option(help="Port of the first MongoDB member; 0: a free one.")] = 0,
    nats_port: Annotated[int, typer.Option(help="Port of NATS; 0: a free one.")] = 0,
) -> None:
    """Run a real MongoDB replica set, a real nats-server and an agent, until Ctrl-C. Nothing stays."""
    _finish(partial(_dev, pool or [], int(members.value), mongo_port or None, nats_port or None))


@app.command()
def demo() -> None:
    """Show the story in this terminal: allocate, kill, claim, scan, restart. 0 if all was seen."""
    _finish(_demo)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"drsm-agent {version('drsm')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """An agent that shares out number spaces over NATS and MongoDB."""


def main() -> None:
    """The command `drsm-agent`."""
    app()


async def _run() -> None:
    configured = settings.load()
    logs.configure(configured.log_format, configured.log_level)
    for name in settings.unknown_variables():
        log.warning("unknown_setting", name=name)
    await _until_signal(_serve(configured))


async def _serve(configured: settings.Settings) -> None:
    async with running(configured) as agent:
        log.info(
            "running",
            agent=agent.name,
            version=version("drsm"),
            prefix=configured.subject_prefix,
            pools=list(configured.definitions),
            nats=configured.nats_hosts,
            mongo=configured.mongo_hosts,
            http_port=agent.http_port,
        )
        _tell_sizes(configured)
        await agent.ended()


def _tell_sizes(configured: settings.Settings) -> None:
    """How many pods each pool can serve: each that issues has a chunk."""
    for pool in configured.definitions.values():
        log.info("pool", pool=pool.name, chunks=pool.usable, pods_at_most=pool.usable)
        if pool.usable < CHUNKS_FEW:
            log.warning(
                "small_pool",
                pool=pool.name,
                chunks=pool.usable,
                action=f"no more than {pool.usable} pods can issue at once, and fewer while chunks of dead "
                "ones are on hold: lower block_bits, or widen the pool (docs/settings.md#pools)",
            )


async def _restored() -> None:
    configured = settings.load()
    logs.configure(configured.log_format, configured.log_level)
    allocation_ms = round(configured.leases.allocation * 1000)
    url = configured.mongo_url.get_secret_value()
    async with MongoStore(url, configured.mongo_database, configured.databases) as store:
        await store.check()
        announced = await announce_restored(store, configured.leases.leader, allocation_ms)
    print(f"announced: terms go on above {announced.term}. Start the agents now.")


async def _dev(pools: list[str], members: int, mongo_port: int | None, nats_port: int | None) -> None:
    logs.configure("console", "info")
    named = [{"name": name} for name in pools or ([] if settings.names_pools() else ["amfid"])]
    given = {"pools": named} if named else {}
    settings.load(**given)  # a mistake is told before anything is started
    stack = Stack(mongo_members=members, mongo_port=mongo_port, nats_port=nats_port)
    await _until_signal(_develop(stack, given))


async def _develop(stack: Stack, given: Mapping[str, object]) -> None:
    async with stack:
        configured = settings.load(nats_url=stack.nats_url, mongo_url=stack.mongo_url, http_port=0, **given)
        async with running(configured) as agent:
            ended = asyncio.create_task(agent.ended())
            broken = asyncio.create_task(stack.ended())
            led = asyncio.create_task(agent.leader.leading.wait())
            await asyncio.wait([ended, broken, led], return_when=asyncio.FIRST_COMPLETED)
            if led.done():
                print(READY.format(mongo=stack.mongo_url, nats=stack.nats_url), flush=True)
            await asyncio.wait([ended, broken], return_when=asyncio.FIRST_COMPLETED)
            led.cancel()
            ended.cancel()
            if broken.done():
                raise ServerEnded(broken.result())
            broken.cancel()


async def _demo() -> None:
    from drsm_agent.demo.story import demonstrate  # noqa: PLC0415  # only with the extra `embedded`

    async def tell() -> None:
        if not await demonstrate(Console()):
            raise SystemExit(FAULT)

    logs.configure("console", "error")
    if not await _until_signal(tell()):
        raise SystemExit(FAULT)


async def _until_signal(work: Coroutine[object, object, None]) -> bool:
    """Do the work until it ends, or a signal ends it in good order, at whatever point it is. Whether it
    ended by itself."""
    stop = asyncio.Event()
    with _signals(stop):
        stopping = asyncio.create_task(stop.wait())
        working = asyncio.create_task(work)
        await asyncio.wait([stopping, working], return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            log.info("stopping", reason="signal")
        stopping.cancel()
        working.cancel()
        await asyncio.wait([working])
    if working.cancelled():
        return False
    working.result()
    return True


def _finish(work: Callable[[], Awaitable[None]]) -> None:
    """Run to the end and turn faults into one line and an exit code."""
    code = 0
    try:
        asyncio.run(_awaited(work))
    except* (Misconfigured, EmbeddedError) as group:
        code = _said(group, REFUSED)
    except* AgentError as group:
        code = code or _said(group, FAULT)
    except* Exception as group:
        log.critical("crashed", exc_info=leaf(group))
        code = code or _said(group, FAULT)
    if code:  # not raised above: before 3.11.4, Python makes a group of what an `except*` raises
        raise SystemExit(code)


async def _awaited(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def _said(group: BaseExceptionGroup, code: int) -> int:
    error = leaf(group)
    print("\n".join([f"drsm-agent: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    return code


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
