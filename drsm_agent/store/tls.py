"""The TLS files that a MongoDB URL names, read again when they were renewed: the driver reads them once.

What is read is put into the driver's own context, so it counts for the next connection. An authority that was
trusted before stays trusted until the agent ends.
"""

import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the files."""

log = structlog.get_logger("drsm_agent.store")
Stamps = dict[str, tuple[int, int]]


class TlsFiles:
    """The files of one client. `options` are those of its URL, with names in small letters."""

    def __init__(self, context: Any, options: Any, clock: Callable[[], float]) -> None:
        self._context, self._clock = context, clock
        self._authorities = options.get("tlscafile")
        self._certificate = options.get("tlscertificatekeyfile")
        self._password = options.get("tlscertificatekeyfilepassword")
        self._read, self._looked_at = self._stamps(), clock()

    def look(self) -> None:
        """Take in what has changed. A file that cannot be read yet is looked at again."""
        now = self._clock()
        if not isinstance(self._context, ssl.SSLContext) or now - self._looked_at < LOOK_INTERVAL:
            return
        self._looked_at = now
        if (found := self._stamps()) == self._read:
            return
        try:
            if self._authorities:
                self._context.load_verify_locations(self._authorities)
            if self._certificate:
                self._context.load_cert_chain(self._certificate, password=self._password)
        except OSError as error:  # half written, or the key of another certificate
            log.warning("tls_files_unreadable", error=str(error), action="looking again")
            return
        self._read = found
        log.info("tls_files_read")

    def _stamps(self) -> Stamps:
        """Of each file when it was written, and which one it is: it may be replaced as a whole."""
        stamps: Stamps = {}
        for path in filter(None, (self._authorities, self._certificate)):
            with suppress(OSError):
                status = Path(path).stat()
                stamps[path] = status.st_mtime_ns, status.st_ino
        return stamps
