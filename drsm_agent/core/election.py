"""The leader lease (rule R8): when to look, when to take over, until when the lead holds.

A record is taken over only after it was seen unchanged for the larger of both `T`, on the observer's
own clock: no timestamp of another machine, nor of the database, is ever compared. The holder counts
its own deadline from before it sent the write, shortened as every lease is (rule R1).
"""

from dataclasses import replace

from drsm_agent.core.lease import holder_duration
from drsm_agent.core.writes import Insert, LeaderRecord, Update, first_lead, renew_lead, take_lead

RENEWALS_PER_TERM = 3


class Election:
    """One agent's view of the lead. `ttl` is its own `T` in seconds."""

    def __init__(self, agent: str, ttl: float) -> None:
        self.agent, self.ttl = agent, ttl
        self._seen: LeaderRecord | None = None
        self._unchanged_since = 0.0
        self._mine: LeaderRecord | None = None
        self._deadline = float("-inf")

    @property
    def period(self) -> float:
        """Seconds between two renewals, or two looks at another's record."""
        return self.ttl / RENEWALS_PER_TERM

    @property
    def mine(self) -> LeaderRecord | None:
        return self._mine

    @property
    def seen(self) -> LeaderRecord | None:
        return self._seen

    def held(self, now: float) -> bool:
        """Whether this agent leads at this moment; never stays true by itself."""
        return self._mine is not None and now < self._deadline

    def observed(self, record: LeaderRecord | None, now: float, floor: int = 0) -> Insert | Update | None:
        """Take note of the record as read just now; returns the write that takes the lead, if it is time.

        `floor` is the highest term known from elsewhere; a new term is above it.
        """
        if record != self._seen:
            self._seen, self._unchanged_since = record, now
        if record is None:
            return first_lead(self._next(floor))
        patience = max(self.ttl, record.ttl_ms / 1000)
        if record.holder and now - self._unchanged_since < patience:
            return None
        return take_lead(record, self._next(max(record.term, floor)))

    def won(self, taken: Insert | Update, sent: float) -> LeaderRecord:
        """The take-over was written; the lead counts from before it was sent."""
        fields = taken.document if isinstance(taken, Insert) else taken.set
        self._mine = LeaderRecord(
            holder=fields["holder"], term=fields["term"], counter=fields["counter"], ttl_ms=fields["ttl_ms"]
        )
        self._deadline = sent + holder_duration(self.ttl)
        return self._mine

    def renewal(self) -> Update | None:
        return renew_lead(self._mine) if self._mine else None

    def renewed(self, sent: float) -> None:
        if self._mine:
            self._mine = replace(self._mine, counter=self._mine.counter + 1)
            self._deadline = max(self._deadline, sent + holder_duration(self.ttl))

    def lost(self) -> None:
        """The lead is gone, or given up; what was seen starts afresh."""
        self._mine, self._seen, self._deadline = None, None, float("-inf")

    def _next(self, above: int) -> LeaderRecord:
        return LeaderRecord(holder=self.agent, term=above + 1, counter=0, ttl_ms=round(self.ttl * 1000))
