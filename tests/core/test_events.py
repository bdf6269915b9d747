"""Neighbouring changes that are equal in all but the chunk go out as one event, and no others."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_agent.core.documents import Owner
from drsm_agent.core.events import ALLOCATED, CLAIMED, DOWN, RELEASED, SCANNED, UP, Event, coalesce

A, B, C = (Owner(name, "10.0.0.7", "", 5) for name in ("a", "b", "c"))


def chain(*events: Event) -> list[Event]:
    """The events as one pool's stream: versions (1, 0), (2, 0), ... each with its predecessor's as `prev`."""
    return [
        replace(event, version=(i + 1, 0), prev=(i, 0), token=f"t{i + 1}") for i, event in enumerate(events)
    ]


def event(kind: str, n: int | None = None, **fields: object) -> Event:
    """One event as the table gives it: about one chunk, or about a pod."""
    made = Event("amfid", kind, (0, 0), (0, 0), chunks=() if n is None else (n,))
    return replace(made, **fields)  # type: ignore[arg-type]


def claim(n: int, owner: Owner = A, previous: Owner = B, hold_ms: int = 1000) -> Event:
    """A claim with a grant of its own."""
    return event(CLAIMED, n, owner=owner, previous=previous, grants=(f"g{n}",), hold_ms=hold_ms)


def test_equal_neighbours_are_one_event() -> None:
    """With the version and token of the last, the `prev` of the first, and chunks and grants in order."""
    assert coalesce(chain(claim(5), claim(3), claim(9)), most=10) == [
        Event("amfid", CLAIMED, (3, 0), (0, 0), A, B, (5, 3, 9), ("g5", "g3", "g9"), 1000, token="t3")
    ]


@pytest.mark.parametrize(
    "other",
    [
        claim(2, owner=C),
        claim(2, previous=C),
        claim(2, hold_ms=999),
        claim(2, owner=replace(A, incarnation=6)),
        claim(2, owner=replace(A, ip="10.0.0.8")),
        event(SCANNED, 2, owner=A),
        replace(claim(2), pool="tmsi"),
    ],
)
def test_different_neighbours_stay_apart(other: Event) -> None:
    """In owner, previous owner, hold, kind or pool."""
    events = chain(claim(1), other)
    assert coalesce(events, most=10) == events


@pytest.mark.parametrize("between", [event(UP, owner=C), event(DOWN, owner=C), event(ALLOCATED, 7, owner=A)])
def test_nothing_is_joined_across_another_event(between: Event) -> None:
    """A consumer sees everything in the order in which it happened."""
    events = chain(claim(1), between, claim(2))
    assert coalesce(events, most=10) == events


def test_nothing_is_joined_across_a_missing_event() -> None:
    """`prev` must be the version of the one before, also when that one went out earlier."""
    first, _, third = chain(claim(1), event(UP, owner=C), claim(2))
    assert coalesce([first, third], most=10) == [first, third]


def test_pod_events_are_never_joined() -> None:
    """Each is about one pod."""
    events = chain(event(UP, owner=A), event(UP, owner=A), event(DOWN, owner=A, reason="closed"))
    assert coalesce(events, most=10) == events


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_an_event_has_at_most_so_many_chunks(most: int) -> None:
    """The rest goes out as further events, and none is lost."""
    joined = coalesce(chain(*[event(RELEASED, n, previous=A) for n in range(7)]), most=most)
    assert [len(event.chunks) for event in joined] == [most] * (7 // most) + [7 % most] * (7 % most > 0)
    assert [n for event in joined for n in event.chunks] == list(range(7))


def test_nothing_becomes_nothing() -> None:
    """An empty batch."""
    assert coalesce([], most=10) == []


_KINDS = st.sampled_from(
    [
        claim(0),
        claim(0, owner=C),
        event(SCANNED, 0, owner=A),
        event(RELEASED, 0, previous=A),
        event(UP, owner=A),
    ]
)


@given(st.lists(_KINDS, max_size=20), st.integers(1, 4))
def test_joined_events_say_what_the_single_ones_said(kinds: list[Event], most: int) -> None:
    """The same chunks in the same order, an unbroken chain of versions, no event above the bound."""
    events = chain(
        *[
            replace(kind, chunks=(n,) if kind.chunks else (), grants=(f"g{n}",) if kind.grants else ())
            for n, kind in enumerate(kinds)
        ]
    )
    joined = coalesce(events, most=most)
    assert [
        (event.kind, event.owner, event.previous, event.hold_ms, n, event.grants[i : i + 1])
        for event in joined
        for i, n in enumerate(event.chunks or (None,))
    ] == [
        (event.kind, event.owner, event.previous, event.hold_ms, n, event.grants)
        for event in events
        for n in event.chunks or (None,)
    ]
    assert [event.prev for event in joined] == [(0, 0), *(event.version for event in joined)][: len(joined)]
    assert joined[-1:] == [] or joined[-1].version == events[-1].version
    assert max((len(event.chunks) for event in joined), default=0) <= most
    same = [(a.kind, a.owner) == (b.kind, b.owner) and a.kind != UP for a, b in pairwise(events)]
    assert most < 4 or len(joined) >= len(events) - sum(same)
