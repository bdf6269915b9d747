"""What the observer checks where Go pods use the same collection: the guarantees as they are promised to
mixed fleets (G1 to G5), and the rules of issue 13 that they rest on (F1 to F14: which keepalives there are).

Exempt is what nobody can promise, as a Go pod has no lease and asks nobody:

- G1: ids that a Go pod issues from chunks that it had when it showed no sign of life for longer than
  `GO_SILENCE` and half of the Go pods' hold (`GoLife.loose`): SDK pods may have begun to issue from them.
  And ids that two Go pods issue, one of which has claimed the other's chunk: the original has no hold.
- G2: a living SDK pod's chunk that a Go pod takes later than `SETTLES` after the delete that it has seen: it
  stood still in between. And one that it takes after a delete of its living Go namesake's own keepalive, if
  no agent has led since that was renewed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from drsm_agent import feed, mirrors
from drsm_agent.core import keepalives, lease
from drsm_agent.core.documents import (
    DEAD,
    GO_INCARNATION,
    Chunk,
    Keepalive,
    read_chunk,
    read_keepalive,
    session_key,
)
from drsm_agent.core.numbers import KNOWN_SHARE
from drsm_agent.core.table import SESSIONS, Change
from tests.simulation.database import Hand
from tests.simulation.go_pod import GoPod
from tests.simulation.observer import Issue, Key, Observer
from tests.simulation.pools import POOL, Id

SEEN = 1.0
"""Seconds after which an agent that is not cut off has seen a change."""
DEAF_MOST = 10.0
"""Seconds that a leader needs at most to delete a dead pod's keepalive: `A + W`, and its next round."""
SPEAKS = 5.0
"""Seconds without a word from a leader after which it may have stopped in between."""
CHUNKS_OF, ALIVE = "chunks of ", "alive: "
"""What of its table the observer wants to know of an agent as it decides: that it has a Go pod's chunks, or
knows that it lives."""


@dataclass(eq=False)
class GoLife:
    """A Go pod's process, as somebody knows it who sees everything."""

    pod: GoPod
    last_sign: float
    signed: bool = False
    loose: set[int] = field(default_factory=set)
    """Chunks that it had when it was silent for so long that SDK pods may issue from them."""


@dataclass
class MixedObserver(Observer):
    """Sees Go pods, too."""

    go: list[GoLife] = field(default_factory=list)
    """The processes that live, running or not."""
    hold: float = 0.0
    """Seconds for which nothing is issued from a Go pod's chunk that was claimed."""
    lead: float = 0.0
    """`A + W`: a keepalive that an agent writes ends later than in so many seconds."""
    late_claims: int = 0
    taken_by_go: int = 0
    given_back: int = 0
    _chunks: dict[int, Chunk] = field(default_factory=dict)
    _keepalives: dict[str, Keepalive] = field(default_factory=dict)
    _go_own_since: dict[str, float] = field(default_factory=dict)
    """Since when a keepalive is a Go pod's own."""
    _unanswered: set[tuple[str, int]] = field(default_factory=set)
    """Deletes of keepalives that no leader could yet make the agent's."""
    _deletes: dict[tuple[str, int], float] = field(default_factory=dict)
    _deleted_at: dict[str, float] = field(default_factory=dict)
    _live_since: dict[str, float] = field(default_factory=dict)
    _of_go: set[str] = field(default_factory=set)
    _go_since: float = float("inf")
    _alone_since: float = float("inf")
    """Since when no SDK pod lives."""
    _led: tuple[int, float, float] = (0, 0.0, 0.0)
    """The term of the lead, since when, and when its leader was heard last."""

    def led_by(self, term: int) -> None:
        """An agent says something, which it does only while it leads. Who begins to lead knows of no death
        yet, and waits anew."""
        known, since, last = self._led
        now = self.clock()
        self._led = (term, since if term == known and now - last < SPEAKS else now, now)

    # --- Go pods ---------------------------------------------------------------------------------------

    def signed(self, life: GoLife) -> None:
        """A keepalive or a chunk that a Go pod has written takes effect."""
        self._look(life)
        life.last_sign, life.signed = self.clock(), True

    def issue_of_go(self, life: GoLife, id_: Id) -> Issue | None:
        """A Go pod hands out an id; None if nobody is promised anything of it."""
        self._look(life)
        self.issued += 1
        n, issue = self.places.chunk_of(id_), self.in_use.get(id_)
        if issue is not None and issue.owner[1] == GO_INCARNATION:
            life.loose.add(n)
        if n in life.loose:
            return None
        if issue is not None:
            self.broken(
                "G1", f"id {id_} issued by Go pod {life.pod.name} is in use since {issue.owner} issued it"
            )
        issue = self.in_use[id_] = Issue((life.pod.name, GO_INCARNATION), "")
        return issue

    def _look(self, life: GoLife) -> None:
        if self.clock() - life.last_sign > keepalives.GO_SILENCE + self.hold / 2:
            life.loose |= life.pod.local.keys()

    def _heard_of(self, name: str) -> Iterable[GoLife]:
        return (life for life in self.go if life.pod.name == name and life.signed)

    # --- Chunks ----------------------------------------------------------------------------------------

    def _session_changed(self, change: Change) -> None:
        super()._session_changed(change)
        sessions = self.database.documents(SESSIONS)
        none = all(session["state"] == DEAD for session in sessions)
        self._alone_since = min(self._alone_since, self.clock()) if none else float("inf")

    def _chunk_changed(self, change: Change) -> None:
        super()._chunk_changed(change)
        n = int(change.key.removeprefix("chunkid-"))
        document, hand = self.database.document(POOL, change.key), self.database.hand
        before, chunk = self._chunks.pop(n, None), read_chunk(document) if document else None
        if chunk is not None:
            self._chunks[n] = chunk
        self._note_go(change.key, of_go=chunk is not None and chunk.owner.is_go)
        if hand.who:
            return
        if chunk is None:
            self._check_release(n, before, hand)
        elif not chunk.owner.is_go and (before is None or before.grant != chunk.grant):
            self._check_receiver(n, chunk, hand)
            if before is None:
                self._check_number(n)

    def _check_claim(self, n: int, former: Key, owner: Key) -> None:
        hand = self.database.hand
        if owner[1] == GO_INCARNATION:
            self.taken_by_go += 1
            if former[1] != GO_INCARNATION:
                self._taken_from_ours(n, former, hand)
        elif former[1] != GO_INCARNATION:
            super()._check_claim(n, former, owner)
        else:
            for life in self._heard_of(former[0]):
                silent = hand.decided - life.last_sign
                if feed.STILL_AFTER + SEEN <= silent < keepalives.GO_SILENCE * (1 - 2 * lease.RATE):
                    self.broken(
                        "F5", f"chunk {n} was taken from Go pod {former[0]}, heard {silent:.2f} s ago"
                    )

    def _taken_from_ours(self, n: int, former: Key, hand: Hand) -> None:
        """By a Go pod, or given back to one."""
        if hand.cause is None:
            self.given_back += former[1] not in self._dead_at
            return
        delete = hand.cause.key, hand.cause.at
        if (died := self._dead_at.get(former[1])) is not None:
            since = self.clock() - died
            early = former[1] in self._expired and since < self.lead * (1 - 2 * lease.RATE)
            if early and delete not in self._unanswered:
                self.broken("F4", f"Go pod {hand.who} has taken chunk {n} {since:.2f} s after {former} died")
            return
        since = self.clock() - self._deletes[delete]
        if delete in self._unanswered or since >= mirrors.SETTLES * (1 - 2 * lease.RATE):
            self.late_claims += 1
        else:
            what = f"{since:.2f} s after the keepalive of {hand.cause.key} was deleted"
            self.broken("G2", f"Go pod {hand.who} has taken chunk {n} of {former}, which lives, {what}")

    def _check_receiver(self, n: int, chunk: Chunk, hand: Hand) -> None:
        """F11: before a grant or a claim its keepalive is there, or that of a Go pod of its name. F4: neither
        comes right after one was deleted."""
        owner = chunk.owner
        if not self._lives(owner.key):
            return
        seen = self._keepalives.get(owner.name)
        if seen is None or seen.mirrored not in {None, owner}:
            self.broken("F11", f"chunk {n} was given to {owner.key}, of which there is no keepalive")
        deleted = self._deleted_at.get(owner.name, float("-inf"))
        if self._go_since < deleted <= hand.decided < deleted + mirrors.SETTLES * (1 - 2 * lease.RATE):
            late = f"{hand.decided - deleted:.2f} s after a keepalive of its name was deleted"
            self.broken("F4", f"chunk {n} was given to {owner.key}, {late}")

    def _check_number(self, n: int) -> None:
        """F3. Two of its own allocations may be on their way to the agent."""
        for life in self.go:
            if n not in life.pod.known and len(life.pod.known) > self._knows_most() + 2:
                known = f"which knows {len(life.pod.known)} of {self.places.capacity}"
                self.broken("F3", f"number {n} was granted, new to Go pod {life.pod.name}, {known}")

    def _knows_most(self) -> int:
        return int(KNOWN_SHARE * self.places.capacity)

    def _check_release(self, n: int, before: Chunk | None, hand: Hand) -> None:
        for name in before.go_owners if before else ():
            if f"{ALIVE}{name}" in hand.knew:
                self.broken("F6", f"chunk {n} was released, and came from Go pod {name}, which lives")

    # --- Keepalives --------------------------------------------------------------------------------------

    def _mirror_changed(self, change: Change) -> None:
        key, hand = change.key, self.database.hand
        document = self.database.document(POOL, key)
        old, new = self._keepalives.pop(key, None), read_keepalive(document) if document else None
        if new is not None:
            self._keepalives[key] = new
        if new is not None and new.mirrored is None:
            self._go_own_since.setdefault(key, self.clock())
        elif new is not None:
            self._go_own_since.pop(key, None)
        alive = new is not None and new.go_owner is not None and not new.go_down
        if alive:
            self._live_since.setdefault(key, self.clock())
        else:
            self._live_since.pop(key, None)
        self._note_go(key, of_go=new is not None and new.go_owner is not None)
        who = hand.who or "an agent"
        if new is None and old is not None:
            self.note("mongodb", f"keepalive of {key} ({old.instance}) is deleted by {who}")
            self._deleted_at[key] = self._deletes[key, change.at] = self.clock()
            if not self._was_answered(key):
                self._unanswered.add((key, change.at))
            self._check_delete(key, old, hand)
        elif new is not None:
            if old is None or old.instance != new.instance or old.go_down != new.go_down:
                state = " (down)" if new.go_down else ""
                self.note("mongodb", f"keepalive of {key} is {new.instance}'s{state}, by {who}")
            if not hand.who and (old is None or old.expire_at != new.expire_at):
                self._check_end(key, new)

    def _was_answered(self, key: str) -> bool:
        """Whether a keepalive that is deleted was the agent's, or a leader had the time to make it that."""
        _, led_since, spoke = self._led
        became = self._go_own_since.pop(key, float("-inf"))
        return became == float("-inf") or spoke >= max(became, led_since) + SEEN

    def _check_end(self, key: str, new: Keepalive) -> None:
        left = new.expire_at.timestamp() - self.database.seconds
        if left <= self.lead:
            self.broken("F10", f"the keepalive of {key} was written to end in {left:.2f} s")

    def _check_delete(self, key: str, old: Keepalive, hand: Hand) -> None:
        owner = old.mirrored
        if owner is not None and self._lives(owner.key):
            self.broken(
                "G2", f"the keepalive of {owner.key}, which lives, was deleted by {hand.who or 'an agent'}"
            )
        elif owner is not None and not owner.is_go and hand.who == "ttl":
            self._check_shown(owner.key)
        if hand.who:
            return
        for life in self._heard_of(key):
            if hand.decided - life.last_sign >= keepalives.GO_SILENCE * (1 - 2 * lease.RATE):
                continue
            if owner is None:
                self.broken("F14", f"an agent has deleted the keepalive of Go pod {key}, which lives")
            if f"{CHUNKS_OF}{key}" in hand.knew:
                self.broken(
                    "F2", f"the mirror of {key} was deleted, and Go pod {key}, which lives, has chunks"
                )
        if owner is None and old.mirrored is None and old.expire_at.timestamp() > self.database.seconds:
            self.broken("F14", f"the keepalive of Go pod {key} was deleted by an agent before its end")

    def _check_shown(self, key: Key) -> None:
        """F4: that a pod of ours is dead Go pods learn from the agent, not only once its mirror has ended."""
        holds = [chunk.hold_ms / 1000 for chunk in self._chunks.values() if chunk.owner.key == key]
        alone = self.clock() - self._alone_since
        with_go = self.clock() - min(self._live_since.values(), default=self.clock())
        led = self._led[2] - self._led[1]
        if holds and max(holds) <= self.lead * (1 + 2 * lease.RATE) and min(alone, with_go, led) > DEAF_MOST:
            self.broken("F4", f"the keepalive of {key} had to end by itself, {alone:.1f} s after it could go")

    # --- What there is -------------------------------------------------------------------------------------

    def _lives(self, key: Key) -> bool:
        session = self.database.document(SESSIONS, session_key(*key))
        return session is not None and session["state"] != DEAD

    def _note_go(self, key: str, *, of_go: bool) -> None:
        """Since when there are documents of Go pods."""
        if of_go:
            self._of_go.add(key)
            self._go_since = min(self._go_since, self.clock())
        else:
            self._of_go.discard(key)
            if not self._of_go:
                self._go_since = float("inf")
