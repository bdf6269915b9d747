"""The keepalives that the agent keeps for Go DRSM pods on the same collection; `core/keepalives.py` says
which there shall be, and why.

Each living session has its mirror before it gets a chunk: `ensure` is asked before every grant and claim. All
else is done in rounds, and at once for names about which something has changed.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from drsm_agent.core import keepalives, writes
from drsm_agent.core.documents import (
    DEAD,
    GO_INCARNATION,
    OPENED,
    Chunk,
    Owner,
    Session,
    chunk_number,
    session_number,
)
from drsm_agent.core.keepalives import Ends
from drsm_agent.core.placement import hold_ms
from drsm_agent.core.session import Key
from drsm_agent.core.table import SESSIONS, PoolTable
from drsm_agent.core.writes import Write
from drsm_agent.errors import Refused, StoreUnavailable
from drsm_agent.feed import Entry
from drsm_agent.go_pods import GoPods
from drsm_agent.reign import Reign

CHECK_INTERVAL = 5.0
"""Between two rounds; a Go pod looks at other pods' keepalives no more often."""
SETTLES = 5.0
"""Seconds after a delete in which Go pods may still claim what names the pod."""
SHOWN_AGAIN = 60.0
"""Seconds until Go pods are shown again that a pod is dead, whose chunks none of them has claimed: those that
were cut off then have missed it."""
WRITES_MAX = 1000
"""Of one bulk write."""
ROUNDS_MAX = 3
"""Times that others may write a keepalive of the name first, before a requester is told to try again."""

IN_THE_WAY = "a document of the pool's collection that is no keepalive has the pod's name as _id; delete it"

log = structlog.get_logger("drsm_agent.mirrors")
Name = tuple[str, str]
"""A pool and a pod of it."""


class Mirrors:
    """The keepalives of one lead, with one bulk write per pool and round."""

    def __init__(self, reign: Reign, go_pods: GoPods) -> None:
        self._table, self._relay, self._leases = reign.table, reign.relay, reign.leases
        self._definitions, self._clock, self._grants = reign.definitions, reign.clock, reign.grants
        self._go, self.go_pods = reign.go, go_pods
        self._gone_at: dict[Name, float] = dict.fromkeys(self._gone_before(), self._clock())
        """When a keepalive was deleted."""
        self._over_since: dict[tuple[str, Key, bool], float] = {}
        """Since when a dead pod of a pool has chunks, or has none."""
        self._opened_at: dict[Key, float] = {}
        self._holds: dict[tuple[str, Key], tuple[int, float]] = {}
        """The longest hold of a dead pod's chunks, in seconds, and of which chunks."""
        self._shown_at: dict[Name, float] = {}
        self._namesakes: set[Name] = set()
        self._in_the_way: set[Name] = set()
        """Names whose keepalive cannot be written, as a document that is none has its `_id`."""
        self._changed: set[Key] = set()
        """Sessions about which something has changed."""
        self._news = asyncio.Event()

    # --- What grants and claims ask ------------------------------------------------------------------

    async def ensure(self, pool: PoolTable, owners: Iterable[Owner]) -> None:
        """See that each of these living pods has a keepalive that Go pods take for its life, as far as
        nothing is in the way. Raises StoreUnavailable."""
        for _ in range(ROUNDS_MAX):
            missing = [
                owner
                for owner in owners
                if not self._shows(pool, owner) and (pool.name, owner.name) not in self._in_the_way
            ]
            ends = self._ends()
            needed = [write for owner in missing if (write := keepalives.for_living(pool, owner, ends))]
            if not needed:
                return
            await self._relay.commit(needed)
        for owner in missing:
            if owner.name not in pool.keepalives:
                self._tell_in_the_way(pool, owner.name)

    def may_receive(self, pool: PoolTable, owner: Owner) -> bool:
        """Whether a pod may get chunks at this moment: it has a keepalive, and none of its name was deleted
        just now, as Go pods then claim whatever names it. Without Go pods nothing depends on it."""
        return not pool.has_go or (self._settled(pool, owner.name) and self._shows(pool, owner))

    def refusal(self, pool: PoolTable, owner: Owner) -> Refused:
        """What a pod is told that may not."""
        if (pool.name, owner.name) in self._in_the_way:
            message = f"Go pods do not know pod {owner.name}: {IN_THE_WAY}"
            return Refused("store_unavailable", message, reason="keepalive", retry=True)
        message = f"a keepalive of pod {owner.name} was deleted, and Go pods may claim what names it"
        return Refused("store_unavailable", message, reason="settling", retry=True)

    def _tell_in_the_way(self, pool: PoolTable, name: str) -> None:
        """Once, until it changes."""
        if (pool.name, name) not in self._in_the_way:
            self._in_the_way.add((pool.name, name))
            log.error("keepalive_in_the_way", pool=pool.name, pod=name, action=IN_THE_WAY)

    def _gone_before(self) -> Iterator[Name]:
        """Names whose keepalive may have been deleted just before this lead: those that this agent has seen
        go, by the database's time; and all that there are, if it has begun to look later than that."""
        began = self._table.seconds - (self._table.started >> 32) <= SETTLES
        for pool in self._table.pools.values():
            for name, at in pool.gone.items():
                if self._table.seconds - (at >> 32) <= SETTLES:
                    yield pool.name, name
            for name in [name for name, _ in pool.held] + [*pool.keepalives]:
                if began or name not in pool.keepalives:
                    yield pool.name, name

    def _shows(self, pool: PoolTable, owner: Owner) -> bool:
        return keepalives.shows(pool, owner)

    def _settled(self, pool: PoolTable, name: str) -> bool:
        return self._clock() - self._gone_at.get((pool.name, name), float("-inf")) >= SETTLES

    # --- Rounds --------------------------------------------------------------------------------------

    def note(self, entry: Entry) -> None:
        """Something changed: what is about keepalives or sessions is looked at at once."""
        now = self._clock()
        for space, key in entry.changed:
            if space == SESSIONS:
                self._changed |= {number} if (number := session_number(key)) else set()
            elif (pool := self._table.pools.get(space)) and chunk_number(key) is None:
                seen = pool.keepalives.get(key)
                self._in_the_way.discard((space, key))  # perhaps it was that document that changed
                if seen is None:
                    self._gone_at[space, key] = now
                if seen is None or seen.mirrored is None:  # what we wrote ourselves needs no second look
                    self._changed |= {
                        session for session in (*self._table.sessions, *pool.held) if session[0] == key
                    }
        if self._changed:
            self._news.set()

    async def run(self) -> None:
        next_round = float("-inf")
        while True:
            try:
                if (now := self._clock()) >= next_round:
                    await self._round()
                    next_round = now + CHECK_INTERVAL
                else:
                    await self._catch_up()
            except StoreUnavailable as error:
                log.warning("put_off", error=str(error))
                next_round = self._clock() + CHECK_INTERVAL
            try:
                async with asyncio.timeout(max(next_round - self._clock(), 0)):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    async def _catch_up(self) -> None:
        """For sessions about which something has changed, and of whose name there is a keepalive. One that
        has none gets it with its first chunk, or by the next round."""
        changed, self._changed = self._changed, set()
        ends = self._ends()
        for pool in self._table.pools.values():
            named = [key for key in changed if key[0] in pool.keepalives]
            if decided := list(self._kept(pool, named, ends)):
                await self._relay.write_unseen(decided)

    async def _round(self) -> None:
        self._changed = set()
        now, ends = self._clock(), self._ends()
        opened = [session.key for session in self._table.sessions.values() if session.state == OPENED]
        for pool in self._table.pools.values():
            await asyncio.sleep(
                0
            )  # others have their turn: a thousand pods in each of many pools take a while
            self._note_dead(pool, now)
            decided = [
                *self._kept(pool, dict.fromkeys([*pool.live, *opened, *pool.held]), ends),
                *self._stood_in(pool, ends),
                *self._over(pool, now, ends),
                *self._shown_again(pool, now, ends),
                *self._overdue(pool, now),
                *self._left(pool, now),
            ]
            for start in range(0, len(decided), WRITES_MAX):
                await self._relay.write_unseen(decided[start : start + WRITES_MAX])
        self._forget()

    def _kept(self, pool: PoolTable, sessions: Iterable[Key], ends: Ends) -> Iterator[Write]:
        """What the keepalives of living sessions need; those of Go pods beside which one begins; and those of
        the dead who may still issue."""
        for key in sessions:
            if key[1] == GO_INCARNATION:
                continue
            if owner := pool.live.get(key):
                write = keepalives.for_living(pool, owner, ends)
            elif (session := self._table.sessions.get(key)) and session.state == OPENED:
                joins = pool.name in session.pools
                write = keepalives.for_beginning(pool, session.owner, ends) if joins else None
            elif key in pool.held and not self._is_over(pool, key, self._clock()):
                yield from filter(None, [keepalives.for_dead(pool, self._of_chunks(pool, key), ends)])
                continue
            else:
                continue
            if pool.has_go:
                self._watch_namesake(pool, key)
            if write:
                yield write

    @staticmethod
    def _of_chunks(pool: PoolTable, key: Key) -> Owner:
        """A pod as its chunks name it."""
        return pool.chunks[next(iter(pool.held[key].numbers))].owner

    def _ends(self) -> Ends:
        """By the database's time, which its TTL monitor goes by, and no other clock."""
        at = self._table.seconds + keepalives.ahead(self._leases.allocation)
        return Ends(datetime.fromtimestamp(at, tz=UTC), at - self._leases.allocation / 2)

    def _watch_namesake(self, pool: PoolTable, key: Key) -> None:
        """Tell it once when a Go pod renews its keepalive under the name of a session that has begun."""
        of, since = (pool.name, key[0]), self._opened_at.setdefault(key, self._clock())
        alive = (key[0], GO_INCARNATION) in pool.live and self.go_pods.heard_since(*of, since)
        if alive and of not in self._namesakes:
            self._namesakes.add(of)
            log.error(
                "go_namesake",
                pool=pool.name,
                pod=key[0],
                action="a Go pod and an SDK pod of this name live at once: both keep their chunks; stop one "
                "of them, or give it another name (HOSTNAME)",
            )

    def _stood_in(self, pool: PoolTable, ends: Ends) -> Iterator[Write]:
        """Go pods that own chunks, have no keepalive and are silent: nothing else says that they are down."""
        for name, incarnation in pool.held if pool.go_chunks else ():
            untold = incarnation == GO_INCARNATION and keepalives.is_unknown(pool, name)
            if untold and self.go_pods.is_silent(pool.name, name):
                if name in pool.odd:
                    self._tell_in_the_way(pool, name)
                else:
                    yield keepalives.for_silent_go(pool, name, ends)

    # --- The dead ------------------------------------------------------------------------------------

    def _note_dead(self, pool: PoolTable, now: float) -> None:
        """Since when this leader has known of dead pods that have a keepalive, or chunks."""
        dead = {owner.key for _, owner in keepalives.of_nobody(pool) if not owner.is_go}
        dead |= {key for key in pool.held if key not in pool.live and key[1] != GO_INCARNATION}
        known = {(pool.name, key, key in pool.held) for key in dead}
        for over in known:
            self._over_since.setdefault(over, now)
        for over in [over for over in self._over_since if over[0] == pool.name and over not in known]:
            del self._over_since[over]

    def _over(self, pool: PoolTable, now: float, ends: Ends) -> Iterator[Write]:
        """The keepalives of the dead go once nobody issues from their chunks."""
        for seen, owner in keepalives.of_nobody(pool):
            if write := keepalives.forgets_go(pool, seen):
                yield write
                continue
            writing = keepalives.go_writes_under(pool, owner.name)
            if writing and not self.go_pods.is_silent(pool.name, owner.name):
                continue
            if owner.key in pool.held and not self._is_for_go(pool):
                continue
            if not self._is_over(pool, owner.key, now) or self._lingers(pool, owner.name, now):
                continue
            shown = self._shown_at.get((pool.name, owner.name), float("-inf"))
            if owner.is_go and owner.key in pool.held and now - shown < SHOWN_AGAIN:
                continue  # it stands in for the Go pod again as soon as it is gone
            self._shown_at[pool.name, owner.name] = now
            yield writes.delete_keepalive(pool.name, seen)

    def _shown_again(self, pool: PoolTable, now: float, ends: Ends) -> Iterator[Write]:
        """Dead pods of ours that have no keepalive any more, and whose chunks no Go pod has claimed: a
        keepalive that the next round deletes."""
        for key in pool.held if self._is_for_go(pool) else ():
            if key[1] == GO_INCARNATION or key in pool.live or key[0] in pool.keepalives:
                continue
            shown = self._shown_at.setdefault((pool.name, key[0]), now)
            if now - shown >= SHOWN_AGAIN and self._is_over(pool, key, now):
                owner = self._of_chunks(pool, key)
                yield writes.mirror_keepalive(pool.name, owner, ends.expire_at)

    def _left(self, pool: PoolTable, now: float) -> Iterator[Write]:
        """Chunks of dead pods of ours under whose names Go pods live: nobody is shown the death of those."""
        for key in pool.held if self._is_for_go(pool) else ():
            go = pool.live.get((key[0], GO_INCARNATION))
            if go and key[1] != GO_INCARNATION and key not in pool.live and self._is_over(pool, key, now):
                for n in pool.held[key].numbers:
                    yield writes.leave_to_go(pool.name, pool.chunks[n], go)

    def _is_for_go(self, pool: PoolTable) -> bool:
        """Whether Go pods, and only they, can claim an orphan: for a pod of ours it is claimed with a
        hold."""
        return bool(pool.live) and all(owner.is_go for owner in pool.live.values())

    def _is_over(self, pool: PoolTable, key: Key, now: float) -> bool:
        """Whether nobody issues from a dead pod's chunks any more."""
        since = self._over_since.get((pool.name, key, key in pool.held), now)
        return self._grants.allowed() and now - since >= self._patience(pool, key)

    def _lingers(self, pool: PoolTable, name: str, now: float) -> bool:
        """Whether a dead pod of ours of this name may still issue."""
        return any(
            key[0] == name and key[1] != GO_INCARNATION and not self._is_over(pool, key, now)
            for key in pool.held
        )

    def _overdue(self, pool: PoolTable, now: float) -> Iterator[Write]:
        """Silent Go pods' keepalives that MongoDB should have deleted: then other Go pods learn of the
        death."""
        for key, seen in pool.keepalives.items():
            silent = seen.mirrored is None and seen.go_down
            overdue = silent and keepalives.overdue(seen, self._table.seconds)
            if overdue and not self._lingers(pool, key, now):
                yield writes.delete_keepalive(pool.name, seen)

    def _patience(self, pool: PoolTable, key: Key) -> float:
        """Seconds from a death, as this leader has seen it, until nobody issues from the dead pod's chunks:
        the longest hold of those that name it, or `A + W` when none does. One that is not dead, but not live
        either, keeps its mirror."""
        if key[1] == GO_INCARNATION:
            return 0.0
        session = self._table.sessions.get(key)
        if session and session.state != DEAD:
            return float("inf")
        held = pool.held.get(key)
        if held is None:
            allocation_ms = session.promised_ms if session else round(self._leases.allocation * 1000)
            return (allocation_ms + self._definitions[pool.name].usage_lag_ms) / 1000
        known = self._holds.get((pool.name, key))
        if known is None or known[0] != held.checksum:  # a dead pod's chunks go, and none comes
            longest_ms = max(self._hold_ms(pool, pool.chunks[n], session) for n in held.numbers)
            known = self._holds[pool.name, key] = held.checksum, longest_ms / 1000
        longest = known[1]
        return longest if self._go.claims_after is None else min(longest, self._go.claims_after)

    def _hold_ms(self, pool: PoolTable, chunk: Chunk, former: Session | None) -> int:
        """What an SDK pod would hold it for; but not for longer because it came from a Go pod: Go pods know
        no hold for each other's chunks."""
        usage_lag_ms = self._definitions[pool.name].usage_lag_ms
        if chunk.go_owners and chunk.drsm:
            chunk = replace(chunk, drsm=replace(chunk.drsm, hold_ms=0))
        return hold_ms(chunk, former, round(self._leases.allocation * 1000), usage_lag_ms)

    def _forget(self) -> None:
        """What is about nobody any more, or long past."""
        now = self._clock()
        self._gone_at = {of: at for of, at in self._gone_at.items() if now - at < SETTLES}
        self._shown_at = {of: at for of, at in self._shown_at.items() if now - at < 2 * SHOWN_AGAIN}
        self._holds = {
            of: known for of, known in self._holds.items() if of[1] in self._table.pools[of[0]].held
        }
        self._opened_at = {key: at for key, at in self._opened_at.items() if key in self._table.sessions}
