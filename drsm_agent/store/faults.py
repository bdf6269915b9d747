"""The driver's errors as the agent's, translated once, at the edge."""

from collections.abc import Iterator
from contextlib import contextmanager

from bson.errors import BSONError
from pymongo.errors import ConfigurationError, PyMongoError

from drsm_agent.errors import StoreRefused, StoreUnavailable

DRIVER_ERRORS = (PyMongoError, BSONError, OSError, EOFError)
"""All that the driver raises: its own, those of its encoding, and those of sockets and TLS."""

INVALID = 121
DENIED = {13, 18, 8000}  # Unauthorized, AuthenticationFailed, Atlas's own
# BadValue, TypeMismatch, CommandNotFound, InvalidOptions, InvalidNamespace, CommandNotSupported, "not
# implemented" and "not supported" of others, and the assertions "unrecognized pipeline stage" and "only
# supported on replica sets".
UNKNOWN = {2, 14, 59, 72, 73, 115, 238, 303, 40324, 40573}
SNAPSHOT_TOO_OLD = 239

REMEDIES = {
    **dict.fromkeys(
        DENIED,
        "correct user, password and authSource, and give the user readWrite on the agent's and the pools' "
        "databases (and, when these are several, find and changeStream on every database)",
    ),
    **dict.fromkeys(UNKNOWN, "give the agent a replica set or sharded cluster of MongoDB 5.0 or newer"),
    INVALID: "a validator of the collection does not let the agent's documents in: take it off in mongosh "
    "(collMod with validator: {}), or give the pool another database",
    166: "a view has the name of a collection of the agent's: give the pool another name or database, or "
    "drop the view",
    13297: "MongoDB tells databases of one name in capitals and small letters not apart: set "
    "DRSM_MONGO_DATABASE (or `database` of the pool) as the one there is spelt",
    SNAPSHOT_TOO_OLD: "raise MongoDB's parameter minSnapshotHistoryWindowInSeconds above the time that a "
    "read of all pools takes",
}
"""Answers that no waiting mends, by MongoDB's code, and what does. Everything else may be an outage."""

CONFIGURED = "correct the options in DRSM_MONGO_URL"
"""What the driver itself refuses: a way to authenticate without its package, an unknown kind of server."""

# Where the driver goes on to list its time-outs, its view of all servers, or the whole answer.
_DETAILS = (" (configured timeouts", ", Timeout: ", ", full error: ")
_LONGEST = 300


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Whatever the driver raises meanwhile means that MongoDB did not do `what`, or did not say so."""
    try:
        yield
    except DRIVER_ERRORS as error:
        raise unavailable(error, what) from error


def unavailable(error: Exception, what: str) -> StoreUnavailable:
    code = code_of(error)
    found = f"Expected MongoDB to answer {what}, found: {reason(error)}"
    if code in REMEDIES:
        return StoreRefused(f"{found}; {REMEDIES[code]}", code)
    if isinstance(error, ConfigurationError):
        return StoreRefused(f"{found}; {CONFIGURED}", code)
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
