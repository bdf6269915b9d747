"""One lead over one table: what the tasks of a serving leader share.

It begins when the leader has caught up, and ends with the lead, or when the table is read anew.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from drsm_agent.core.lease import Leases
from drsm_agent.core.placement import BesideGo
from drsm_agent.core.session import Key, LivenessLeases
from drsm_agent.core.table import PoolTable, Table
from drsm_agent.errors import Refused
from drsm_agent.lead import Lead
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Chance, Clock
from drsm_agent.relay import Relay
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import Use


class Grants:
    """Whether this leader may grant and claim: not while chunks that look free may be in use, nor while it is
    `restoring`, as a chunk that is granted then would be taken for one that its pod does not hold."""

    def __init__(self, clock: Clock, wait: float = 0.0) -> None:
        self._clock, self._from = clock, clock() + wait
        self.restoring = False

    def allowed(self) -> bool:
        return not self.restoring and self.left() <= 0

    def left(self) -> float:
        """Seconds until chunks that look free are free; 0 or less when they are now."""
        return self._from - self._clock()

    def put_off(self, seconds: float) -> None:
        """Not before so many seconds from now."""
        self._from = max(self._from, self._clock() + seconds)


class Hearing:
    """When this leader last heard a pod; it gives everyone a lease to be heard in."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._at = clock, clock()
        self.any = asyncio.Event()

    def heard(self) -> None:
        """A pod's request came."""
        self._at = self._clock()
        self.any.set()

    def silence(self) -> float:
        """Seconds since the last one."""
        return self._clock() - self._at


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """`liveness` are the leases that this leader judges by; `use` is what each pod said last of its
    stocks."""

    lead: Lead
    table: Table
    relay: Relay
    liveness: LivenessLeases
    grants: Grants
    use: dict[Key, dict[str, Use]]
    hearing: Hearing
    leases: Leases
    go: BesideGo
    definitions: Mapping[str, Definition]
    clock: Clock
    chance: Chance
    metrics: Metrics

    def pool(self, name: str) -> PoolTable:
        """The pool of a request. Raises Refused: unknown_pool."""
        if name not in self.table.pools:
            raise Refused("unknown_pool", f"no pool {name}; `drsm pools` lists those there are")
        return self.table.pools[name]
