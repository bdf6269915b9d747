"""DRSM for applications: ids from a number space that the pods of a network function share.

`Drsm` is a pod that allocates, `Demux` a consumer that maps ids to their owners. `changes` has what
`pool.changes()` yields, `wire` the protocol. See `errors` for all that can be raised.
"""

from drsm_sdk import changes
from drsm_sdk.client import Drsm
from drsm_sdk.demux import Demux
from drsm_sdk.errors import (
    AgentUnavailable,
    BadRequest,
    DrsmError,
    Failed,
    NotAllocated,
    NotOwner,
    PoolEmpty,
    PoolExhausted,
    SessionLost,
)
from drsm_sdk.pods import Owner, Pod
from drsm_sdk.pool import Pool, Stats

__all__ = [
    "AgentUnavailable",
    "BadRequest",
    "Demux",
    "Drsm",
    "DrsmError",
    "Failed",
    "NotAllocated",
    "NotOwner",
    "Owner",
    "Pod",
    "Pool",
    "PoolEmpty",
    "PoolExhausted",
    "SessionLost",
    "Stats",
    "changes",
]
