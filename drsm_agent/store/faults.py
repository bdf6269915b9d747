"""The driver's errors as the agent's, translated once, at the edge."""

from collections.abc import Iterator
from contextlib import contextmanager

from pymongo.errors import PyMongoError

from drsm_agent.errors import StoreRefused, StoreUnavailable

DENIED = {13, 18, 8000}  # Unauthorized, AuthenticationFailed, Atlas's own
# BadValue, TypeMismatch, CommandNotFound, InvalidOptions, InvalidNamespace, CommandNotSupported, and the
# assertions "unrecognized pipeline stage" and "only supported on replica sets".
UNKNOWN = {2, 14, 59, 72, 73, 115, 40324, 40573}
SNAPSHOT_TOO_OLD = 239

REMEDIES = {
    **dict.fromkeys(
        DENIED,
        "correct user, password and authSource, and give the user readWrite on the agent's and the pools' "
        "databases (and, when these are several, find and changeStream on every database)",
    ),
    **dict.fromkeys(UNKNOWN, "give the agent a replica set or sharded cluster of MongoDB 5.0 or newer"),
    SNAPSHOT_TOO_OLD: "raise MongoDB's parameter minSnapshotHistoryWindowInSeconds above the time that a "
    "read of all pools takes",
}
"""Answers that no waiting mends, by MongoDB's code, and what does. Everything else may be an outage."""

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
    code = code_of(error)
    found = f"Expected MongoDB to answer {what}, found: {reason(error)}"
    if code in REMEDIES:
        return StoreRefused(f"{found}; {REMEDIES[code]}", code)
    return StoreUnavailable(f"{found}; try again later", code)


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
