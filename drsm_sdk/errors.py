"""Every error an application can get from the SDK.

DrsmError
|-- PoolEmpty           no stock just now; more is on its way
|-- PoolExhausted       the agent's verdict: not one chunk of the pool is free
|-- NotOwner            the id's chunk is not this pod's
|-- NotAllocated        the chunk is this pod's, the id is not issued
|-- AgentUnavailable    no answer within the deadline; nothing is known to be wrong with the session
|-- SessionLost         the agent's verdict: this incarnation is over
|-- BadRequest          refused, and would be again
`-- Failed              a background task of the SDK broke; the object is of no more use

`from_failure` turns an error answer of the agent into one of them.
"""

from drsm_sdk.wire.messages import ERROR_CODES, Failure
from drsm_sdk.wire.space import Item


class DrsmError(Exception):
    """Base of all errors of the SDK; catch it to catch them all."""


class PoolEmpty(DrsmError):
    """Raised when a pool has no id to issue just now: by `allocate_nowait` at once, by `allocate` at its
    deadline. The SDK is already asking for more; trying again later makes sense."""

    def __init__(self, pool: str) -> None:
        super().__init__(
            f"pool {pool}: no id in stock just now; await allocate(), or try again in a few milliseconds"
        )
        self.pool = pool


class PoolExhausted(DrsmError):
    """Raised by `allocate` when the agent said that not one chunk of the pool could be granted; `said` are
    its words, with the pool's fill level. `wait`, unless 0, is after how many seconds it will grant one at
    the latest: the pod has too many chunks of its former lives on hold."""

    def __init__(self, pool: str, said: str = "", wait: float = 0.0) -> None:
        why = (
            "every chunk is owned, and this pod's ids are all in use or in claimed chunks that are not "
            f"scanned yet{said and f' ({said})'}; release ids, or define the pool larger"
        )
        super().__init__(f"pool {pool}: {said if wait else why}")
        self.pool, self.said, self.wait = pool, said, wait


class NotOwner(DrsmError):
    """Raised when an id lies in a chunk that this pod does not own, or is one that is never issued."""

    def __init__(self, pool: str, id_: Item) -> None:
        super().__init__(
            f"pool {pool}: id {id_} is not in a chunk of this pod, or is never issued; "
            "pool.owner(id) tells whose it is"
        )
        self.pool, self.id = pool, id_


class NotAllocated(DrsmError):
    """Raised by `release` when the id is this pod's but not issued: released twice, or never allocated."""

    def __init__(self, pool: str, id_: Item) -> None:
        super().__init__(
            f"pool {pool}: id {id_} is not issued; release an id once, and only what was allocated"
        )
        self.pool, self.id = pool, id_


class AgentUnavailable(DrsmError):
    """Raised when the agent, or NATS, gave no usable answer before the deadline; by `allocate_nowait` when
    the allocation lease has run out (or, with `on_silence="stop"`, the liveness lease). `reason` is the
    last thing that went wrong. The session may well live on: try again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no usable answer from the agent: {reason}")
        self.reason = reason


class SessionLost(DrsmError):
    """Raised when the agent has ended this pod's session: `reason` is `expired`, `closed`, `superseded`, or
    what a newer agent says. Ids issued before are no longer this pod's. A new session is opened by itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session is over ({reason}); ids issued in it are no longer this pod's")
        self.reason = reason


class BadRequest(DrsmError):
    """Raised when a request, or an argument, is wrong and would be refused again. `error` is the protocol's
    name for it: `bad_request`, `not_joined`, `unknown_pool`, `too_large`."""

    def __init__(self, message: str, error: str = "bad_request") -> None:
        super().__init__(message)
        self.error = error


class Failed(DrsmError):
    """Raised by every call after a background task of the SDK broke unexpectedly: nothing is issued any
    more. The cause is chained and was logged. Leave the `async with` block and connect anew."""

    def __init__(self) -> None:
        super().__init__("a background task of the SDK failed (see the cause); leave the block, connect anew")


def from_failure(failure: Failure, code: int, pool: str) -> DrsmError:
    """The error for an answer with `code` in its header; `pool` is what the request was about, or empty.

    Names that this version does not know are judged by their code: 410 ends the session, 507 is
    exhaustion, other codes from 400 to 499 are the request's fault, the rest the agent's.
    """
    known = failure.code if failure.error in _NAMES else code
    if known == 410:
        return SessionLost(failure.reason or failure.message)
    if known == 507:
        return PoolExhausted(pool, failure.message, failure.wait_ms / 1000)
    if 400 <= known < 500:
        return BadRequest(failure.message or failure.error, failure.error)
    return AgentUnavailable(f"{failure.error}: {failure.message}")


_NAMES = frozenset(ERROR_CODES)
