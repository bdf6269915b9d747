"""Events as they come, one line each."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from drsm_sdk import naming
from drsm_sdk.changes import Missed
from drsm_sdk.cli.ask import Access
from drsm_sdk.cli.decode import plain_fields
from drsm_sdk.feed import Feed
from drsm_sdk.follow import STALE_AFTER
from drsm_sdk.transport import Message
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.messages import printable
from drsm_sdk.wire.subjects import Subjects

log = logging.getLogger("drsm_sdk")

POOLS_MAX = 1000
"""Pools and histories whose versions are kept."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An event: its verb (`chunk.claimed`), what it says in one line, and its fields as they came."""

    verb: str
    line: str
    fields: dict[str, Any]


async def events(access: Access, pool: str | None) -> AsyncGenerator[Seen, None]:
    """Every event of a pool, or of all pools, until cancelled. Raises AgentUnavailable when NATS is not
    there at the beginning, BadRequest; interruptions later, silence, and lost events are logged."""
    subjects = access.subjects
    subject = subjects.events(naming.pool_name(pool)) if pool is not None else subjects.all_events
    feed: Feed[Message] = Feed()
    reader = feed.read()
    silent = False
    watched = _Watched(subjects)
    async with access.connected() as transport:
        log.setLevel(logging.WARNING)  # before, the error that ends it tells all there is
        await transport.subscribe(subject, feed.publish)
        while True:
            try:
                async with asyncio.timeout(STALE_AFTER):
                    message = await anext(reader)
            except TimeoutError:
                if not silent:
                    other = "there is no such pool, or another prefix" if pool else "another prefix"
                    log.warning("no event for %g s, not even a sync: nobody leads, or %s", STALE_AFTER, other)
                silent = True
                continue
            silent = False
            if isinstance(message, Missed):
                log.warning("%d events were dropped: the output is too slow", message.count)
            elif (seen := watched.see(message)) is not None:
                yield seen


class _Watched:
    """Reads events, and notices when one was not heard."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects
        self._versions: dict[tuple[str, str], m.Version] = {}
        self._unreadable = 0

    def see(self, message: Message) -> Seen | None:
        verb = self._subjects.event_verb(message.subject)
        kind = m.EVENT_KINDS.get(verb)
        try:
            fields = plain_fields(message.data)
            head = codec.from_map(m.EventHead, fields)
            said = (
                m.summary(head, codec.from_map(kind, fields))
                if kind is not None
                else f"{head.pool} {verb}: unknown to this version"
            )
        except codec.DecodeError as error:
            self._unreadable += 1
            if self._unreadable & (self._unreadable - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                subject = printable(message.subject)[:100]
                log.warning("unreadable event on %s (%d so far): %s", subject, self._unreadable, error)
            return None
        self._compare(head)
        return Seen(verb, f"{_time(head.at)} {printable(said)}", fields)

    def _compare(self, head: m.EventHead) -> None:
        key = (head.pool, head.history)
        last = self._versions.get(key)
        if last is not None and head.prev > last:
            log.warning("%s: events before the next line were not heard", printable(head.pool))
        if len(self._versions) < POOLS_MAX or key in self._versions:
            self._versions[key] = max(head.version, last or head.version)


def _time(at: int) -> str:
    """Milliseconds since the epoch as local time; a stranger's may be no time at all."""
    try:
        return datetime.fromtimestamp(at / 1000).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return "--:--:--.---"
