"""One pool's ids in a pod, against a model of plain sets."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from drsm_sdk.errors import NotAllocated, NotOwner
from drsm_sdk.stock import SEEN_MAX, Stock
from drsm_sdk.wire.checksum import MODULUS, holding
from drsm_sdk.wire.definition import Definition

SMALL = Definition(name="p", bits=10, block_bits=3, slots=6)
RESTING = Definition(name="p", bits=10, block_bits=3, slots=6, quarantine_ms=5_000)


def grant(i: int) -> str:
    return f"{i:016x}"


def taken(stock: Stock, count: int, now: float = 0.0) -> list[int]:
    ids = [stock.take(now) for _ in range(count)]
    assert None not in ids
    return [id_ for id_ in ids if id_ is not None]


def filled(definition: Definition = SMALL, *chunks: int) -> Stock:
    stock = Stock(definition)
    for n in chunks or (1,):
        assert stock.add(n, grant(n), 0.0)
    return stock


# --- single ids -------------------------------------------------------------------------------------


def test_fresh_ids_come_ascending_and_id_0_never() -> None:
    stock = filled(SMALL, 0)
    assert taken(stock, 5) == [1, 2, 3, 4, 5]
    assert stock.take(0.0) is None


def test_released_ids_come_last_in_the_order_of_their_release() -> None:
    stock = filled()
    first = taken(stock, 3)
    for id_ in reversed(first):
        stock.release(id_, 0.0)
    assert taken(stock, 6) == [11, 12, 13, 10, 9, 8]


def test_a_released_id_rests_for_its_quarantine() -> None:
    stock = filled(RESTING)
    taken(stock, 6)
    stock.release(10, 1.0)
    assert (stock.free, stock.take(5.9)) == (0, None)
    assert stock.take(6.0) == 10


def test_the_fullest_chunk_is_issued_from_first() -> None:
    """So that sparse chunks empty and can go back."""
    stock = filled(SMALL, 1, 2, 3)
    taken(stock, 18)
    for id_ in (8, 9, 16, 24, 25, 26):
        stock.release(id_, 0.0)
    stock.release(10, 0.0)  # the current chunk is 3; of the others, 2 is the fullest
    drained = taken(stock, 7)
    assert drained[:3] == [24, 25, 26]
    assert drained[3] == 16
    assert drained[4:] == [8, 9, 10]


def test_a_release_of_what_was_never_allocated_changes_nothing() -> None:
    stock = filled()
    id_ = taken(stock, 1)[0]
    before = (stock.free, stock.held(), stock.all_issued())
    with pytest.raises(NotOwner):
        stock.release(700, 0.0)
    with pytest.raises(NotOwner):
        stock.release(-1, 0.0)
    with pytest.raises(NotOwner):
        stock.release(14, 0.0)  # above the chunk's slots
    with pytest.raises(NotAllocated):
        stock.release(id_ + 1, 0.0)
    assert (stock.free, stock.held(), stock.all_issued()) == before


def test_a_second_release_is_refused() -> None:
    stock = filled()
    stock.release(taken(stock, 1)[0], 0.0)
    with pytest.raises(NotAllocated):
        stock.release(8, 0.0)


def test_an_id_that_was_put_back_is_the_next_to_be_issued() -> None:
    """R4: it was taken, but the lease had run out before it was handed out."""
    stock = filled()
    stock.put_back(taken(stock, 1)[0])
    assert stock.free == 6
    assert taken(stock, 2) == [8, 9]


# --- grants -----------------------------------------------------------------------------------------


def test_each_grant_is_taken_up_once() -> None:
    """Doubled answers, late events and lists change nothing."""
    stock = filled()
    assert stock.add(1, grant(1), 0.0) is None
    stock.drop(1)
    assert stock.add(1, grant(1), 0.0) is None
    assert stock.add(1, grant(2), 0.0) is not None


def test_a_chunk_that_is_held_by_another_grant_must_be_dropped_first() -> None:
    stock = filled()
    assert stock.add(1, grant(2), 0.0) is None
    assert stock.grant(8) == grant(1)


def test_dropping_a_chunk_tells_which_ids_were_issued_from_it() -> None:
    stock = filled(SMALL, 1, 2)
    ids = taken(stock, 8)
    assert stock.drop(1) == ids[:6]
    assert (stock.free, stock.all_issued()) == (4, ids[6:])
    assert not stock.issued(ids[0])


def test_remembered_grants_are_bounded() -> None:
    stock = Stock(SMALL)
    for i in range(SEEN_MAX + 50):
        assert stock.add(1, grant(i), 0.0)
        stock.drop(1)
    assert len(stock._seen) == SEEN_MAX


def test_held_counts_chunks_and_adds_up_their_hashes() -> None:
    stock = filled(SMALL, 1)
    stock.add(2, grant(2), 0.0, hold_until=9.0)
    said = holding(1, grant(1), marked=False) + holding(2, grant(2), marked=True)
    assert stock.held() == (2, said % MODULUS)
    stock.drop(1)
    assert stock.held() == (1, holding(2, grant(2), marked=True))


# --- marked chunks ----------------------------------------------------------------------------------


def test_nothing_is_issued_from_a_marked_chunk_before_its_scan() -> None:
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    assert (stock.free, stock.take(100.0)) == (0, None)
    assert stock.issued(8)
    assert not stock.issued(14)


def test_a_scan_leaves_what_is_in_use_issued_and_frees_the_rest() -> None:
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    assert stock.begin_scan(1, grant(1))
    assert stock.finish_scan(1, grant(1), {9, 11}, 6.0) == (2, 4)
    assert taken(stock, 4) == [8, 10, 12, 13]
    stock.release(9, 7.0)
    assert stock.take(7.0) == 9


def test_a_release_before_the_scan_changes_nothing() -> None:
    """The scan decides."""
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.release(9, 1.0)
    stock.begin_scan(1, grant(1))
    assert stock.finish_scan(1, grant(1), {9}, 6.0) == (1, 5)


def test_a_release_after_the_scan_began_wins_over_its_result() -> None:
    """Also over a second attempt at the scan."""
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.begin_scan(1, grant(1))
    stock.release(9, 6.0)
    with pytest.raises(NotAllocated):
        stock.release(9, 6.0)
    with pytest.raises(NotOwner):
        stock.release(14, 6.0)
    stock.begin_scan(1, grant(1))
    assert stock.finish_scan(1, grant(1), {9, 10}, 7.0) == (1, 5)


def test_what_was_released_during_a_scan_still_rests() -> None:
    stock = Stock(RESTING)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.begin_scan(1, grant(1))
    stock.release(8, 6.0)
    stock.finish_scan(1, grant(1), (), 7.0)
    assert taken(stock, 5, 11.0) == [9, 10, 11, 12, 13]
    assert stock.take(11.9) is None
    assert stock.take(12.0) == 8


def test_a_chunk_stays_marked_until_the_agent_confirmed_the_scan() -> None:
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.finish_scan(1, grant(1), (), 6.0)
    assert [chunk.n for chunk in stock.unreported()] == [1]
    assert stock.held() == (1, holding(1, grant(1), marked=True))
    assert stock.retire(1000.0, idle=60.0, keep=0, most=9) == []
    stock.set_mark(1, grant(1), marked=False)
    assert (stock.unreported(), stock.held()) == ([], (1, holding(1, grant(1), marked=False)))


def test_a_scan_of_a_chunk_that_is_gone_does_nothing() -> None:
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.drop(1)
    assert not stock.begin_scan(1, grant(1))
    assert stock.finish_scan(1, grant(1), (), 6.0) is None


# --- giving back ------------------------------------------------------------------------------------


def test_only_chunks_that_stayed_empty_and_are_not_needed_are_retired() -> None:
    stock = filled(SMALL, 1, 2, 3)
    id_ = taken(stock, 1)[0]
    assert stock.retire(59.0, idle=60.0, keep=0, most=9) == []
    assert stock.retire(60.0, idle=60.0, keep=11, most=9) == [3]
    stock.release(id_, 70.0)
    assert stock.retire(129.0, idle=60.0, keep=0, most=9) == [2]
    assert stock.retire(130.0, idle=60.0, keep=0, most=9) == [1]
    assert stock.free == 0


def test_a_chunk_is_not_retired_while_one_of_its_ids_rests() -> None:
    stock = filled(RESTING)
    stock.release(taken(stock, 1)[0], 0.0)
    assert stock.retire(4.0, idle=0.0, keep=0, most=9) == []
    stock.thaw(5.0)
    assert stock.retire(5.0, idle=0.0, keep=0, most=9) == [1]


def test_a_retired_grant_never_issues_again_and_counts_as_held_until_answered() -> None:
    stock = filled()
    held = stock.held()
    stock.retire(60.0, idle=60.0, keep=0, most=9)
    assert (stock.take(60.0), stock.held(), stock.retired()) == (None, held, [(1, grant(1))])
    assert stock.add(1, grant(1), 61.0) is None
    stock.settle(1, grant(1))
    assert (stock.held(), stock.retired()) == ((0, 0), [])


def test_a_chunk_may_come_back_under_a_new_grant_while_the_old_release_is_unanswered() -> None:
    stock = filled()
    stock.retire(60.0, idle=60.0, keep=0, most=9)
    assert stock.add(1, grant(2), 61.0)
    stock.settle(1, grant(1))
    assert stock.held() == (1, holding(1, grant(2), marked=False))
    assert stock.take(61.0) == 8


# --- everything together ----------------------------------------------------------------------------


class StockAgainstSets(RuleBasedStateMachine):
    """Any sequence of calls; the model keeps plain sets of ids, and per chunk what may be issued when."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.stock = Stock(RESTING)
        self.grants = 0
        self.held: dict[int, str] = {}
        self.closed: set[int] = set()
        self.issued: set[int] = set()
        self.ready_at: dict[int, float] = {}  # issuable ids, and from when on
        self.times: Counter[int] = Counter()

    def of(self, n: int) -> set[int]:
        return set(RESTING.ids(n))

    @rule(passed=st.floats(0.0, 3.0))
    def time_passes(self, passed: float) -> None:
        self.now += passed

    @rule(n=st.integers(0, 5), marked=st.booleans())
    def take_up(self, n: int, marked: bool) -> None:
        self.grants += 1
        added = self.stock.add(n, grant(self.grants), self.now, self.now if marked else None)
        assert (added is None) == (n in self.held)
        if added is not None:
            self.held[n] = grant(self.grants)
            if marked:
                self.closed.add(n)
            else:
                self.ready_at |= dict.fromkeys(self.of(n), self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.held)))
        assert set(self.stock.drop(n)) == self.issued & self.of(n)
        self.forget(n)

    def forget(self, n: int) -> None:
        del self.held[n]
        self.closed.discard(n)
        self.issued -= self.of(n)
        for id_ in self.of(n):
            self.ready_at.pop(id_, None)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def scan(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.closed)))
        in_use = data.draw(st.sets(st.sampled_from(sorted(self.of(n)))))
        assert self.stock.begin_scan(n, self.held[n])
        assert self.stock.finish_scan(n, self.held[n], in_use, self.now)
        self.stock.set_mark(n, self.held[n], marked=False)
        self.closed.discard(n)
        self.issued |= in_use
        self.ready_at |= dict.fromkeys(self.of(n) - in_use, self.now)

    @rule(target=ids)
    def take(self) -> int:
        id_ = self.stock.take(self.now)
        issuable = {i for i, ready in self.ready_at.items() if ready <= self.now}
        if id_ is None:
            assert not issuable
            return -1
        assert id_ in issuable
        del self.ready_at[id_]
        self.issued.add(id_)
        return id_

    @rule()
    def take_and_put_back(self) -> None:
        id_ = self.stock.take(self.now)
        if id_ is not None:
            self.stock.put_back(id_)

    @rule(id_=consumes(ids))
    def release(self, id_: int) -> None:
        n = id_ >> RESTING.block_bits
        if n not in self.held:
            with pytest.raises(NotOwner):
                self.stock.release(id_, self.now)
        elif n in self.closed:
            self.stock.release(id_, self.now)
        elif id_ not in self.issued:
            with pytest.raises(NotAllocated):
                self.stock.release(id_, self.now)
        else:
            self.stock.release(id_, self.now)
            self.issued.discard(id_)
            self.ready_at[id_] = self.now + 5.0

    @rule(keep=st.integers(0, 12))
    def retire(self, keep: int) -> None:
        self.stock.thaw(self.now)
        for n in self.stock.retire(self.now, idle=0.0, keep=keep, most=2):
            assert not self.issued & self.of(n)
            assert all(self.ready_at[id_] <= self.now for id_ in self.of(n))
            self.stock.settle(n, self.held[n])
            self.forget(n)
            assert self.stock.free >= keep

    @invariant()
    def agrees(self) -> None:
        self.stock.thaw(self.now)
        assert set(self.stock.all_issued()) == self.issued
        assert self.stock.free == sum(ready <= self.now for ready in self.ready_at.values())
        said = sum(holding(n, g, marked=n in self.closed) for n, g in self.held.items())
        assert self.stock.held() == (len(self.held), said % MODULUS)
        level = self.stock.level(self.now)
        assert (level.issued, level.chunks, level.closed) == (
            len(self.issued),
            len(self.held),
            len(self.closed),
        )


TestStockAgainstSets = StockAgainstSets.TestCase
TestStockAgainstSets.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
