"""One pool's ids in a pod, against a model of plain lists."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from drsm_sdk import stock as stock_module
from drsm_sdk.errors import NotAllocated, NotOwner
from drsm_sdk.stock import SEEN_MAX, Level, Stock
from drsm_sdk.wire.checksum import MODULUS, holding
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.space import Space

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
    assert stock.drop(1) == [ids[:6]]
    assert (stock.free, stock.all_issued()) == (4, [ids[6:]])
    assert not stock.issued(ids[0])


def test_what_is_held_or_on_its_way_back_is_known_however_many_grants_came_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A list of what this pod holds would have it taken up anew, with all its ids free."""
    monkeypatch.setattr(stock_module, "SEEN_MAX", 3)
    stock = filled(SMALL, 1)
    stock.add(2, grant(2), 0.0)
    assert stock.retire(100.0, idle=60, keep=0, most=1) == [2]
    for i in range(10, 20):
        stock.add(3, grant(i), 0.0)
        stock.drop(3)
    for n in (1, 2):
        assert stock.seen(n, grant(n))
        assert stock.add(n, grant(n), 0.0) is None
    assert not stock.seen(3, grant(10))  # of those that are over only the newest are known
    stock.settle(2, grant(2))
    assert stock.seen(2, grant(2))


def test_to_give_back_many_chunks_does_not_look_through_all_of_them_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pod that stands still for that long would be declared dead. And what is gone does not pile up."""
    looked = Counter[str]()
    monkeypatch.setattr(heapq, "heapify", lambda heap: looked.update(["all"]) or heap.sort())
    stock = filled(Definition(name="p", bits=24, block_bits=3, slots=6), *range(1, 2001))
    (first,) = taken(stock, 1)
    assert len(stock.retire(100.0, idle=60, keep=0, most=1900)) == 1900
    assert looked["all"] <= 12  # each time half of them
    (picker,) = stock._pickers
    assert len(picker._others) <= 2 * 100 + stock_module.STALE_MOST
    assert len({first, *taken(stock, 100 * 6 - 1)}) == 100 * 6
    assert stock.take(0.0) is None


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
    assert stock.finish_scan(1, grant(1), [{9, 11}], 6.0) == (2, 4)
    assert taken(stock, 4) == [8, 10, 12, 13]
    stock.release(9, 7.0)
    assert stock.take(7.0) == 9


def test_a_release_before_the_scan_changes_nothing() -> None:
    """The scan decides."""
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.release(9, 1.0)
    stock.begin_scan(1, grant(1))
    assert stock.finish_scan(1, grant(1), [{9}], 6.0) == (1, 5)


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
    assert stock.finish_scan(1, grant(1), [{9, 10}], 7.0) == (1, 5)


def test_after_a_scan_all_that_is_free_rests_first() -> None:
    """It may have been released right before; what was during the scan comes last."""
    stock = Stock(RESTING)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.begin_scan(1, grant(1))
    stock.release(8, 6.0)
    stock.finish_scan(1, grant(1), [()], 7.0)
    assert stock.take(11.9) is None
    assert taken(stock, 6, 12.0) == [9, 10, 11, 12, 13, 8]


def test_what_was_released_during_a_scan_comes_last_in_the_order_of_its_release() -> None:
    """As everywhere: a late message may still mean the one who had it."""
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.begin_scan(1, grant(1))
    stock.release(11, 6.0)
    stock.release(9, 6.0)
    stock.finish_scan(1, grant(1), [{9, 10}], 7.0)
    assert taken(stock, 5) == [8, 12, 13, 11, 9]


def test_a_chunk_stays_marked_until_the_agent_confirmed_the_scan() -> None:
    stock = Stock(SMALL)
    stock.add(1, grant(1), 0.0, hold_until=5.0)
    stock.finish_scan(1, grant(1), [()], 6.0)
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
    assert stock.finish_scan(1, grant(1), [()], 6.0) is None


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


def test_what_was_let_go_of_and_is_listed_all_the_same_is_given_back_again() -> None:
    """It counts as held meanwhile, so that both sides agree; what is held, or never was, is left alone."""
    stock = filled(SMALL, 1, 2)
    held = stock.held()
    stock.drop(1)
    for n in (1, 1, 2, 3):
        stock.retire_again(n, grant(n))
    assert (stock.held(), stock.retired()) == (held, [(1, grant(1))])
    stock.settle(1, grant(1))
    assert stock.retired() == []


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


@dataclass
class Held:
    """A chunk as the model sees it: four plain lists, in order."""

    n: int
    grant: str
    marked: bool
    open: bool
    empty_since: float
    free: list[int] = field(default_factory=list)
    issued: dict[int, float] = field(default_factory=dict)
    resting: list[int] = field(default_factory=list)
    released: list[int] | None = None


QUICK = Definition(name="p", bits=10, block_bits=3, slots=6, reserved=((10, 11), (20, 30)))
NUMBERS = st.integers(0, 4)
ANY_ID = st.one_of(st.integers(0, 39), st.sampled_from([-1, 500, 1 << 70]))


class StockAgainstAPlainModel(RuleBasedStateMachine):
    """Any sequence of calls, against plain lists that say which id must come next."""

    @initialize(
        definition=st.sampled_from([SMALL, QUICK, RESTING]),
        marks=st.lists(st.booleans(), max_size=4),
        issued=st.integers(0, 24),
        released=st.integers(0, 12),
    )
    def start(self, definition: Definition, marks: list[bool], issued: int, released: int) -> None:
        """In the midst of it: chunks are held, ids were issued and some released, the scans have begun."""
        self.definition = definition
        self.quarantine = definition.quarantine_ms / 1000
        self.now = 0.0
        self.stock = Stock(definition)
        self.grants = 0
        self.held: list[Held] = []  # in the order in which they came
        self.current: Held | None = None
        self.resting: list[tuple[float, Held, int]] = []
        self.over: list[tuple[int, str]] = []
        self.retired: list[tuple[int, str]] = []
        self.drawn = 0
        for n, marked in enumerate(marks):
            self.gain(n, marked)
        for chunk in self.closed():
            self.stock.begin_scan(chunk.n, chunk.grant)
            chunk.released = []
        self.take(issued)
        issuing = [(held, id_) for held in self.held for id_ in held.issued]
        for held, id_ in issuing[:released]:
            self.let_go(held, id_)

    def find(self, n: int) -> Held | None:
        return next((chunk for chunk in self.held if chunk.n == n), None)

    def closed(self) -> list[Held]:
        return [chunk for chunk in self.held if not chunk.open]

    def some(self, data: st.DataObject) -> Held:
        return data.draw(st.sampled_from(self.held))

    # --- the model's two rules: which id comes next, and when a released one is free ---------------

    def next_id(self) -> int | None:
        """Of the chunk in use as long as it lasts, then of the fullest, of these the one held longest."""
        if self.current is None or not self.current.free:
            left = [chunk for chunk in self.held if chunk.free]
            if not left:
                self.current = None
                return None
            self.current = max(left, key=lambda chunk: len(chunk.issued))
        return self.current.free[0]

    def thaw(self) -> None:
        for rested in [rested for rested in self.resting if rested[0] <= self.now]:
            _, chunk, id_ = rested
            self.resting.remove(rested)
            chunk.resting.remove(id_)
            if id_ in self.definition.ids(chunk.n):
                chunk.free.append(id_)
                self.drawn -= 1

    def rest(self, chunk: Held, id_: int) -> None:
        chunk.resting.append(id_)
        self.resting.append((self.now + self.quarantine, chunk, id_))

    def forget(self, chunk: Held) -> None:
        self.held.remove(chunk)
        self.over.append((chunk.n, chunk.grant))
        self.resting = [rested for rested in self.resting if rested[1] is not chunk]
        if self.current is chunk:
            self.current = None

    # --- single ids ---------------------------------------------------------------------------------

    @rule(passed=st.sampled_from([0.0, 0.5, 2.5, 5.0, 60.0]))
    def time_passes(self, passed: float) -> None:
        self.now += passed

    @rule(count=st.sampled_from([1, 3, 7, 30]))
    def take(self, count: int) -> None:
        for _ in range(count):
            self.thaw()
            expected = self.next_id()
            assert self.stock.take(self.now) == expected
            if expected is not None and self.current is not None:
                del self.current.free[0]
                self.current.issued[expected] = self.now
                self.drawn += 1

    @rule()
    def take_and_put_back(self) -> None:
        self.thaw()
        id_ = self.stock.take(self.now)
        assert id_ == self.next_id()
        if id_ is not None:
            self.stock.put_back(id_)

    @rule()
    def look_for_rested_ids(self) -> None:
        before = len(self.resting)
        self.thaw()
        assert self.stock.thaw(self.now) == before - len(self.resting)

    @rule(id_=ANY_ID)
    def release_any(self, id_: int) -> None:
        """Mostly what cannot be: another's, never issued, or released before."""
        chunk = self.find(id_ >> self.definition.block_bits)
        if chunk is None or not (id_ in chunk.issued or id_ in self.definition.ids(chunk.n)):
            with pytest.raises(NotOwner):
                self.stock.release(id_, self.now)
        elif id_ in chunk.issued or (not chunk.open and id_ not in (chunk.released or ())):
            self.let_go(chunk, id_)
        else:
            with pytest.raises(NotAllocated):
                self.stock.release(id_, self.now)

    @rule(data=st.data(), most=st.integers(1, 12))
    def release_issued(self, data: st.DataObject, most: int) -> None:
        """Of any chunks, in any order."""
        issued = [(chunk, id_) for chunk in self.held for id_ in chunk.issued]
        for chunk, id_ in data.draw(st.permutations(issued))[:most]:
            self.let_go(chunk, id_)

    def let_go(self, chunk: Held, id_: int) -> None:
        self.stock.release(id_, self.now)
        if not chunk.open:
            if chunk.released is not None:
                chunk.released.append(id_)
            return
        del chunk.issued[id_]
        if not chunk.issued:
            chunk.empty_since = self.now
        if self.quarantine:
            self.rest(chunk, id_)
        elif id_ in self.definition.ids(chunk.n):
            chunk.free.append(id_)
            self.drawn -= 1

    # --- chunks -------------------------------------------------------------------------------------

    @rule(n=NUMBERS, marked=st.booleans())
    def gain(self, n: int, marked: bool) -> None:
        self.grants += 1
        added = self.stock.add(n, grant(self.grants), self.now, self.now + 9 if marked else None)
        assert (added is None) == (self.find(n) is not None)
        if added is not None:
            chunk = Held(n, grant(self.grants), marked, not marked, self.now)
            chunk.free = [] if marked else self.definition.ids(n)
            self.held.append(chunk)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), marked=st.booleans())
    def gain_anew(self, data: st.DataObject, marked: bool) -> None:
        """A chunk that is held comes by another grant: the old one must be over."""
        chunk = self.some(data)
        assert self.stock.drop(chunk.n) == [list(chunk.issued)]
        self.forget(chunk)
        self.gain(chunk.n, marked)

    @rule(data=st.data(), marked=st.booleans())
    def hear_of_a_grant_again(self, data: st.DataObject, marked: bool) -> None:
        """Doubled or late: of a chunk that is held, or was."""
        known = [*self.over, *((chunk.n, chunk.grant) for chunk in self.held)]
        if known:
            n, said = data.draw(st.sampled_from(known))
            assert self.stock.seen(n, said)
            assert self.stock.add(n, said, self.now, self.now if marked else None) is None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chunk = self.some(data)
        assert self.stock.drop(chunk.n) == [list(chunk.issued)]
        self.forget(chunk)

    @precondition(lambda self: self.closed())
    @rule(data=st.data())
    def begin_scan(self, data: st.DataObject) -> None:
        """For the first time, or again after a failure."""
        chunk = data.draw(st.sampled_from(self.closed()))
        assert self.stock.begin_scan(chunk.n, chunk.grant)
        assert not self.stock.begin_scan(chunk.n, "another")
        if chunk.released is None:
            chunk.released = []

    @precondition(lambda self: self.closed())
    @rule(data=st.data(), most=st.integers(1, 6))
    def release_unknown(self, data: st.DataObject, most: int) -> None:
        """The application ends sessions that the former owner began."""
        chunk = data.draw(st.sampled_from(self.closed()))
        left = [id_ for id_ in self.definition.ids(chunk.n) if id_ not in (chunk.released or ())]
        for id_ in data.draw(st.permutations(left))[:most]:
            self.let_go(chunk, id_)

    @precondition(lambda self: self.closed())
    @rule(data=st.data())
    def finish_scan(self, data: st.DataObject) -> None:
        """The function may also name ids that are not issued any more: they are in use until released."""
        chunk = data.draw(st.sampled_from(self.closed()))
        every = range(self.definition.first_id(chunk.n), self.definition.last_id(chunk.n) + 1)
        in_use = data.draw(st.sets(st.sampled_from(every)))
        ids = self.definition.ids(chunk.n)
        assert self.stock.finish_scan(chunk.n, "another", [()], self.now) is None
        done = self.stock.finish_scan(chunk.n, chunk.grant, [in_use], self.now)
        released, chunk.released, chunk.open = chunk.released or [], None, True
        chunk.issued = {id_: self.now for id_ in sorted(in_use) if id_ not in released}
        chunk.free = [id_ for id_ in ids if id_ not in in_use and id_ not in released]
        chunk.empty_since = self.now
        assert done == (len(chunk.issued), len(chunk.free) + len(released))
        chunk.free += released
        if self.quarantine:  # released right before the scan, perhaps
            chunk.free, rest = [], chunk.free
            for id_ in rest:
                self.rest(chunk, id_)

    @precondition(lambda self: any(chunk.open for chunk in self.held))
    @rule(data=st.data())
    def scan_an_open_chunk(self, data: st.DataObject) -> None:
        """One attempt too many."""
        chunk = data.draw(st.sampled_from([chunk for chunk in self.held if chunk.open]))
        assert not self.stock.begin_scan(chunk.n, chunk.grant)
        assert self.stock.finish_scan(chunk.n, chunk.grant, [()], self.now) is None

    @precondition(lambda self: self.held)
    @rule(data=st.data(), marked=st.booleans())
    def hear_of_a_mark(self, data: st.DataObject, marked: bool) -> None:
        """Of a closed chunk the scan decides."""
        chunk = self.some(data)
        self.stock.set_mark(chunk.n, chunk.grant, marked=marked)
        self.stock.set_mark(chunk.n, "another", marked=not marked)
        if chunk.open:
            chunk.marked = marked

    @rule(idle=st.sampled_from([0.0, 60.0]), keep=st.integers(0, 12), most=st.integers(0, 3))
    def give_back(self, idle: float, keep: int, most: int) -> None:
        """The newest first, whatever was not issued from for long enough and is not needed."""
        expected: list[int] = []
        for chunk in reversed(list(self.held)):
            empty = chunk.open and not chunk.marked and not chunk.issued and not chunk.resting
            others = sum(len(other.free) for other in self.held if other is not chunk)
            if len(expected) < most and empty and self.now >= chunk.empty_since + idle and others >= keep:
                expected.append(chunk.n)
                self.retired.append((chunk.n, chunk.grant))
                self.forget(chunk)
        assert self.stock.retire(self.now, idle=idle, keep=keep, most=most) == expected

    @rule(data=st.data())
    def hear_that_it_was_taken_back(self, data: st.DataObject) -> None:
        """Also of one that was not given back, or was answered before."""
        known = [*self.over, *((chunk.n, chunk.grant) for chunk in self.held)]
        if known:
            pair = data.draw(st.sampled_from(known))
            self.stock.settle(*pair)
            self.retired = [kept for kept in self.retired if kept != pair]

    # --- at every moment ----------------------------------------------------------------------------

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        """Free, issued, resting, or not known yet; and a free id is never one that is issued."""
        for chunk in self.held:
            ids = self.definition.ids(chunk.n)
            everywhere = {id_ for id_ in (*chunk.free, *chunk.issued, *chunk.resting) if id_ in ids}
            assert sorted(everywhere) == (ids if chunk.open else [])

    def counts_as_issued(self, chunk: Held, id_: int) -> bool:
        if chunk.open:
            return id_ in chunk.issued
        return id_ in self.definition.ids(chunk.n) and id_ not in (chunk.released or ())

    @invariant()
    def the_stock_is_what_the_model_says(self) -> None:
        stock, held = self.stock, self.held
        for id_ in (*range(40), -1, 500):
            chunk = self.find(id_ >> self.definition.block_bits)
            assert stock.issued(id_) == (chunk is not None and self.counts_as_issued(chunk, id_))
        assert [(c.n, c.grant, c.marked, c.open) for c in stock] == [
            (c.n, c.grant, c.marked, c.open) for c in held
        ]
        assert stock.all_issued() == [[id_ for chunk in held for id_ in chunk.issued]]
        assert [c.n for c in stock.unreported()] == [c.n for c in held if c.open and c.marked]
        assert stock.retired() == sorted(self.retired)

    @invariant()
    def its_sums_are_right(self) -> None:
        stock, held = self.stock, self.held
        assert stock.free == sum(len(chunk.free) for chunk in held)
        assert stock.drawn == self.drawn
        said = sum(holding(chunk.n, chunk.grant, marked=chunk.marked) for chunk in held)
        said += sum(holding(n, given, marked=False) for n, given in self.retired)
        assert stock.held() == (len(held) + len(self.retired), said % MODULUS)
        since = [at for chunk in held for at in chunk.issued.values()]
        assert stock.level(self.now) == Level(
            issued=len(since),
            free=stock.free,
            oldest=self.now - min(since, default=self.now),
            chunks=len(held),
            closed=sum(not chunk.open for chunk in held),
            resting=len(self.resting),
        )


TestStockAgainstAPlainModel = StockAgainstAPlainModel.TestCase
TestStockAgainstAPlainModel.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


def test_what_is_excluded_during_a_scan_is_not_issued_after_it() -> None:
    """Also if it was released before that."""
    stock = Stock(SMALL)
    assert stock.add(1, grant(1), 0.0, hold_until=1.0)
    assert stock.begin_scan(1, grant(1))
    for id_ in (8, 9):
        stock.release(id_, 1.0)
    stock.redefine(Definition(name="p", bits=10, block_bits=3, slots=6, reserved=((8, 8),), revision=2))
    assert stock.finish_scan(1, grant(1), [{10, 11, 12}], 1.0) == (3, 2)
    assert sorted(taken(stock, 2)) == [9, 13]
    assert stock.take(1.0) is None


def test_without_a_chunk_a_pool_may_become_another() -> None:
    """With other blocks, and other spaces."""
    stock = Stock(SMALL)
    spaces = (Space(name="a", bits=10, block_bits=4), Space(name="b", bits=10, block_bits=2))
    stock.redefine(Definition(name="p", kind="spaces", spaces=spaces, revision=2))
    assert stock.add(3, grant(3), 0.0)
    assert stock.take_set(0.0, (0, 1)) == [48, 12]
    stock.release(12, 0.0, 1)
    assert (stock.free, stock.issued(48, 0), stock.issued(12, 1)) == (4, True, False)
