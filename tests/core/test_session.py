"""Liveness leases: who is due, who may renew, and when to look again."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from drsm_agent.core.documents import DEAD, LIVE, Session
from drsm_agent.core.lease import Leases
from drsm_agent.core.session import Key, LivenessLeases, full_leases
from drsm_agent.core.table import Hashes, Table

A, B, C = ("a", 1), ("b", 1), ("a", 2)


def leases(**until: float) -> LivenessLeases:
    """Leases of incarnation 1 of the named pods."""
    made = LivenessLeases()
    for name, deadline in until.items():
        made.extend((name, 1), deadline)
    return made


def test_a_lease_is_due_at_its_deadline() -> None:
    """Not before, and in an order that repeats."""
    kept = leases(b=5, a=5, z=6)
    assert [kept.due(now) for now in (4.999, 5, 6)] == [[], [A, B], [A, B, ("z", 1)]]
    assert [kept.lapsed(A, now) for now in (4.999, 5)] == [False, True]


def test_a_renewal_moves_the_deadline_and_never_back() -> None:
    """A shorter lease, after a change of settings or out of order, does not shorten what was promised."""
    kept = leases(a=5)
    assert [kept.extend(A, 9), kept.due(8.9), kept.extend(A, 3), kept.due(8.9), kept.due(9)] == [
        True,
        [],
        True,
        [],
        [A],
    ]


def test_a_session_whose_end_is_decided_is_refused() -> None:
    """Whatever became of the write; it is not due a second time, and another incarnation is not meant."""
    kept = leases(a=5, b=6)
    kept.end([A], "expired")
    assert (kept.extend(A, 100), A in kept, kept.due(50), kept.ending(A)) == (False, False, [B], "expired")
    assert (kept.extend(C, 100), kept.ending(C), len(kept)) == (True, "", 2)
    assert kept.ended() == {A: "expired"}


def test_the_first_decision_stands() -> None:
    """A close after an expiry changes neither the reason nor the deadline."""
    kept = leases(a=5)
    kept.end([A], "expired")
    kept.end([A], "closed")
    assert (kept.ending(A), kept.lapsed(A, 4.9), kept.lapsed(A, 5)) == ("expired", False, True)


def test_an_ended_session_lapses_when_it_would_have() -> None:
    """A superseded one's lease still runs: its chunks wait for that."""
    kept = leases(a=5)
    kept.end([A], "superseded")
    assert [kept.lapsed(A, now) for now in (4.9, 5)] == [False, True]


def test_an_unknown_session_has_lapsed() -> None:
    """Nobody was promised anything; also when its end was decided unheard."""
    kept = leases()
    assert kept.lapsed(A, -1e9) is True
    kept.end([A], "expired")
    assert (kept.lapsed(A, -1e9), kept.extend(A, 5)) == (True, False)


def test_a_forgotten_session_may_come_anew() -> None:
    """Once its document is gone, nothing of it remains."""
    kept = leases(a=5, b=5)
    kept.end([A], "expired")
    for key in (A, B, C):
        kept.forget(key)
    assert (len(kept), kept.ended(), kept.next_deadline()) == (0, {}, None)
    assert kept.extend(A, 5) is True


def test_the_next_deadline_is_the_earliest() -> None:
    """None while nobody is leased; ended ones do not count."""
    kept = leases(a=5, b=4)
    assert kept.next_deadline() == 4
    kept.end([B], "closed")
    assert kept.next_deadline() == 5
    kept.end([A], "closed")
    assert kept.next_deadline() is None


KEYS = st.sampled_from([A, B, C])


class AgainstAPlainModel(RuleBasedStateMachine):
    """Any order of calls, against what the rules say in words."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = LivenessLeases()
        self.until: dict[Key, int] = {}
        self.reasons: dict[Key, str] = {}

    @rule(key=KEYS, until=st.integers(0, 10))
    def extend(self, key: Key, until: int) -> None:
        """A renewal."""
        assert self.kept.extend(key, until) is (key not in self.reasons)
        if key not in self.reasons:
            self.until[key] = max(until, self.until.get(key, -1))

    @rule(keys=st.lists(KEYS, max_size=2), reason=st.sampled_from(["expired", "closed"]))
    def end(self, keys: list[Key], reason: str) -> None:
        """A decision."""
        self.kept.end(keys, reason)
        for key in keys:
            self.reasons.setdefault(key, reason)

    @rule(key=KEYS)
    def forget(self, key: Key) -> None:
        """A purge."""
        self.kept.forget(key)
        self.until.pop(key, None)
        self.reasons.pop(key, None)

    @invariant()
    def agrees(self) -> None:
        """At every moment, for every session."""
        running = {key: until for key, until in self.until.items() if key not in self.reasons}
        assert self.kept.ended() == self.reasons
        assert self.kept.next_deadline() == min(running.values(), default=None)
        for now in range(11):
            assert self.kept.due(now) == sorted(key for key, until in running.items() if until <= now)
            assert [self.kept.lapsed(key, now) for key in (A, B, C)] == [
                now >= self.until.get(key, -1) for key in (A, B, C)
            ]


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
TestAgainstAPlainModel.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_new_leader_counts_those_who_died_lately_into_the_lease_that_everyone_gets() -> None:
    """R3: with 10,000 pods the last leader promised 25 s; that there are fewer now takes nothing back."""
    table = Table([], 0, Hashes(ownership=lambda *_: 0, holding=lambda *_: 0))
    table.load("drsm_sessions", [told("alive", LIVE)])
    assert full_leases(table, Leases(3.0, 300.0, 3.0), now=100.0).next_deadline() == 103.0
    table.load("drsm_sessions", [told(f"gone-{i}", DEAD) for i in range(9999)])
    kept = full_leases(table, Leases(3.0, 300.0, 3.0), now=100.0)
    assert (kept.next_deadline(), len(kept)) == (125.0, 1)


def test_a_new_leader_keeps_the_chunks_of_superseded_ones_for_a_lease() -> None:
    """They may still be routed to; but no renewal of theirs counts."""
    table = Table([], 0, Hashes(ownership=lambda *_: 0, holding=lambda *_: 0))
    table.load("drsm_sessions", [told("old", DEAD, "superseded"), told("closed", DEAD, "closed")])
    kept = full_leases(table, Leases(3.0, 300.0, 3.0), now=100.0)
    assert kept.ended() == {("old", 1): "superseded"}
    assert [kept.lapsed(("old", 1), now) for now in (102.9, 103.0)] == [False, True]
    assert kept.lapsed(("closed", 1), 100.0)


def told(pod: str, state: str, reason: str = "") -> dict[str, Any]:
    session = Session(pod, "10.0.0.1", "i", 1, 1, state, (), f"r-{pod}", 0, reason)
    return dict(session.document)
