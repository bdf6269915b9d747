"""`drsm`: the operator's commands. They speak NATS only, and change nothing."""

import io
import sys


def main() -> None:
    """The command `drsm`."""
    try:
        from drsm_sdk.cli.commands import app  # noqa: PLC0415  # so that a missing extra can be named
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        sys.exit(f"drsm: {missing.name} is not installed; the commands need: pip install 'drsm[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the locale, whatever a name holds
    try:
        app()
    except OSError as error:
        sys.exit(f"drsm: {error}")
