"""Liveness leases: which sessions may be declared dead, and when to look again.

Every renewal starts a session's lease anew, on the leader's clock, for what was promised in the
answer. From the moment the leader decides to end a session it refuses its renewals, whatever becomes
of the write (rule R2). Times are seconds of the caller's clock.
"""

from collections.abc import Iterable

from drsm_agent.core.documents import DEAD
from drsm_agent.core.lease import Leases
from drsm_agent.core.table import Table

Key = tuple[str, int]


class LivenessLeases:
    """Deadlines of all sessions that are not dead, as far as this leader may judge them."""

    def __init__(self) -> None:
        self._deadlines: dict[Key, float] = {}
        self._ended: dict[Key, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def __contains__(self, key: Key) -> bool:
        return key in self._deadlines

    def extend(self, key: Key, until: float) -> bool:
        """Start the lease anew. False when the session's end is decided: the answer is `session_lost`."""
        if key in self._ended:
            return False
        self._deadlines[key] = max(until, self._deadlines.get(key, until))
        return True

    def end(self, keys: Iterable[Key], reason: str) -> None:
        """The leader decided: no renewal counts any more. The deadline is kept for `lapsed`."""
        for key in keys:
            self._ended.setdefault(key, (reason, self._deadlines.pop(key, float("-inf"))))

    def ending(self, key: Key) -> str:
        """Why the session's end was decided; empty while it was not."""
        return self._ended[key][0] if key in self._ended else ""

    def ended(self) -> dict[Key, str]:
        """All sessions whose end was decided, with the reason."""
        return {key: reason for key, (reason, _) in self._ended.items()}

    def forget(self, key: Key) -> None:
        """The session's document is gone."""
        self._deadlines.pop(key, None)
        self._ended.pop(key, None)

    def lapsed(self, key: Key, now: float) -> bool:
        """Whether the lease ran out, also that of a session whose end was decided before."""
        _, ended = self._ended.get(key, ("", float("-inf")))
        return now >= self._deadlines.get(key, ended)

    def due(self, now: float) -> list[Key]:
        """Sessions whose lease ran out and whose end is not yet decided."""
        return sorted(key for key, deadline in self._deadlines.items() if deadline <= now)

    def next_deadline(self) -> float | None:
        """When to look again; None while nothing is leased."""
        return min(self._deadlines.values(), default=None)

    def next_lapse(self, now: float) -> float | None:
        """When the lease of a session lapses whose end was decided before."""
        return min((until for _, until in self._ended.values() if until > now), default=None)

    def extend_all(self, until: float) -> None:
        """Everyone gets more time; always safe."""
        for key in self._deadlines:
            self.extend(key, until)


def full_leases(table: Table, leases: Leases, now: float, former: float = 0.0) -> LivenessLeases:
    """What a new leader begins with (rule R6): every session gets a full `L` from now on; superseded ones
    keep their chunks that long too.

    The leader before may have promised more, if there were more pods then (rule R3): whoever died within
    the hour still has a document, and counts. Or if its `L` was larger: `former` is the one before the last
    change of settings.
    """
    liveness = LivenessLeases()
    until = now + max(former, leases.effective_liveness(len(table.sessions)))
    for session in table.sessions.values():
        if session.state != DEAD or session.reason == "superseded":
            liveness.extend(session.key, until)
        if session.state == DEAD and session.reason == "superseded":
            liveness.end([session.key], session.reason)
    return liveness
