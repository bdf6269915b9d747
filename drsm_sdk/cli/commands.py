"""Look at a DRSM domain: pools, pods, chunks, owners, events. Nothing here changes anything.

Exit codes: 0 done; 1 NATS or the agent is not there; 2 wrong arguments or input, an unknown pool.

Credentials come from the environment: DRSM_NATS_CREDENTIALS, DRSM_NATS_USER and DRSM_NATS_PASSWORD,
DRSM_NATS_TOKEN, DRSM_NATS_TLS_CA, DRSM_NATS_TLS_CERTIFICATE, DRSM_NATS_TLS_KEY.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from drsm_sdk.cli import decode as decoding
from drsm_sdk.cli import show
from drsm_sdk.cli.ask import Access, Questions
from drsm_sdk.cli.watch import Seen, events
from drsm_sdk.errors import AgentUnavailable, DrsmError
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.wire import codec
from drsm_sdk.wire.codec import DecodeError
from drsm_sdk.wire.messages import printable
from drsm_sdk.wire.subjects import PREFIX_DEFAULT

FAULT, REFUSED = 1, 2
TIMEOUT = 5.0
"""Longer than a change of leader takes."""

T = TypeVar("T")

Url = Annotated[str, typer.Option("--nats-url", envvar="DRSM_NATS_URL", help="NATS servers, by commas.")]
Prefix = Annotated[str, typer.Option("--prefix", envvar="DRSM_SUBJECT_PREFIX", help="The domain.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, max=3600, help="Seconds to wait for an answer.")
]
Json = Annotated[bool, typer.Option("--json", help="For machines; integers above 2**53 as text.")]
PoolName = Annotated[str, typer.Argument(metavar="POOL")]
AnyPool = Annotated[str | None, typer.Argument(metavar="[POOL]", help="One pool; all of them without it.")]
URL_DEFAULT = "nats://127.0.0.1:4222"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
pools_app = typer.Typer(invoke_without_command=True, help="The pools, how full they are, and who leads.")
app.add_typer(pools_app, name="pools")


@pools_app.callback()
def pools(
    context: typer.Context,
    *,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """The pools, how full they are, and who leads."""
    if context.invoked_subcommand is not None:
        if given := [name for name in context.params if _was_given(context, name)]:
            _fail(f"expected options after `show`, found {', '.join(given)} before it", REFUSED)
        return
    answer = _asked(Access(url, prefix, timeout), lambda agent: agent.pools())
    _print(show.pools(answer), codec.to_map(answer), as_json)


@pools_app.command("show")
def show_pool(
    pool: PoolName,
    *,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """One pool: its definition, and how it stands."""
    answer = _asked(Access(url, prefix, timeout), lambda agent: agent.pools())
    state = next((state for state in answer.pools if state.definition.name == pool), None)
    if state is None:
        names = ", ".join(state.definition.name for state in answer.pools)
        _fail(f"expected one of the pools {names}; found no pool {pool}", REFUSED)
    _print(show.pool(state), codec.to_map(state), as_json)


@app.command()
def pods(
    pool: AnyPool = None,
    *,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """The pods: what they own, and what they say of their stock (issued, free, oldest issued id)."""
    answers = _asked(Access(url, prefix, timeout), lambda agent: agent.pods(pool))
    plain = [{"pool": name} | codec.to_map(pod) for name, answer in answers.items() for pod in answer.pods]
    _print(show.pods(answers), plain, as_json)


@app.command()
def chunks(
    pool: AnyPool = None,
    *,
    pod: Annotated[str | None, typer.Option("--pod", help="Only those of the pod of this name.")] = None,
    marked: Annotated[bool, typer.Option("--marked", help="Only those that are not scanned yet.")] = False,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """The owned chunks, neighbours of one owner in one line."""
    snapshots = _asked(Access(url, prefix, timeout), lambda agent: agent.snapshots(pool))
    _print_chunks(
        snapshots, lambda run: (pod is None or run.owner.name == pod) and (run.marked or not marked), as_json
    )


@app.command()
def orphans(
    pool: AnyPool = None,
    *,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """The chunks whose owner is gone: a living pod of their pool gets them."""
    snapshots = _asked(Access(url, prefix, timeout), lambda agent: agent.snapshots(pool))
    _print_chunks(snapshots, lambda run: run.orphaned, as_json)


@app.command()
def owner(
    pool: PoolName,
    id_: Annotated[str, typer.Argument(metavar="ID", help="Decimal, hexadecimal with 0x, or an address.")],
    *,
    space: Annotated[str | None, typer.Option("--space", help="Of a pool that has several.")] = None,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """Whose id is it?"""
    asked = _id(id_)
    answer, issuable = _asked(Access(url, prefix, timeout), lambda agent: agent.owner(pool, asked, space))
    plain = {"id": asked, "issuable": issuable} | codec.to_map(answer)
    _print(show.owner(asked, answer, issuable=issuable), plain, as_json)


@app.command()
def watch(
    pool: AnyPool = None,
    *,
    syncs: Annotated[bool, typer.Option("--syncs", help="Also the syncs, every 2 s.")] = False,
    count: Annotated[int | None, typer.Option("--count", min=1, help="End after so many events.")] = None,
    url: Url = URL_DEFAULT,
    prefix: Prefix = PREFIX_DEFAULT,
    timeout: Timeout = TIMEOUT,
    as_json: Json = False,
) -> None:
    """Events as they happen, until Ctrl-C. With --json one object a line, its name in `event`."""

    async def tell() -> None:
        left = count
        async with contextlib.aclosing(events(Access(url, prefix, timeout), pool)) as seen:
            async for event in seen:
                if event.verb == "sync" and not syncs:
                    continue
                _tell(event, as_json)
                left = left - 1 if left is not None else None
                if left == 0:
                    return

    logging.basicConfig(format="drsm: %(message)s")
    _end_by_signal()
    _run(tell(), prefix)


@app.command()
def decode(as_json: Json = False) -> None:
    """A message from standard input as text: nats sub 'drsm.>' --translate 'drsm decode'"""
    data = sys.stdin.buffer.read(decoding.BODY_MAX) if sys.stdin is not None else b""
    try:
        print(decoding.as_json(data) if as_json else decoding.as_text(data))
    except DecodeError as error:
        _fail(str(error), REFUSED)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _show_version(asked: bool) -> None:
    if asked:
        print(f"drsm {version('drsm')}")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Only for `--version`."""


# --- inside -----------------------------------------------------------------------------------------


def _asked(access: Access, ask: Callable[[Questions], Awaitable[T]]) -> T:
    """The answer to one question."""

    async def asking() -> T:
        async with access.asking() as agent:
            return await ask(agent)

    return _run(asking(), access.prefix)


def _run(work: Coroutine[Any, Any, T], prefix: str) -> T:
    """Work, or the end of the process with one line on standard error."""
    logging.getLogger("drsm_sdk").setLevel(logging.CRITICAL)  # the error tells all there is
    try:
        return asyncio.run(work)
    except AgentUnavailable as error:
        hint = (
            "" if "NATS" in error.reason else f"; does a drsm-agent run with the subject prefix {prefix!r}?"
        )
        _fail(f"{error.reason}{hint}", FAULT)
    except DrsmError as error:
        _fail(str(error), REFUSED)


def _end_by_signal() -> None:
    """Ctrl-C and SIGTERM are the ordinary end of what would go on for ever; also of one that cannot print."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))


def _print(text: str, plain: Any, as_json: bool) -> None:
    print(json.dumps(codec.json_safe(plain)) if as_json else text)


def _print_chunks(snapshots: dict[str, Snapshot], wanted: Callable[[show.Run], bool], as_json: bool) -> None:
    found = [run for snapshot in snapshots.values() for run in show.runs(snapshot) if wanted(run)]
    definitions = {name: snapshot.definition for name, snapshot in snapshots.items()}
    plain = [
        {
            "pool": run.pool,
            "first": run.first,
            "last": run.last,
            "owner": codec.to_map(run.owner),
            "marked": run.marked,
        }
        for run in found
    ]
    _print(show.chunks(found, definitions), plain, as_json)


def _tell(event: Seen, as_json: bool) -> None:
    if as_json:
        line = codec.encode(event.fields | {"event": event.verb}, as_json=True).decode()
    else:
        line = event.line
    print(line, flush=True)


def _id(text: str) -> int | str:
    """An integer, or what is left to the agent to understand (an address)."""
    try:
        id_ = int(text, 0)
    except ValueError:
        if not (text.isascii() and text.isprintable()):
            _fail("expected an id as a number, decimal or with 0x", REFUSED)
        return text
    if not 0 <= id_ <= codec.U64_MAX:
        _fail(f"expected an id from 0 to 2**64-1, found {text[:40]}", REFUSED)
    return id_


def _fail(message: str, code: int) -> NoReturn:
    print(f"drsm: {printable(message)}", file=sys.stderr)
    raise typer.Exit(code)
