"""The lead as the leader's tasks hold it: a question that must be asked each time, never a fact to keep."""

from drsm_agent.core.election import Election
from drsm_agent.core.writes import LeaderRecord
from drsm_agent.errors import LeadLost
from drsm_agent.ports import Chance, Clock

COUNTER_START_BELOW = 2**31
"""Random, so that a term that was lost with the database does not give the same incarnations again."""


class Lead:
    """One term's lead of this agent."""

    def __init__(self, election: Election, clock: Clock, chance: Chance) -> None:
        if election.mine is None:
            raise LeadLost("this agent does not lead")
        self._election, self._clock = election, clock
        self.agent, self.term, self.ttl = election.agent, election.mine.term, election.ttl
        self.since = clock()
        self._incarnations = chance.below(COUNTER_START_BELOW)
        self._touches = 0

    def check(self) -> None:
        """Raise LeadLost unless the lead is valid at this moment (rule R2)."""
        mine = self._election.mine
        if mine is None or mine.term != self.term or not self._election.held(self._clock()):
            raise LeadLost(f"the lead of term {self.term} is not valid any more")

    @property
    def record(self) -> LeaderRecord | None:
        """As this agent wrote it last; None once the lead is lost."""
        return self._election.mine

    def next_incarnation(self) -> int:
        """`term << 32 | n`: above every incarnation before it, also after the table was read anew."""
        self._incarnations += 1
        return self.term << 32 | self._incarnations

    def next_touch(self) -> int:
        """The number of another write that is only to come back in the change stream."""
        self._touches += 1
        return self._touches

    def age(self) -> float:
        """Seconds since this lead began."""
        return self._clock() - self.since
