"""Which spaces there are: one per pool, followed by the change stream, and the agent's own."""

from collections.abc import Collection, Sequence

from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.core.writes import LEADER, POSITION, SETTINGS, Write

FOLLOWED = (STAMPS, SESSIONS)
UNFOLLOWED = (LEADER, POSITION, SETTINGS)


def space_of(writes: Sequence[Write], known: Collection[str]) -> str:
    """The one space that all of `writes` are for."""
    spaces = sorted({write.space for write in writes})
    if len(spaces) != 1:
        raise ValueError(f"The writes of one call are for one space, but these are for {spaces}; split them")
    if spaces[0] not in known:
        raise ValueError(f"There is no space {spaces[0]!r}; the store was made for {sorted(known)}")
    return spaces[0]
