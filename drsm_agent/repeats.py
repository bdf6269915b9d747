"""What an outage has the agent say again and again is said once, and then at growing intervals, with a count.

A processor of structlog. Lines of one event about the same thing are one kind; the first is let through, and
of those that follow one after 2 s, then after 4 s, and so on up to a minute. Each says how many were left out
since the last. After a quiet minute the kind is new again.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from structlog.typing import EventDict

FIRST, MOST = 2.0, 60.0
"""Seconds between two lines of a kind: at first, and at most."""
KINDS_MAX = 1000
"""Kinds that are remembered; those about which nothing was said for longest are forgotten."""
ABOUT = ("pool", "pod", "verb", "code", "end", "by", "name", "database")
"""What makes lines of one event be about different things."""
LIMITED = frozenset({"warning", "error"})
"""Levels. What is said below them is no trouble, and above them the process ends."""


@dataclass(slots=True)
class _Kind:
    wait: float
    next_at: float
    said_at: float
    left_out: int = 0


class Repeats:
    """Raises structlog.DropEvent for a line that says nothing new. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: OrderedDict[tuple[Any, ...], _Kind] = OrderedDict()

    def __call__(self, _: Any, level: str, line: EventDict) -> EventDict:
        if level not in LIMITED:
            return line
        key, now = (line.get("event"), *(str(line.get(name)) for name in ABOUT)), self._clock()
        kind = self._kinds.pop(key, None)
        if kind is None or now - kind.said_at > MOST:
            kind = _Kind(FIRST, now + FIRST, now)
        elif now < kind.next_at:
            kind.left_out, kind.said_at = kind.left_out + 1, now
            self._kinds[key] = kind
            raise structlog.DropEvent
        else:
            if kind.left_out:
                line["repeated"] = kind.left_out
            wait = min(2 * kind.wait, MOST)
            kind = _Kind(wait, now + wait, now)
        self._kinds[key] = kind
        while len(self._kinds) > KINDS_MAX:
            self._kinds.popitem(last=False)
        return line
