"""A stock of several spaces: ids that are drawn together lie in one chunk, and each space has its own ids."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from drsm_sdk.errors import NotAllocated, NotOwner
from drsm_sdk.stock import Stock
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Space

SEID, UE = 0, 1
SEIDS = Space(name="seid", bits=64, block_bits=3, slots=6)
UES = Space(name="ue", kind="ipv4", ranges=("10.45.0.0/24",), block_bits=2)
POOL = Definition(name="sessions", spaces=(SEIDS, UES))
RESTING = Definition(name="sessions", spaces=(SEIDS, UES), quarantine_ms=5_000)
SHIFTS = (3, 2)


def grant(n: int) -> str:
    return f"{n:016x}"


def filled(definition: Definition, *chunks: int) -> Stock:
    stock = Stock(definition)
    for n in chunks:
        assert stock.add(n, grant(n), 0.0)
    return stock


def chunks_of(ids: list[int] | None) -> set[int]:
    assert ids is not None
    return {id_ >> shift for id_, shift in zip(ids, SHIFTS, strict=True)}


def test_a_set_has_an_id_of_each_space_of_one_chunk() -> None:
    """So that one claim moves a whole session."""
    stock = filled(POOL, 3, 5)
    sets = [stock.take_set(0.0, (SEID, UE)) for _ in range(8)]
    assert [len(chunks_of(ids)) for ids in sets] == [1] * 8
    assert len({ids[UE] for ids in sets if ids}) == 8
    assert stock.take_set(0.0, (SEID, UE)) is None  # addresses have run out; SEIDs have not
    assert stock.take(0.0, SEID) is not None


def test_a_set_may_be_of_some_spaces_in_any_order() -> None:
    stock = filled(POOL, 3)
    assert stock.take_set(0.0, (UE,)) == [12]
    assert stock.take_set(0.0, (UE, SEID)) == [13, 24]


def test_free_ids_that_no_chunk_has_together_are_no_set() -> None:
    """Chunk 3 has only SEIDs left, chunk 5 only addresses; nothing is taken by the attempt."""
    stock = filled(POOL, 3, 5)
    ids = [stock.take_beside(0.0, UE, 3) for _ in range(4)] + [
        stock.take_beside(0.0, SEID, 5) for _ in range(6)
    ]
    assert None not in ids
    assert (stock.free, stock.take_beside(0.0, UE, 3), stock.take_beside(0.0, SEID, 5)) == (4, None, None)
    assert stock.take_set(0.0, (SEID, UE)) is None
    assert sorted(map(len, stock.all_issued())) == [4, 6]
    stock.release(13, 1.0, UE)
    assert stock.take_set(1.0, (SEID, UE)) == [24, 13]


def test_an_id_beside_another_is_of_its_chunk_or_there_is_none() -> None:
    stock = filled(POOL, 3, 5)
    assert stock.take_beside(0.0, UE, 5) == 20
    assert [stock.take_beside(0.0, UE, 5) for _ in range(4)] == [21, 22, 23, None]
    assert stock.take_beside(0.0, UE, 4) is None  # another's


def test_the_same_number_is_another_id_in_another_space() -> None:
    stock = filled(POOL, 3, 6)
    assert stock.take(0.0, SEID) == 24
    assert stock.take(0.0, UE) == 12
    assert (stock.issued(24, SEID), stock.issued(24, UE)) == (True, False)
    with pytest.raises(NotAllocated):
        stock.release(24, 0.0, UE)
    with pytest.raises(NotOwner, match=r"id 10\.45\.0\.8 is not in a chunk of this pod"):
        stock.release(8, 0.0, UE)
    with pytest.raises(NotOwner):
        stock.grant(30, SEID)  # above the slots
    assert stock.grant(24, UE) == grant(6)


def test_released_ids_come_last_in_each_space() -> None:
    stock = filled(POOL, 3)
    ids = [stock.take_set(0.0, (SEID, UE)) for _ in range(3)]
    assert ids == [[24, 12], [25, 13], [26, 14]]
    for space in (SEID, UE):
        stock.release(ids[1][space] if ids[1] else -1, 0.0, space)
    assert [stock.take_set(0.0, (SEID, UE)) for _ in range(2)] == [[27, 15], [28, 13]]


def test_each_space_rests_for_the_quarantine() -> None:
    stock = filled(RESTING, 3)
    for _ in range(4):
        assert stock.take_set(0.0, (SEID, UE))
    stock.release(13, 1.0, UE)
    stock.release(25, 2.0, SEID)
    assert stock.level(2.0).resting == 2
    assert stock.take_set(5.9, (SEID, UE)) is None
    assert stock.take_set(6.0, (SEID, UE)) == [28, 13]
    assert [stock.take(7.0, SEID), stock.take(7.0, SEID)] == [29, 25]


def test_a_scan_says_for_each_space_what_is_in_use() -> None:
    """A release that comes meanwhile counts in its own space only."""
    stock = Stock(POOL)
    stock.add(3, grant(3), 0.0, hold_until=5.0)
    assert stock.take_set(9.0, (SEID, UE)) is None
    assert stock.begin_scan(3, grant(3))
    stock.release(12, 9.0, UE)
    assert stock.finish_scan(3, grant(3), [{24, 25}, {12, 13}], 9.0) == (3, 7)
    assert stock.all_issued() == [[24, 25], [13]]
    assert stock.take_set(9.0, (SEID, UE)) == [26, 14]
    assert [stock.take(9.0, UE) for _ in range(3)] == [15, 12, None]


@pytest.mark.parametrize("space", [SEID, UE])
def test_a_chunk_goes_back_only_when_nothing_of_it_is_used_in_any_space(space: int) -> None:
    stock = filled(RESTING, 3)
    id_ = stock.take(0.0, space)
    assert id_ is not None
    assert stock.retire(100.0, idle=60.0, keep=0, most=9) == []
    stock.release(id_, 100.0, space)
    assert stock.retire(200.0, idle=60.0, keep=0, most=9) == []  # it rests, as nobody has looked since
    stock.thaw(200.0)
    assert stock.retire(200.0, idle=60.0, keep=1, most=9) == []
    assert stock.retire(200.0, idle=60.0, keep=0, most=9) == [3]
    assert (stock.free, stock.drawn) == (0, 0)


def test_dropping_a_chunk_tells_its_ids_of_each_space() -> None:
    stock = filled(POOL, 3, 5)
    stock.take_set(0.0, (SEID, UE))
    stock.take(0.0, SEID)
    assert stock.drop(3) == [[24, 25], [12]]
    assert stock.free == 4
    assert chunks_of(stock.take_set(0.0, (SEID, UE))) == {5}


def test_nothing_that_was_excluded_since_is_issued_any_more() -> None:
    """Free ones go at once, issued ones when they are released, and those in quarantine too."""
    stock = filled(RESTING, 3)
    for _ in range(2):
        stock.take_set(0.0, (SEID, UE))
    stock.release(12, 0.0, UE)
    less = Space(
        name="ue", kind="ipv4", ranges=UES.ranges, block_bits=2, excluded=("10.45.0.12/31", "10.45.0.14")
    )
    stock.redefine(Definition(name="sessions", spaces=(SEIDS, less), quarantine_ms=5_000, revision=2))
    assert stock.issued(13, UE)
    stock.release(13, 1.0, UE)
    assert [stock.take(100.0, UE) for _ in range(2)] == [15, None]
    assert stock.take_beside(100.0, SEID, 3) == 26
    assert (stock.free, stock.level(100.0).resting) == (0, 0)
    with pytest.raises(NotOwner):
        stock.release(13, 100.0, UE)


CHUNKS = st.integers(1, 4)


class TwoSpacesAgainstPlainSets(RuleBasedStateMachine):
    """An id is issued if and only if there is one, never twice, and of the chunk that it must be of."""

    @initialize(chunks=st.sets(CHUNKS))
    def start(self, chunks: set[int]) -> None:
        self.stock = Stock(POOL)
        self.grants = 0
        self.free: dict[int, list[set[int]]] = {}
        self.used: list[set[int]] = [set(), set()]
        for n in chunks:
            self.gain(n)

    def of(self, n: int) -> list[list[int]]:
        """The ids that chunk `n` has issued, of each space."""
        return [sorted(id_ for id_ in self.used[space] if id_ >> SHIFTS[space] == n) for space in (SEID, UE)]

    def took(self, space: int, id_: int | None, among: set[int]) -> None:
        assert (id_ is None) == (not among)
        if id_ is not None:
            assert id_ in among
            self.free[id_ >> SHIFTS[space]][space].remove(id_)
            self.used[space].add(id_)

    def forget(self, n: int) -> None:
        for space, ids in enumerate(self.of(n)):
            self.used[space].difference_update(ids)
        del self.free[n]

    @rule(n=CHUNKS)
    def gain(self, n: int) -> None:
        self.grants += 1
        added = self.stock.add(n, grant(self.grants), 0.0)
        assert (added is None) == (n in self.free)
        self.free.setdefault(n, [set(part.ids(n)) for part in POOL.parts])

    @rule(n=CHUNKS)
    def lose(self, n: int) -> None:
        if n in self.free:
            assert list(map(sorted, self.stock.drop(n))) == self.of(n)
            self.forget(n)

    @rule(space=st.sampled_from([SEID, UE]), count=st.integers(1, 9))
    def take(self, space: int, count: int) -> None:
        for _ in range(count):
            among = set().union(*(blocks[space] for blocks in self.free.values()))
            self.took(space, self.stock.take(0.0, space), among)

    @rule(count=st.integers(1, 4))
    def take_sets(self, count: int) -> None:
        for _ in range(count):
            ids = self.stock.take_set(0.0, (SEID, UE))
            assert (ids is None) == (not any(all(blocks) for blocks in self.free.values()))
            for space, id_ in enumerate(ids or ()):
                assert chunks_of(ids) == {id_ >> SHIFTS[space]}
                self.took(space, id_, set(self.free[id_ >> SHIFTS[space]][space]))

    @rule(n=CHUNKS, space=st.sampled_from([SEID, UE]))
    def take_beside(self, n: int, space: int) -> None:
        among = set(self.free[n][space]) if n in self.free else set()
        self.took(space, self.stock.take_beside(0.0, space, n), among)

    @rule(data=st.data(), space=st.sampled_from([SEID, UE]), most=st.integers(1, 8))
    def release(self, data: st.DataObject, space: int, most: int) -> None:
        for id_ in data.draw(st.permutations(sorted(self.used[space])))[:most]:
            self.stock.release(id_, 0.0, space)
            self.used[space].remove(id_)
            self.free[id_ >> SHIFTS[space]][space].add(id_)

    @rule(keep=st.integers(0, 8))
    def give_back(self, keep: int) -> None:
        idle = [n for n in self.free if self.of(n) == [[], []]]
        for n in self.stock.retire(0.0, idle=0.0, keep=keep, most=9):
            assert n in idle
            self.forget(n)
            assert min(self.left()) >= keep

    def left(self) -> list[int]:
        return [sum(len(blocks[space]) for blocks in self.free.values()) for space in (SEID, UE)]

    @invariant()
    def its_sums_are_right(self) -> None:
        assert self.stock.free == min(self.left())
        assert list(map(sorted, self.stock.all_issued())) == list(map(sorted, self.used))
        assert self.stock.level(0.0).issued == sum(map(len, self.used))


TestTwoSpacesAgainstPlainSets = TwoSpacesAgainstPlainSets.TestCase
TestTwoSpacesAgainstPlainSets.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
