"""Outlives a process that started servers, and buries what that process leaves behind.

Run as a script (`python -I -S undertaker.py`), it makes a temporary directory, prints its path, and
waits for the end of its standard input. That end comes when the parent closes the pipe, and also when
the parent was killed. Then it kills every process that carries the directory's path in the environment
variable `DRSM_SCRATCH`, and removes the directory. After the word `keep` only `data` in it is removed.

Why a mark in the environment and not a list of process ids: between the birth of a server and the word
about it the parent can be killed, and an id that was told can belong to somebody else by now. The mark
is there from the server's first instruction, and until then the newborn holds the pipe open as well, so
the end of input cannot be seen too early. Reading environments needs Linux (/proc).

Nothing but the standard library here, and little of it: it has to be up in a few milliseconds.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "DRSM_SCRATCH"
KEEP = b"keep\n"
KILL_SECONDS = 30.0  # a killed process that writes to a slow disk needs a moment to be gone


def main() -> None:
    """Wait for the parent's end, then clean up; deaf to the signals that end the parent."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    directory = Path(tempfile.mkdtemp(prefix="drsm-"))
    try:
        os.write(sys.stdout.fileno(), os.fsencode(directory) + b"\n")
        keep = KEEP in sys.stdin.buffer.read()
    except BrokenPipeError:  # the parent died before it knew the path
        keep = False
    bury(directory, keep=keep)


def bury(directory: Path, *, keep: bool) -> None:
    """Kill all processes marked with the directory; remove it, or only its `data` to keep the logs."""
    deadline = time.monotonic() + KILL_SECONDS
    clean_rounds = 0
    # Twice: in the midst of its exec a newborn has let go of the pipe but shows no environment yet.
    while clean_rounds < 2 and time.monotonic() < deadline:
        clean_rounds = 0 if kill_marked(directory) else clean_rounds + 1
        time.sleep(0.02)
    shutil.rmtree(directory / "data" if keep else directory, ignore_errors=True)


def kill_marked(directory: Path) -> int:
    """Send SIGKILL to every living process that carries the mark, and say how many there were."""
    count = 0
    for pid in marked(directory):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        count += 1
    return count


def marked(directory: Path) -> Iterator[int]:
    """Ids of the processes that carry the mark; a zombie has no environment any more and does not count."""
    mark = os.fsencode(f"{MARK}={directory}")
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # gone meanwhile, or somebody else's
            continue


if __name__ == "__main__":
    main()
