"""The two leases of a session, as the pod counts them: on its own clock, from before it sent (rule R1).

The durations in answers were already shortened by the agent for what two clocks may differ, so here a
deadline is simply `sent + duration`. Every answer extends, none shortens: a late one still counts, from
its own time of sending.
"""

from typing import Literal

State = Literal["live", "suspect", "lapsed"]

_NEVER = float("-inf")


class Leases:
    """Until when this pod is alive for the others, and until when it may issue; both never at first.

    `stop_when_suspect` ends issuing with the liveness lease already (`on_silence="stop"`).
    """

    __slots__ = ("_stop_when_suspect", "allocation_until", "issue_until", "liveness_until")

    def __init__(self, *, stop_when_suspect: bool = False) -> None:
        self._stop_when_suspect = stop_when_suspect
        self.liveness_until = self.allocation_until = self.issue_until = _NEVER

    def granted(self, sent: float, liveness_ms: int, allocation_ms: int) -> None:
        """The agent answered a request sent at `sent` (seconds of the pod's clock)."""
        self.liveness_until = max(self.liveness_until, sent + liveness_ms / 1000)
        self.allocation_until = max(self.allocation_until, sent + allocation_ms / 1000)
        self.issue_until = self.allocation_until
        if self._stop_when_suspect:
            self.issue_until = min(self.liveness_until, self.allocation_until)

    def revoke(self) -> None:
        """Nothing may be issued any more, from this moment on."""
        self.liveness_until = self.allocation_until = self.issue_until = _NEVER

    def state(self, now: float) -> State:
        """`live`; `suspect` once the liveness lease ran out; `lapsed` once the allocation lease did."""
        if now >= self.allocation_until:
            return "lapsed"
        return "live" if now < self.liveness_until else "suspect"
