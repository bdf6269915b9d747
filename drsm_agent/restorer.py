"""After an announced restore: puts back what living pods report, and lets nobody issue in doubt.

Until the end, `A + W` with the longest allocation lease there is, no session from before the restore gets a
new one: whatever the lost time has decided, about chunks that the restored table does not know, then still
holds. By then every living pod has reported, and a chunk has one owner again; and only a pod that holds just
what the table gives it may issue once more.
"""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterator

import structlog

from drsm_agent.core import restore, writes
from drsm_agent.core.documents import DEAD, Session
from drsm_agent.core.placement import visible_ms
from drsm_agent.core.restore import Key, Restored, Said, Step
from drsm_agent.core.table import PoolTable
from drsm_agent.errors import Refused, StoreUnavailable
from drsm_agent.feed import Entry
from drsm_agent.reign import Reign
from drsm_sdk.wire import messages as m

LOOK_AGAIN = 1.0
"""Seconds after which reports are looked at again, whatever has been heard meanwhile."""
DECIDE_TIMEOUT = 1.5
"""Less than a requester waits for an answer; it then asks again."""
WRITES_MAX = 1000
"""Chunks that one bulk write puts back."""
LEFT_OUT_MAX = 256
"""Pools that pods report and the database does not know: as many as a list may have."""

log = structlog.get_logger("drsm_agent.restorer")


class Restorer:
    """What one lead knows of the last restore; None: there never was one. `defined` are all pools that the
    database tells of, also those that were taken off the list before its backup."""

    def __init__(self, reign: Reign, restored: Restored | None, defined: Collection[str]) -> None:
        self._table, self._relay, self._grants = reign.table, reign.relay, reign.grants
        self._definitions, self._chance = reign.definitions, reign.chance
        self._restored, self._defined = restored, defined
        allocation_ms = round(reign.leases.allocation * 1000)
        sessions = reign.table.sessions.values()
        self.longest_ms = restored.longest(allocation_ms, sessions) if restored else allocation_ms
        self._open = self._grants.restoring = restored is not None and restored.open
        self._said: dict[Key, set[tuple[str, int, str]]] = defaultdict(set)
        self._complete: set[Key] = set()
        self._reports: dict[str, dict[Key, dict[int, Said]]] = {name: {} for name in reign.table.pools}
        self._accepted: dict[str, set[tuple[Key, int]]] = {name: set() for name in reign.table.pools}
        self._refused: dict[str, set[tuple[Key, int]]] = {name: set() for name in reign.table.pools}
        self._ours: dict[str, dict[int, str]] = {name: {} for name in reign.table.pools}
        self._left_out: set[str] = set()
        self._news = asyncio.Event()
        self._decided = asyncio.Event()

    # --- what requests ask ------------------------------------------------------------------------

    def may_issue(self, session: Session, *, agrees: bool) -> bool:
        """Whether a session may get an allocation lease. `agrees`: it holds just what the table says."""
        if self._restored is None or not self._restored.before(session.incarnation):
            return True
        return agrees and not self._open

    def counts(self, pool: str) -> bool:
        """Whether it matters what a pod holds of a pool: not once that was taken off the list, as nobody is
        granted any of it then. But if its chunks were never put back, others may hold the same."""
        return pool in self._table.pools or (self._restored is not None and pool in self._restored.unsettled)

    def takes(self, session: Session) -> bool:
        """Whether a session's reports are taken."""
        return self._open and self._restored is not None and self._restored.before(session.incarnation)

    def lost(self, report: m.Report) -> bool:
        """Whether a report is of a session that was lost with the database, and can be put back."""
        key = (report.pod, report.incarnation)
        known = key in self._table.sessions or self._restored is None
        return self._open and not known and bool(report.pools) and self._was_lost(report.incarnation)

    def check_reported(self, session: Session) -> None:
        """Raise Refused while it is not settled what a session holds. Told that, it would drop what is
        not put back yet, and take up what others may report; repeating that it gives a chunk back, which it
        did before the restore, it would free what others have issued from since."""
        if self.takes(session):
            raise Refused(
                "store_unavailable",
                "the database was restored: who holds what is being found out",
                reason="restoring",
                retry=True,
            )

    async def report(self, key: Key, report: m.Report) -> int:
        """Take a page of a session's report; returns how many of its chunks are the session's now. Raises
        Refused, to be repeated, while that cannot be known yet."""
        for pool, n, grant, marked in report.chunks:
            self._said[key].add((pool, n, grant))
            if pool not in self._defined and len(self._left_out) < LEFT_OUT_MAX:
                self._left_out.add(pool)
            if pool in self._reports and n < self._definitions[pool].capacity:
                self._reports[pool].setdefault(key, {})[n] = Said(grant, marked)
        if len(self._said[key]) >= report.total:
            self._complete.add(key)
        taken = {(pool, n) for pool, reports in self._reports.items() for n in reports.get(key, {})}
        numbers = taken & {(pool, n) for pool, n, *_ in report.chunks}
        self._news.set()
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT):
                while any((pool, n) in numbers for pool, n in self._pending(key)):
                    await self._decided.wait()
        except TimeoutError:
            message = "it is not known yet whether others hold some of these chunks"
            raise Refused("store_unavailable", message, reason="restoring", retry=True) from None
        return sum((key, n) in self._accepted[pool] for pool, n in numbers)

    def note(self, entry: Entry) -> None:
        """Something changed: perhaps who could have reported is dead."""
        if self._open and entry.events:
            self._news.set()

    # --- putting back -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Until everybody has had the time to report."""
        if not self._open or self._restored is None:
            return
        log.warning("restoring", seconds=round(self._grants.left(), 1), action="taking reports")
        while (left := self._grants.left()) > 0:
            try:
                await self._settle()
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))
            try:
                async with asyncio.timeout(min(left, LOOK_AGAIN)):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
        while self._open:
            try:
                await self._finish(self._restored)
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))
                await asyncio.sleep(LOOK_AGAIN)

    async def _finish(self, restored: Restored) -> None:
        await self._settle(last=True)
        for pool in self._table.pools.values():
            reports, ours = self._reports[pool.name], self._ours[pool.name]
            await self._write(pool, list(restore.left_over(pool, reports, self._complete, ours)))
        settled = restored.settled(self._table.pools, self._left_out)
        await self._relay.write_unseen([restore.close(settled)])
        self._restored, self._open, self._grants.restoring = settled, False, False
        accepted = sum(map(len, self._accepted.values()))
        log.info("restored", pods=len(self._said), put_back=accepted, left_out=list(settled.unsettled))

    async def _settle(self, *, last: bool = False) -> None:
        for pool in self._table.pools.values():
            undead = {s.key for s in self._table.sessions.values() if s.state != DEAD} | pool.live.keys()
            accepted, refused = self._accepted[pool.name], self._refused[pool.name]
            reports = self._reports[pool.name]
            decided = restore.decide(
                pool, reports, self._complete, undead, settled=accepted | refused, last=last
            )
            await self._write(pool, decided.steps)
            refused |= decided.refused
            accepted |= {
                (key, n)
                for key, chunks in reports.items()
                for n, said in chunks.items()
                if (chunk := pool.chunks.get(n)) and (chunk.owner.key, chunk.grant) == (key, said.grant)
            }
            accepted -= refused
        self._decided.set()
        self._decided = asyncio.Event()

    async def _write(self, pool: PoolTable, steps: list[Step]) -> None:
        hold_ms = self.longest_ms + visible_ms(self._definitions[pool.name].usage_lag_ms)
        for batch in _batches(steps):
            decided = []
            for step in batch:
                grant = step.grant or self._chance.token()
                if not step.grant:
                    self._ours[pool.name][step.n] = grant
                hold = hold_ms if step.marked else None
                decided.append(
                    writes.put_back(pool.name, step.n, step.seen, step.owner, grant=grant, hold_ms=hold)
                )
            outcome = await self._relay.commit(decided)
            log.info("put_back", pool=pool.name, chunks=outcome.changed)

    def _pending(self, key: Key) -> Iterator[tuple[str, int]]:
        """What a session has reported and is not decided yet."""
        for pool, reports in self._reports.items():
            for n in reports.get(key, {}):
                if (key, n) not in self._accepted[pool] and (key, n) not in self._refused[pool]:
                    yield pool, n

    def _was_lost(self, incarnation: int) -> bool:
        return self._restored is not None and self._restored.lost(incarnation)


def _batches(steps: list[Step]) -> Iterator[list[Step]]:
    for start in range(0, len(steps), WRITES_MAX):
        yield steps[start : start + WRITES_MAX]
