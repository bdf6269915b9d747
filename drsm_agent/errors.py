"""Typed faults of the agent, by what the one who meets them should do.

AgentError
 +- StoreUnavailable     the store did not answer in time, or the outcome of a write is unknown: try later
 |   +- StoreRefused     it answered that it will not, and trying later does not help
 +- StoreBroken          it refused for so long that the process ends
 +- PositionLost         the change stream cannot go on from here: read everything anew
 +- BusUnavailable       NATS did not take it: publish again once connected
 +- TooLarge             more than NATS takes in one message
 +- LeadLost             this agent does not lead at this moment: write, publish and answer nothing
 |   +- Unheard          it gave the lead up, as it does not hear itself, or no pod, over NATS
 +- Refused              a request was refused; carries what the requester is told
 +- Misconfigured        this agent must not start; the message says what to change
"""

from drsm_sdk.wire.messages import Failure

POSITION_DEAD, DROPPED, OVER = "position_dead", "dropped", "over"
"""Ends of a change stream after which everything is read anew: its position is of no use any more; a followed
collection or database is gone or renamed; MongoDB ended it and gave no reason."""


class AgentError(Exception):
    """Base of all."""


class StoreUnavailable(AgentError):
    """MongoDB could not be reached in time. A write may or may not have happened: read it back. `code` is
    MongoDB's, where it gave one."""

    end = "interrupted"
    """How the end of a change stream by this error is counted."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class StoreRefused(StoreUnavailable):
    """MongoDB answered, but denies the agent what it needs, or does not know it: a person has to act."""

    end = "refused"


class StoreBroken(AgentError):
    """MongoDB refused again and again (see `patience`): the process ends, and says what to do."""


class PositionLost(AgentError):
    """The change stream ended for good, or its position is gone from the oplog. `code` is MongoDB's; `end`
    says what sort of end it was."""

    def __init__(self, message: str, code: int | None = None, *, end: str = POSITION_DEAD) -> None:
        super().__init__(message)
        self.code, self.end = code, end

    @property
    def data_lost(self) -> bool:
        """Whether a followed collection or its database was dropped or renamed."""
        return self.end == DROPPED


class BusUnavailable(AgentError):
    """NATS is not connected, or was not all the while since a message was handed to it."""


class Forbidden(BusUnavailable):
    """NATS does not let this agent subscribe; trying again does not help before its permissions change."""


class TooLarge(AgentError):
    """A message is larger than the server takes, headers included."""


class LeadLost(AgentError):
    """The lead is not valid at this moment (rule R2)."""


class Unheard(LeadLost):
    """NATS does not carry this leader's messages, or no pod's (rule R7): a standby may be better off."""


class Misconfigured(AgentError):
    """Refused at start; the text says what was expected, what was found and what to do."""


def leaf(error: BaseException) -> BaseException:
    """The first error itself, out of the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Refused(AgentError):
    """A request gets this error answer."""

    def __init__(
        self, error: str, message: str, *, reason: str = "", retry: bool = False, wait_ms: int = 0
    ) -> None:
        super().__init__(message)
        self.failure = Failure(error=error, message=message, reason=reason, retry=retry, wait_ms=wait_ms)
