"""Claims are spread evenly, repeat themselves, and prefer the name; holds outlast every former owner."""

import random
from collections import Counter
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_agent.core.documents import Chunk, Drsm, Owner, Session
from drsm_agent.core.placement import Placed, hold_ms, plan

A, W, SEEN = 300_000, 10_000, 10_050
"""`SEEN`: `W` by a clock that is fast by `r`."""


def pod(name: str, incarnation: int = 1) -> Owner:
    """A pod incarnation; 0 is a Go pod."""
    return Owner(name, "", "", incarnation)


def orphan(n: int, name: str = "dead", *, marked: bool = False, hold: int = 0) -> Chunk:
    """A chunk of a dead pod."""
    return Chunk(n, name, "", "", Drsm(name, "", "", 1, "g", marked, hold))


def former(reason: str, promised: int = A) -> Session:
    """The session of a dead pod."""
    return Session("dead", "", "", 1, 1, "dead", ("amfid",), "r", promised, reason)


def test_a_go_pods_chunk_is_held_for_as_long_as_it_may_stand_still() -> None:
    """It has no lease. What it left in `drsm` counts too: the SDK pod that it was claimed from may live, and
    not have heard of it."""
    bare = Chunk(1, "go", None, None)
    assert hold_ms(bare, None, A, W, 3_600_000) == 3_600_000
    assert hold_ms(bare, None, A, W, 5_000) == SEEN
    stale = replace(orphan(1, hold=900_000), pod="go")
    assert stale.owner.is_go
    assert hold_ms(stale, None, A, W, 5_000) == 900_000
    assert hold_ms(replace(orphan(1), pod="go"), former("closed", 2 * A), A, W, 5_000) == 2 * A + SEEN
    remembered = Chunk(1, "go", "", "", Drsm("", "", "", 0, go_owners=("other",)))
    assert hold_ms(remembered, None, A, W, 5_000) == SEEN


LIVING = st.dictionaries(
    st.builds(pod, st.sampled_from("abcdef"), st.integers(1, 2)), st.integers(0, 12), min_size=1, max_size=6
)
ORPHANS = st.lists(st.integers(0, 40), max_size=25, unique=True).map(
    lambda numbers: [orphan(n) for n in numbers]
)


@given(ORPHANS, LIVING)
def test_each_orphan_goes_to_one_living_pod(orphans: list[Chunk], living: dict[Owner, int]) -> None:
    """None is left, none is doubled, nobody dead gets any."""
    placed = plan(orphans, living)
    assert [claim.orphan.n for claim in placed] == sorted(chunk.n for chunk in orphans)
    assert {claim.owner for claim in placed} <= set(living)


@given(ORPHANS, LIVING)
def test_the_load_is_balanced_within_one(orphans: list[Chunk], living: dict[Owner, int]) -> None:
    """Whoever got a chunk has at most one more than the least loaded."""
    gained = Counter(claim.owner for claim in plan(orphans, living))
    after = {owner: count + gained[owner] for owner, count in living.items()}
    assert max((after[owner] for owner in gained), default=0) <= min(after.values()) + 1


@given(ORPHANS, LIVING, st.randoms())
def test_a_plan_repeats_itself(orphans: list[Chunk], living: dict[Owner, int], chance: random.Random) -> None:
    """In whatever order orphans and pods are listed."""
    pods = list(living.items())
    shuffled = list(orphans)
    chance.shuffle(pods)
    chance.shuffle(shuffled)
    assert plan(shuffled, dict(pods)) == plan(orphans, living)


NAMED = st.dictionaries(st.integers(0, 40), st.sampled_from("abcdxyz"), max_size=25).map(
    lambda names: [orphan(n, name) for n, name in names.items()]
)
ANYBODY = st.dictionaries(
    st.builds(pod, st.sampled_from("abcdef"), st.integers(0, 3)), st.integers(0, 12), max_size=8
)


def naively(orphans: list[Chunk], living: dict[Owner, int]) -> list[Placed]:
    """The rule in plain words: look at everybody for every orphan."""
    owned = {owner: count for owner, count in living.items() if owner.incarnation}
    placed: dict[int, Placed] = {}
    for chunk in orphans:
        mine = [owner for owner in owned if owner.name == chunk.pod]
        if mine:
            latest = max(mine, key=lambda owner: owner.incarnation)
            owned[latest] += 1
            placed[chunk.n] = Placed(chunk, latest)
    for chunk in sorted(orphans, key=lambda chunk: chunk.n):
        if owned and chunk.n not in placed:
            fewest = min(sorted(owned), key=lambda owner: owned[owner])
            owned[fewest] += 1
            placed[chunk.n] = Placed(chunk, fewest)
    return [placed[n] for n in sorted(placed)]


@given(NAMED, ANYBODY, st.randoms())
def test_a_plan_is_what_the_rule_says(
    orphans: list[Chunk], living: dict[Owner, int], chance: random.Random
) -> None:
    """With namesakes of several lives, Go pods, or nobody; in whatever order they are listed."""
    pods = list(living.items())
    expected = naively(orphans, living)
    chance.shuffle(pods)
    chance.shuffle(orphans)
    assert plan(orphans, dict(pods)) == expected
    sdk = [owner for owner in living if owner.incarnation]
    assert len(expected) == (len(orphans) if sdk else 0)


@given(NAMED, ANYBODY)
def test_beside_namesakes_the_load_is_balanced_within_one(
    orphans: list[Chunk], living: dict[Owner, int]
) -> None:
    """Whoever got a stranger's chunk has at most one more than the least loaded."""
    placed = plan(orphans, living)
    gained = Counter(claim.owner for claim in placed)
    after = {owner: count + gained[owner] for owner, count in living.items() if owner.incarnation}
    strangers = {claim.owner for claim in placed if claim.owner.name != claim.orphan.pod}
    assert max((after[owner] for owner in strangers), default=0) <= min(after.values(), default=0) + 1


def test_equal_load_is_broken_by_name() -> None:
    """Lowest number to the lowest name."""
    assert plan([orphan(2), orphan(1), orphan(3)], {pod("b"): 0, pod("a"): 0}) == [
        Placed(orphan(1), pod("a")),
        Placed(orphan(2), pod("b")),
        Placed(orphan(3), pod("a")),
    ]


def test_fewest_chunks_come_first() -> None:
    """Until they are even."""
    assert [claim.owner.name for claim in plan(map(orphan, range(5)), {pod("a"): 3, pod("b"): 0})] == list(
        "bbbab"
    )


def test_a_restarted_pod_gets_its_chunks_back() -> None:
    """However loaded it is; its latest incarnation, when there are several."""
    living = {pod("dead", 3): 100, pod("dead", 2): 0, pod("a"): 0}
    assert plan([orphan(1), orphan(2, "other")], living) == [
        Placed(orphan(1), pod("dead", 3)),
        Placed(orphan(2, "other"), pod("a")),
    ]


def test_what_a_pod_gets_back_counts_for_the_rest() -> None:
    """Two pods, one of which gets four of its own back: the other's turn comes first."""
    orphans = [orphan(n, "b") for n in range(4)] + [orphan(n, "other") for n in range(4, 10)]
    gained = Counter(claim.owner.name for claim in plan(orphans, {pod("a"): 0, pod("b"): 0}))
    assert gained == {"a": 5, "b": 5}


def test_without_a_living_pod_nothing_is_claimed() -> None:
    """The orphans stay until somebody comes."""
    assert plan([orphan(1)], {}) == []


def test_go_pods_never_claim() -> None:
    """The agent cannot tell them to hold; also not one of the dead pod's name."""
    assert plan([orphan(1)], {pod("go", 0): 0, pod("dead", 0): 0}) == []
    assert plan([orphan(1)], {pod("dead", 0): 0, pod("b"): 50}) == [Placed(orphan(1), pod("b"))]


@pytest.mark.parametrize(
    ("chunk", "session", "allocation", "expected"),
    [
        # W after a graceful close of an owner whose chunk was unmarked
        (orphan(1), former("closed"), A, SEEN),
        (orphan(1), former("closed", 900_000), A, SEEN),
        # A + W after any other end
        (orphan(1), former("expired"), A, A + SEEN),
        (orphan(1), former("superseded"), A, A + SEEN),
        (orphan(1), former(""), A, A + SEEN),
        (orphan(1), None, A, A + SEEN),
        # the largest A that was promised
        (orphan(1), former("expired", 900_000), A, 900_000 + SEEN),
        (orphan(1), former("expired", 100_000), A, A + SEEN),
        # a marked chunk keeps the longest hold since the mark was last clear
        (orphan(1, marked=True, hold=W), former("closed"), A, A + SEEN),
        (orphan(1, marked=True, hold=950_000), former("closed"), A, 950_000),
        (orphan(1, marked=True, hold=950_000), former("expired"), A, 950_000),
        (orphan(1, marked=True, hold=950_000), None, A, 950_000),
        (orphan(1, marked=True, hold=W), former("expired", 900_000), A, 900_000 + SEEN),
    ],
)
def test_a_hold_outlasts_every_former_owner(
    chunk: Chunk, session: Session | None, allocation: int, expected: int
) -> None:
    """By how the owner ended, whether the chunk was marked, and what was promised."""
    assert hold_ms(chunk, session, allocation, W) == expected


ENDS = st.tuples(st.sampled_from(["closed", "expired", "superseded"]), st.integers(1, 10), st.booleans())


@given(st.lists(ENDS, min_size=1, max_size=6), st.integers(1, 10), st.integers(0, 10))
def test_a_chain_of_owners_never_shortens_a_hold(ends: list[tuple[str, int, bool]], a: int, w: int) -> None:
    """Claim after claim: the hold covers the largest lease promised to an owner that did not close,
    or whose chunk was marked, since the mark was last clear."""
    chunk, needed, marked = orphan(1), 0, False
    for reason, promised, scanned in ends:
        hold = hold_ms(chunk, former(reason, promised), a, w)
        seen = ceil(w * 1.005)
        needed = max(needed, seen if reason == "closed" and not marked else max(promised, a) + seen)
        assert hold == needed
        chunk, marked = orphan(1, marked=True, hold=hold), True
        if scanned:
            chunk, needed, marked = orphan(1), 0, False


@given(st.integers(0, 900_000), st.floats(-0.005, 0.005))
def test_whoever_holds_after_a_close_waits_for_the_usage_lag_however_fast_its_clock_runs(
    lag: int, rate: float
) -> None:
    """The lag is time of the database, the hold is counted by a clock that may be off by `r`."""
    assert hold_ms(orphan(1), former("closed"), A, lag) / (1 + rate) >= lag * (1 - 1e-12)


LIVES = st.tuples(
    st.sampled_from(["closed", "expired", "superseded"]),
    st.integers(1, 10),  # the A that it was promised
    st.integers(0, 25),  # how long it owned the chunk
)


@given(st.lists(LIVES, min_size=1, max_size=6), st.integers(1, 10), st.integers(0, 10))
def test_nothing_is_issued_anew_while_a_former_owner_may_issue_or_what_it_issued_is_not_visible(
    lives: list[tuple[str, int, int]], today: int, lag: int
) -> None:
    """Owner after owner, in time. One issues from a chunk that came unmarked, or once its hold is over and
    it was scanned; the last time it may is when it closed, or at the end of the lease that it was promised
    when it died. Whoever scans must see all of that, `W` later."""
    now, opens = 0, 0
    visible = 0  # when everything that any owner may have issued can be seen
    chunk = orphan(1)
    for reason, promised, owned in lives:
        died = now + owned
        scanned = died >= opens
        if scanned:
            chunk = orphan(1)
            stopped = died if reason == "closed" else died + promised
            visible = max(visible, stopped + lag)
        now = died
        hold = hold_ms(chunk, former(reason, promised), today, lag)
        chunk = orphan(1, marked=True, hold=hold)
        opens = now + hold
        assert opens >= visible
