"""The consumer's table: whatever is lost, doubled or reordered, it is what the truth was at its version."""

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.mirror import Mirror, Verdict
from drsm_sdk.pods import Owner
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.checksum import MODULUS, ownership
from drsm_sdk.wire.definition import Definition

POOL = Definition(name="p", bits=16, block_bits=8)
Hearing = tuple[wire.EventHead, wire.EventBody]


def ref(name: str, incarnation: int = 7) -> wire.OwnerRef:
    return wire.OwnerRef(name, "10.0.0.1", "i", incarnation)


A, B = ref("a"), ref("b")


def head(version: int, prev: int, *, term: int = 1, history: str = "h1") -> wire.EventHead:
    return wire.EventHead("p", (version, 0), (prev, 0), "agent", term, history, 0)


def snapshot(
    version: int,
    chunks: dict[int, wire.OwnerRef] | None = None,
    live: tuple[wire.OwnerRef, ...] = (A, B),
    *,
    term: int = 1,
    history: str = "h1",
) -> Snapshot:
    chunks = chunks or {}
    owners = {(o.name, o.incarnation): o for o in (*live, *chunks.values())}
    return Snapshot(
        (version, 0),
        history,
        term,
        POOL,
        tuple(Owner.of(o, "live" if o in live else "down") for o in owners.values()),
        tuple(((o.name, o.incarnation), (n,)) for n, o in chunks.items()),
    )


def sync(chunks: dict[int, wire.OwnerRef]) -> wire.Sync:
    said = sum(ownership(n, o.name, o.incarnation) for n, o in chunks.items())
    return wire.Sync(2, len(chunks), said % MODULUS)


def loaded(version: int = 10, chunks: dict[int, wire.OwnerRef] | None = None) -> Mirror:
    mirror = Mirror()
    assert mirror.load(snapshot(version, chunks if chunks is not None else {1: A}))
    return mirror


# --- what an id's owner is --------------------------------------------------------------------------


def test_an_id_belongs_to_the_owner_of_its_chunk() -> None:
    mirror = loaded()
    assert mirror.owner(0x1FF) == Owner("a", "10.0.0.1", "i", 7, "live")
    assert mirror.owner(0x200) is None
    assert mirror.owner(-1) is None


def test_all_ids_of_a_pod_that_went_down_say_so_until_they_move() -> None:
    mirror = loaded(10, {1: A, 2: A})
    mirror.apply(head(11, 10), wire.PodDown(A, "expired"))
    assert [owner.state for owner in mirror.pods()] == ["down", "live"]
    assert mirror.owner(0x100) == mirror.owner(0x200) == Owner("a", "10.0.0.1", "i", 7, "down")
    mirror.apply(head(12, 11), wire.ChunkClaimed(B, A, (1, 2), ("0" * 16, "1" * 16), 5000))
    assert mirror.owner(0x100) == Owner("b", "10.0.0.1", "i", 7, "live")
    assert [owner.name for owner in mirror.pods()] == ["b"]


def test_two_incarnations_of_one_name_are_two_owners() -> None:
    mirror = loaded()
    again = ref("a", 8)
    mirror.apply(head(11, 10), wire.PodUp(again))
    mirror.apply(head(12, 11), wire.PodDown(A, "superseded"))
    mirror.apply(head(13, 12), wire.ChunkAllocated(again, (3,)))
    old, new = mirror.owner(0x100), mirror.owner(0x300)
    assert old is not None
    assert new is not None
    assert (old.incarnation, old.state, new.incarnation, new.state) == (7, "down", 8, "live")


def test_a_chunk_of_a_pod_that_nobody_announced_is_an_orphan() -> None:
    """A Go pod's chunk without its keepalive."""
    mirror = loaded()
    mirror.apply(head(11, 10), wire.ChunkAllocated(ref("go", 0), (5,)))
    owner = mirror.owner(0x500)
    assert owner is not None
    assert owner.state == "unknown"  # it allocates for up to five seconds before its first keepalive
    mirror.apply(head(12, 11), wire.ChunkAllocated(ref("other", 7), (6,)))
    owner = mirror.owner(0x600)
    assert owner is not None
    assert owner.state == "down"


def test_a_go_pod_that_is_down_is_known_as_long_as_something_says_so() -> None:
    """With or without chunks; after its keepalive was deleted nothing says so."""
    mirror = loaded()
    mirror.apply(head(11, 10), wire.PodUp(ref("go", 0)))
    mirror.apply(head(12, 11), wire.PodDown(ref("go", 0), "silent"))
    assert [owner.state for owner in mirror.pods() if owner.name == "go"] == ["down"]
    mirror.apply(head(13, 12), wire.ChunkAllocated(ref("go", 0), (5,)))
    mirror.apply(head(14, 13), wire.PodDown(ref("go", 0), "deleted"))
    assert [owner.state for owner in mirror.pods() if owner.name == "go"] == ["unknown"]
    mirror.apply(head(15, 14), wire.ChunkReleased(ref("go", 0), (5,)))
    assert [owner.state for owner in mirror.pods() if owner.name == "go"] == []


# --- the consumer's rule ----------------------------------------------------------------------------


def test_an_event_that_is_held_already_is_dropped() -> None:
    assert loaded().apply(head(10, 9), wire.ChunkReleased(A, (1,))) is Verdict.DROPPED


def test_a_gap_needs_a_snapshot_and_changes_nothing() -> None:
    mirror = loaded()
    assert mirror.apply(head(13, 12), wire.ChunkReleased(A, (1,))) is Verdict.GAP
    assert mirror.owner(0x100) is not None


def test_a_coalesced_event_of_which_a_part_is_held_is_applied_whole() -> None:
    """The snapshot fell between two changes that go out as one event."""
    mirror = loaded(11, {1: A, 2: A})
    assert mirror.apply(head(13, 10), wire.ChunkAllocated(A, (1, 2, 3))) is Verdict.APPLIED
    assert set(mirror.chunks()) == {1, 2, 3}
    assert mirror.apply(head(13, 13), sync({1: A, 2: A, 3: A})) is Verdict.CONFIRMED


def test_the_second_part_of_a_version_counts() -> None:
    """Two changes with one clusterTime: bulk writes of MongoDB 8."""
    mirror = loaded()
    first = replace(head(11, 10), version=(11, 0))
    second = replace(first, version=(11, 1), prev=(11, 0))
    assert mirror.apply(first, wire.ChunkAllocated(A, (2,))) is Verdict.APPLIED
    assert mirror.apply(second, wire.ChunkAllocated(A, (3,))) is Verdict.APPLIED
    assert mirror.apply(first, wire.ChunkAllocated(A, (2,))) is Verdict.DROPPED


def test_a_reset_needs_a_snapshot() -> None:
    assert loaded().apply(head(11, 10), wire.Reset("restored")) is Verdict.GAP


def test_another_history_needs_a_snapshot_even_at_a_lower_version() -> None:
    """The database went back."""
    mirror = loaded()
    back = head(5, 4, term=2, history="h2")
    assert mirror.apply(back, wire.Reset("restored")) is Verdict.GAP
    assert mirror.load(snapshot(5, {9: B}, term=2, history="h2"))
    assert set(mirror.chunks()) == {9}
    assert (
        mirror.apply(replace(back, version=(6, 0), prev=(5, 0)), wire.ChunkReleased(B, (9,)))
        is Verdict.APPLIED
    )


def test_a_fallen_leader_is_not_listened_to() -> None:
    """A lower term with another history: it does not know yet that it was replaced."""
    mirror = Mirror()
    mirror.load(snapshot(10, {1: A}, term=2, history="h2"))
    assert mirror.apply(head(50, 10, term=1, history="h1"), wire.ChunkReleased(A, (1,))) is Verdict.DROPPED
    assert not mirror.load(snapshot(50, {}, term=1, history="h1"))


def test_the_same_history_may_be_told_by_a_leader_of_lower_term() -> None:
    """Events come from the oplog: they are the same whichever agent publishes them."""
    mirror = Mirror()
    mirror.load(snapshot(10, {1: A}, term=2))
    assert mirror.apply(head(11, 10, term=1), wire.ChunkReleased(A, (1,))) is Verdict.APPLIED


def test_an_older_snapshot_of_the_same_history_is_dropped() -> None:
    mirror = loaded()
    assert not mirror.load(snapshot(9, {}))
    assert mirror.load(snapshot(10, {2: B}))
    assert set(mirror.chunks()) == {2}


def test_a_sync_confirms_or_raises_doubt() -> None:
    mirror = loaded()
    assert mirror.apply(head(10, 10), sync({1: A})) is Verdict.CONFIRMED
    assert mirror.apply(head(10, 10), sync({1: B})) is Verdict.DOUBT
    assert mirror.apply(head(11, 10), sync({1: A})) is Verdict.DOUBT


def test_a_sync_of_a_higher_revision_needs_a_snapshot() -> None:
    """The pool was redefined; an agent that says nothing of it, or less, has nothing new."""
    mirror = loaded()
    for revision, verdict in ((0, Verdict.CONFIRMED), (1, Verdict.CONFIRMED), (2, Verdict.GAP)):
        assert mirror.apply(head(10, 10), replace(sync({1: A}), revision=revision)) is verdict


def test_doubt_is_settled_by_events_that_were_under_way() -> None:
    mirror = loaded()
    ahead, said = head(11, 11), sync({1: A, 2: A})
    assert mirror.contradicts(ahead, said)
    mirror.apply(head(11, 10), wire.ChunkAllocated(A, (2,)))
    assert not mirror.contradicts(ahead, said)
    assert mirror.contradicts(ahead, sync({1: A}))
    mirror.apply(head(12, 11), wire.ChunkAllocated(A, (3,)))
    assert not mirror.contradicts(ahead, said)


def test_an_event_before_the_first_snapshot_needs_one() -> None:
    assert Mirror().apply(head(1, 0), wire.PodUp(A)) is Verdict.GAP


# --- everything together ----------------------------------------------------------------------------


@dataclass
class Truth:
    """The agent's table, and what it was at every version."""

    chunks: dict[int, wire.OwnerRef] = field(default_factory=dict)
    live: set[wire.OwnerRef] = field(default_factory=set)
    events: list[Hearing] = field(default_factory=list)
    at: dict[int, tuple[dict[int, wire.OwnerRef], set[wire.OwnerRef]]] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return len(self.events)

    def happen(self, body: wire.EventBody) -> None:
        match body:
            case wire.PodUp(pod):
                self.live.add(pod)
            case wire.PodDown(pod):
                self.live.discard(pod)
            case wire.ChunkAllocated(owner, chunks) | wire.ChunkClaimed(owner, _, chunks):
                self.chunks |= dict.fromkeys(chunks, owner)
            case wire.ChunkReleased(_, chunks):
                for n in chunks:
                    self.chunks.pop(n, None)
        self.events.append((head(self.version + 1, self.version), body))
        self.at[self.version] = (dict(self.chunks), set(self.live))

    def snapshot(self) -> Snapshot:
        return snapshot(self.version, self.chunks, tuple(sorted(self.live, key=lambda o: o.name)))


PODS = [ref("a"), ref("b"), ref("c"), ref("a", 8)]
NUMBERS = st.sets(st.integers(0, 5), min_size=1, max_size=3).map(lambda numbers: tuple(sorted(numbers)))
BODIES: st.SearchStrategy[wire.EventBody] = st.one_of(
    st.builds(wire.PodUp, st.sampled_from(PODS)),
    st.builds(wire.PodDown, st.sampled_from(PODS), st.just("expired")),
    st.builds(wire.ChunkAllocated, st.sampled_from(PODS), NUMBERS),
    st.builds(
        lambda owner, previous, numbers: wire.ChunkClaimed(owner, previous, numbers, ("0" * 16,), 1),
        st.sampled_from(PODS),
        st.sampled_from(PODS),
        NUMBERS,
    ),
    st.builds(wire.ChunkReleased, st.sampled_from(PODS), NUMBERS),
)


def same(mirror: Mirror, chunks: dict[int, wire.OwnerRef], live: set[wire.OwnerRef]) -> None:
    """The mirror says exactly what the truth says."""
    owners = {n: owner.key for n, owner in mirror.chunks().items()}
    assert owners == {n: (o.name, o.incarnation) for n, o in chunks.items()}
    assert {o.key for o in mirror.pods() if o.state == "live"} == {(o.name, o.incarnation) for o in live}
    assert mirror.checksum == sync(chunks).checksum
    owning = {(o.name, o.incarnation) for o in chunks.values()}
    assert {o.key for o in mirror.pods() if o.state == "down"} == owning - {
        (o.name, o.incarnation) for o in live
    }


@given(st.data())
def test_the_table_is_always_what_the_truth_was_at_its_version(data: st.DataObject) -> None:
    """G5: under any loss, doubling and reordering of events, and any snapshots in between."""
    truth, mirror = Truth(), Mirror()
    snapshots = [truth.snapshot()]
    truth.at[0] = ({}, set())
    for body in data.draw(st.lists(BODIES, max_size=30)):
        truth.happen(body)
        if data.draw(st.booleans()):
            snapshots.append(truth.snapshot())
    steps: list[Hearing | Snapshot] = [*truth.events, *snapshots]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=60)):
        if isinstance(step, Snapshot):
            before = mirror.version
            assert mirror.load(step) == (step.version >= before)
        else:
            mirror.apply(*step)
        if mirror.loaded:
            same(mirror, *truth.at[mirror.version[0]])
    mirror.load(truth.snapshot())
    same(mirror, truth.chunks, truth.live)
    assert mirror.apply(head(truth.version, truth.version), sync(truth.chunks)) is Verdict.CONFIRMED


# --- snapshots from pages ---------------------------------------------------------------------------


def page(n: int, *, last: bool = False, version: int = 10, chunk: int = 1) -> wire.SnapshotPage:
    owner = wire.SnapshotOwner("a", "10.0.0.1", "i", 7, "live")
    return wire.SnapshotPage(
        (version, 0), n, (owner,), ((0, (chunk,)),), definition=POOL if n == 0 else None, last=last
    )


def test_a_snapshot_is_complete_when_all_its_pages_came_in_any_order() -> None:
    pages, stamp = Pages(), wire.Stamp("agent", 1, "h1")
    assert pages.add(stamp, page(2, last=True, chunk=3)) is None
    assert pages.add(stamp, page(0, chunk=1)) is None
    whole = pages.add(stamp, page(1, chunk=2))
    assert whole is not None
    mirror = Mirror()
    mirror.load(whole)
    assert set(mirror.chunks()) == {1, 2, 3}


def test_pages_of_two_agents_or_versions_never_mix() -> None:
    pages = Pages()
    assert pages.add(wire.Stamp("one", 1, "h1"), page(0)) is None
    assert pages.add(wire.Stamp("two", 1, "h1"), page(1, last=True)) is None
    assert pages.add(wire.Stamp("one", 1, "h1"), page(1, last=True, version=11)) is None
    assert pages.add(wire.Stamp("one", 1, "h1"), page(1, last=True)) is not None


def test_a_page_that_names_an_owner_it_does_not_have_is_no_snapshot() -> None:
    broken = replace(page(0, last=True), chunks=((5, (1,)),))
    assert Pages().add(wire.Stamp("agent", 1, "h1"), broken) is None
