"""What an agent is made of, as the composition root puts it together."""

from collections.abc import Mapping
from dataclasses import dataclass

from drsm_agent.core.lease import Leases
from drsm_agent.core.placement import BesideGo
from drsm_agent.feed import Feed
from drsm_agent.metrics import Metrics
from drsm_agent.ports import Bus, Chance, Clock, Store, WallClock
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.subjects import Subjects


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the tasks of an agent share, leading or not."""

    store: Store
    bus: Bus
    feed: Feed
    subjects: Subjects
    leases: Leases
    go: BesideGo
    definitions: Mapping[str, Definition]
    clock: Clock
    wall_clock: WallClock
    chance: Chance
    metrics: Metrics
