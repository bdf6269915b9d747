"""The driver's errors as the agent's, translated once, at the edge."""

from collections.abc import Iterator
from contextlib import contextmanager

from pymongo.errors import PyMongoError

from drsm_agent.errors import StoreUnavailable

# Where the driver goes on to list its time-outs, its view of all servers, or the whole answer.
_DETAILS = (" (configured timeouts", ", Timeout: ", ", full error: ")
_LONGEST = 300


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Whatever the driver raises meanwhile means that MongoDB did not do `what`, or did not say so."""
    try:
        yield
    except PyMongoError as error:
        raise unavailable(error, what) from error


def unavailable(error: Exception, what: str) -> StoreUnavailable:
    return StoreUnavailable(f"Expected MongoDB to answer {what}, found: {reason(error)}; try again later")


def reason(error: BaseException) -> str:
    """The part of a driver's message that a person reads."""
    text = str(error) or type(error).__name__
    for details in _DETAILS:
        text = text.partition(details)[0]
    return text[:_LONGEST]


def code_of(error: BaseException | None) -> int | None:
    """MongoDB's error code, where there is one."""
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None
