"""Go DRSM pods on the same collection: who is silent, and what came back.

A Go pod has no lease, and nobody can tell it to stop. Its keepalive is its only sign of life, with the
chunks that it writes. The leader counts for how long it has seen none, on its own clock, and only while it
would have seen one. What it concludes it writes into documents, so that every agent and every demux sees the
same (G5).

A Go pod that stood still and goes on issues from chunks that SDK pods have claimed meanwhile. Nothing
prevents that; but each such chunk remembers whom it came from, and when that name shows a sign of life, the
chunk goes back to it, or nothing is issued from it by our pod either.
"""

from collections.abc import Callable, Iterator

import structlog

from drsm_agent.core import keepalives, writes
from drsm_agent.core.documents import GO_INCARNATION, LIVE, Chunk, Owner, chunk_number
from drsm_agent.core.events import CLAIMED
from drsm_agent.core.lease import RATE
from drsm_agent.core.numbers import KNOWN_SHARE, go_knows
from drsm_agent.core.placement import visible_ms
from drsm_agent.core.table import PoolTable
from drsm_agent.core.writes import Update, Write
from drsm_agent.feed import Entry
from drsm_agent.probe import Probe
from drsm_agent.reign import Reign
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import INTEGER, Space

SETTLES = 5.0
"""Seconds after a Go pod's first sign of life until its chunks move: by then it has heard that its keepalive
was deleted, and no longer claims what names it."""
STREAM_GAP = 10.0
"""The leader makes something happen each two seconds: after a longer pause the stream was interrupted, and
Go pods may have been as well."""
LOOK_AGAIN = 30.0
"""Seconds until the chunks that came from a Go pod that is back are looked through again, all of them."""
HOLD_SHARE = 0.5
"""While a Go pod goes on issuing from our pod's chunk, that is held anew after so much of the Go pods'
hold."""
WRITES_MAX = 1000
"""Chunks that one bulk write moves."""
NAMED_MAX = 10
"""Chunks that a log line names."""
GO_CHUNKS_MAX = 2**21
"""Go's ids are signed integers of 32 bits, of which the lowest 10 are the slot."""
GO_BLOCK_BITS, GO_SLOTS = 10, 1000

log = structlog.get_logger("drsm_agent.go_pods")
Name = tuple[str, str]
"""A pool and a pod of it."""


class GoPods:
    """What one lead knows of Go pods."""

    def __init__(self, reign: Reign, probe: Probe, stream_stands: Callable[[], bool]) -> None:
        self._table, self._relay, self._leases = reign.table, reign.relay, reign.leases
        self._definitions, self._clock, self._chance = reign.definitions, reign.clock, reign.chance
        self._metrics, self._hold = reign.metrics, reign.go.hold
        self._probe, self._stream_stands = probe, stream_stands
        self._fresh_since = self._clock()
        self._noted_at = self._fresh_since
        self._signs: dict[Name, int] = {
            (pool.name, name): count
            for pool in self._table.pools.values()
            for name, count in pool.signs.items()
        }
        self._forget_at = float("-inf")
        self._heard: dict[Name, float] = {}
        self._told: dict[Name, int] = {}
        """Who was said to be silent, after which sign."""
        self._back_since: dict[Name, float] = {}
        self._claimed: dict[tuple[str, int], tuple[str, float]] = {}
        """Our claims of Go pods' chunks: the grant, and when it was sent."""
        self._moved: dict[tuple[str, int], tuple[str, float]] = {}
        """Chunks of ours that are held as a Go pod issues from them: the grant, and since when."""
        self._looked_at: dict[Name, float] = {}
        """Until when those chunks need not be looked at."""
        self._passed_on: dict[tuple[str, int], tuple[Owner, str]] = {}
        self._origins: dict[tuple[str, int], dict[str, Owner]] = {}
        """The Go pods that this lead has claimed our pods' chunks from, by name."""

    # --- Signs of life -------------------------------------------------------------------------------

    def note(self, entry: Entry) -> None:
        """Something changed: perhaps a Go pod has shown that it lives, or has claimed a chunk."""
        now = self._clock()
        if now - self._noted_at > STREAM_GAP:
            self._fresh_since = now
        self._noted_at = now
        for space, key in entry.changed:
            pool = self._table.pools.get(space)
            if pool is None or not pool.signs:
                continue
            n = chunk_number(key)
            chunk = pool.chunks.get(n) if n is not None else None
            self._look(pool, chunk.pod if chunk else key, now)
        for event in entry.events:
            if event.kind == CLAIMED and event.owner and event.previous and event.owner.is_go:
                self._note_claim(event.pool, event.chunks, event.owner, event.previous)

    def _look(self, pool: PoolTable, name: str, now: float) -> None:
        count = pool.signs.get(name, 0)
        if count != self._signs.get((pool.name, name), 0):
            self._signs[pool.name, name] = count
            self._heard[pool.name, name] = now

    def _note_claim(self, pool: str, chunks: tuple[int, ...], owner: Owner, previous: Owner) -> None:
        """By a Go pod: of another one's chunk, whose name is to be remembered; or of a living pod of ours,
        unless the agent gave it, which leaves `drsm` nobody's."""
        if previous.is_go:
            if previous.name != owner.name:
                self._passed_on |= {(pool, n): (owner, previous.name) for n in chunks}
            return
        session = self._table.sessions.get(previous.key)
        known = self._table.pools[pool].chunks
        chunks = tuple(n for n in chunks if n in known and (drsm := known[n].drsm) and drsm.pod)
        if chunks and session is not None and session.state == LIVE:
            self._metrics.claimed_by_go.labels(pool=pool).inc(len(chunks))
            log.error(
                "claimed_by_go",
                pool=pool,
                pod=previous.name,
                by=owner.name,
                chunks=chunks[:NAMED_MAX],
                count=len(chunks),
                action="a Go pod took chunks of a pod that lives, whose keepalive it has seen deleted: did "
                "all agents stand still, or did somebody delete it? Its other chunks are safe",
            )

    def heard_since(self, pool: str, name: str, since: float) -> bool:
        """Whether a Go pod has shown a sign of life after a moment of the leader's clock."""
        return self._heard.get((pool, name), float("-inf")) > since

    def is_silent(self, pool: str, name: str) -> bool:
        """Whether a Go pod is down: for so long there was no sign of it, though there would have been one."""
        return self.silence(pool, name) >= keepalives.GO_SILENCE

    def silence(self, pool: str, name: str) -> float:
        """Seconds since its last sign of life, as far as this leader has seen any."""
        now = self._clock()
        return now - max(self._heard.setdefault((pool, name), now), self._fresh_since)

    def next_look(self) -> float | None:
        """When the next one may be silent, or come back for its chunks; None while there is nobody."""
        now = self._clock()
        times = [max(heard, self._fresh_since) + keepalives.GO_SILENCE for heard in self._heard.values()]
        back = [now + SETTLES] if self._back_since else []
        return min([*(at for at in times if at > now), *back], default=None)

    def _counts(self, pool: str, name: str) -> bool:
        table = self._table.pools[pool]
        key = (name, GO_INCARNATION)
        return key in table.live or key in table.down or key in table.held

    # --- What follows, one step at a time ------------------------------------------------------------

    def note_health(self) -> None:
        """Only what was unchanged while this leader would have seen a change counts."""
        now = self._clock()
        if not self._probe.healthy(now) or self._stream_stands():
            self._fresh_since = now

    async def look(self) -> None:
        """Write down who is silent, and move what came back."""
        for pool in self._table.pools.values():
            if not (pool.has_go or pool.from_go):  # as a rule
                continue
            for step in (self._tell_silence, self._remember, self._move_back):
                decided = list(step(pool))
                for start in range(0, len(decided), WRITES_MAX):
                    await self._relay.commit(decided[start : start + WRITES_MAX])
        if (now := self._clock()) >= self._forget_at:
            self._forget_at = now + LOOK_AGAIN
            self._forget()

    def _tell_silence(self, pool: PoolTable) -> Iterator[Write]:
        """Keepalives that stand unchanged, also where MongoDB's TTL monitor does not delete them. They stay:
        a Go pod that lives and saw its own deleted would claim its own chunks, and issue from them anew."""
        for key, keepalive in pool.keepalives.items():
            told = keepalive.go_state
            if told is None or told.down or not self.is_silent(pool.name, key):
                continue
            if self._told.get((pool.name, key)) != self._signs.get(
                (pool.name, key), 0
            ):  # once for each silence
                self._told[pool.name, key] = self._signs.get((pool.name, key), 0)
                log.warning("go_pod_silent", pool=pool.name, pod=key, seconds=keepalives.GO_SILENCE)
                self._metrics.deaths.labels(reason="silent").inc()
            yield writes.note_silence(pool.name, keepalive, told.owner)

    def _remember(self, pool: PoolTable) -> Iterator[Write]:
        """Chunks that went from one Go pod to another."""
        for name, n in [key for key in self._passed_on if key[0] == pool.name]:
            owner, former = self._passed_on[name, n]
            chunk = pool.chunks.get(n)
            if chunk is not None and chunk.owner == owner and former not in chunk.go_owners:
                yield writes.remember_go(name, chunk, former)
            else:  # the table shows it, or somebody else has it
                del self._passed_on[name, n]

    def _move_back(self, pool: PoolTable) -> Iterator[Write]:
        moved: set[int] = set()
        for name in list(pool.from_go):
            go = pool.live.get((name, GO_INCARNATION))
            if go is None:
                self._back_since.pop((pool.name, name), None)
                self._looked_at.pop((pool.name, name), None)
                continue
            of, now = (pool.name, name), self._clock()
            since = self._back_since.setdefault(of, now)
            if now - since < SETTLES or now < self._looked_at.get(of, float("-inf")):
                continue
            count = len(moved)
            yield from self._moves(pool, go, moved)
            if len(moved) - count < WRITES_MAX:  # else there is more of it
                self._looked_at[of] = now + min(LOOK_AGAIN, max(SETTLES, HOLD_SHARE * self._hold / 2))

    def _moves(self, pool: PoolTable, go: Owner, moved: set[int]) -> Iterator[Update]:
        """A Go pod lives that our pods' chunks came from; those `moved` came from another one, too."""
        back: list[int] = []
        held: list[int] = []
        for n in list(pool.from_go[go.name]):
            if len(back) + len(held) >= WRITES_MAX:
                break
            chunk = pool.chunks[n]
            if n in moved or self._is_another(pool.name, n, go):
                continue
            if self._untouched(pool.name, chunk):
                back.append(n)
                yield writes.give_back_to_go(pool.name, chunk, go)
            elif chunk.owner.key in pool.live and self._is_due(pool.name, chunk):
                held.append(n)
                yield self._hold_again(pool.name, chunk)
        moved.update(back, held)
        if back or held:
            self._metrics.go_came_back.labels(pool=pool.name).inc(len(back) + len(held))
            log.error(
                "go_pod_came_back",
                pool=pool.name,
                pod=go.name,
                returned=back[:NAMED_MAX],
                held=held[:NAMED_MAX],
                count=len(back) + len(held),
                action="these chunks were claimed from it, and it lives: ids of those that are held may have "
                "been issued twice. Restart this Go pod, and look why it stood still; unless it is a new one",
            )

    def _is_another(self, pool: str, n: int, go: Owner) -> bool:
        """Whether a Go pod is certainly not the process that a chunk came from: that one had another address,
        and is gone if names are given once at a time."""
        origin = self._origins.get((pool, n), {}).get(go.name)
        return origin is not None and (origin.ip, origin.instance) != (go.ip, go.instance)

    def _untouched(self, pool: str, chunk: Chunk) -> bool:
        """Whether certainly nothing was or will be issued from a chunk since this leader claimed it from a
        Go pod: its hold outlasts whatever its owner, if it does not hear of this, may still count on."""
        grant, sent = self._claimed.get((pool, chunk.n), ("", 0.0))
        if not chunk.marked or grant != chunk.grant:
            return False
        left = chunk.hold_ms / 1000 * (1 - 2 * RATE) - (self._clock() - sent)
        return left > self._leases.allocation + SETTLES

    def _is_due(self, pool: str, chunk: Chunk) -> bool:
        grant, since = self._moved.get((pool, chunk.n), ("", float("-inf")))
        return grant != chunk.grant or self._clock() - since >= max(HOLD_SHARE * self._hold, SETTLES)

    def _hold_again(self, pool: str, chunk: Chunk) -> Update:
        """To its own owner, for the hold from the Go pod's last sign of life; that is until the next time,
        now."""
        grant = self._chance.token()
        self._moved[pool, chunk.n] = grant, self._clock()
        hold_ms = round(self._hold * 1000 * (1 + HOLD_SHARE)) + visible_ms(
            self._definitions[pool].usage_lag_ms
        )
        return writes.claim(pool, chunk, chunk.owner, grant, max(hold_ms, chunk.hold_ms))

    def claiming(self, pool: str, chunk: Chunk, grant: str) -> None:
        """A Go pod's chunk is about to be claimed for a pod of ours."""
        if chunk.owner.is_go:
            self._claimed[pool, chunk.n] = grant, self._clock()
            origins = self._origins.setdefault((pool, chunk.n), {})
            origins[chunk.pod] = self._table.pools[pool].shown(chunk.owner)

    def may_live(self, pool: PoolTable, chunk: Chunk) -> bool:
        """Whether a Go pod that our pod's chunk came from lives, as far as anybody knows."""
        living = (pool.live.get((name, GO_INCARNATION)) for name in chunk.go_owners)
        return any(go and not self._is_another(pool.name, chunk.n, go) for go in living)

    def _forget(self) -> None:
        """What is about nobody any more."""
        self._heard = {key: at for key, at in self._heard.items() if self._counts(*key)}
        for of in [of for of in self._origins if not self._is_from_go(*of)]:
            del self._origins[of]
        for remembered in (self._claimed, self._moved):
            for pool, n in [
                key
                for key, (grant, _) in remembered.items()
                if (chunk := self._table.pools[key[0]].chunks.get(key[1])) is None or chunk.grant != grant
            ]:
                del remembered[pool, n]

    def _is_from_go(self, pool: str, n: int) -> bool:
        chunk = self._table.pools[pool].chunks.get(n)
        return chunk is not None and bool(chunk.go_owners)


def go_knows_too_many(pool: PoolTable, capacity: int) -> bool:
    """Whether no number is granted that Go pods have not seen yet: with fewer left they take ever longer to
    find one, and with none they spin for ever. They forget only when they are started anew."""
    return pool.has_go and go_knows(capacity, pool.chunks, pool.known_free) >= int(KNOWN_SHARE * capacity)


def cannot_honour(definition: Definition) -> list[str]:
    """What of a pool's definition Go pods do not keep to; nothing where both can live on its collection."""
    if definition.spaces:
        return ["it has several spaces"]
    if definition.kind != INTEGER:
        return [f"its kind is {definition.kind}"]
    return [*_of_space(definition), *(["quarantine_ms is set"] if definition.quarantine_ms else [])]


def _of_space(space: Space) -> Iterator[str]:
    if space.block_bits != GO_BLOCK_BITS:
        yield f"block_bits is {space.block_bits}, not {GO_BLOCK_BITS}"
    if space.slots != GO_SLOTS:
        yield f"slots is {space.slots}, not {GO_SLOTS}"
    if space.capacity > GO_CHUNKS_MAX:
        yield f"bits is {space.bits}, and Go's ids have 31"
    if space.reserved:
        yield "reserved is set"
