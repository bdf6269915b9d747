"""Who owns what after a restore, decided from what living pods report."""

from dataclasses import replace

from drsm_agent.core.documents import LIVE, Chunk, Drsm, Owner, Session
from drsm_agent.core.restore import Decided, Restored, Said, announce, close, decide, left_over, read_restored
from drsm_agent.core.table import SESSIONS, Hashes, PoolTable, Table
from drsm_agent.core.writes import Insert, Update

POOL = "amfid"
ONE, TWO = Owner("amf-1", "10.0.0.1", "i", 1), Owner("amf-2", "10.0.0.2", "i", 2)
OTHER = Owner("amf-3", "10.0.0.3", "i", 3)
OLD, NEW, THIRD = "0" * 16, "1" * 16, "2" * 16
BOTH = {ONE.key, TWO.key}


def pool(*chunks: Chunk, living: tuple[Owner, ...] = (ONE, TWO)) -> PoolTable:
    """A table as it was read from the restored database."""
    hashes = Hashes(ownership=lambda n, name, i: n + i, holding=lambda n, grant, marked: n)
    table = Table([POOL], 1, hashes)
    sessions = [
        Session(owner.name, owner.ip, owner.instance, owner.incarnation, 0, LIVE, (POOL,), owner.name, 1000)
        for owner in living
    ]
    table.load(SESSIONS, [session.document for session in sessions])
    table.load(POOL, [chunk.document for chunk in chunks])
    return table.pools[POOL]


def owned(n: int, owner: Owner, grant: str = OLD, *, marked: bool = False) -> Chunk:
    who = (owner.name, owner.ip, owner.instance)
    return Chunk(n, *who, drsm=Drsm(*who, owner.incarnation, grant=grant, marked=marked))


def brief(decided: Decided) -> list[tuple[int, str, str, bool]]:
    return [(step.n, step.owner.name, step.grant, step.marked) for step in decided.steps]


def test_a_chunk_that_the_database_lost_goes_back_to_the_pod_that_reports_it() -> None:
    decided = decide(pool(), {ONE.key: {3: Said(NEW, marked=False)}}, BOTH, BOTH)
    assert brief(decided) == [(3, "amf-1", NEW, False)]
    assert not decided.refused


def test_what_is_as_reported_stays_as_it_is() -> None:
    assert not decide(pool(owned(3, ONE)), {ONE.key: {3: Said(OLD, marked=False)}}, BOTH, BOTH).steps


def test_a_mark_that_was_cleared_in_the_lost_time_is_cleared_again() -> None:
    table = pool(owned(3, ONE, marked=True))
    decided = decide(table, {ONE.key: {3: Said(OLD, marked=False)}}, BOTH, BOTH)
    assert brief(decided) == [(3, "amf-1", OLD, False)]


def test_a_dead_owners_chunk_goes_to_the_pod_that_reports_it() -> None:
    """It was claimed in the time that was lost."""
    table = pool(owned(3, ONE), living=(TWO,))
    decided = decide(table, {TWO.key: {3: Said(NEW, marked=True)}}, {TWO.key}, {TWO.key})
    assert brief(decided) == [(3, "amf-2", NEW, True)]


def test_a_living_owners_chunk_waits_until_that_one_has_reported() -> None:
    """Then it goes to the other, if the owner does not hold it any more; at the last, it does not."""
    table, reports = pool(owned(3, ONE)), {TWO.key: {3: Said(NEW, marked=False)}}
    waiting = decide(table, reports, {TWO.key}, BOTH)
    assert (waiting.steps, waiting.refused) == ([], set())
    assert brief(decide(table, reports, BOTH, BOTH)) == [(3, "amf-2", NEW, False)]
    last = decide(table, reports, {TWO.key}, BOTH, last=True)
    assert (brief(last), last.refused) == ([(3, "amf-1", "", True)], {(TWO.key, 3)})


def test_a_chunk_of_a_living_owner_goes_to_none_of_several_that_report_it() -> None:
    """Before the owner has said whether it holds it, nothing happens; and what a Go pod has it keeps."""
    living = (ONE, TWO, OTHER)
    reports = {key: {3: Said(NEW, marked=True)} for key in BOTH}
    assert not decide(pool(owned(3, OTHER), living=living), reports, BOTH, {*BOTH, OTHER.key}).steps
    go = Owner("go-1", "10.0.0.9", "i", 0)
    table = pool(Chunk(3, go.name, go.ip, go.instance), living=living)
    last = decide(table, reports, BOTH, {*BOTH, go.key}, last=True)
    assert (last.steps, last.refused) == ([], {(key, 3) for key in BOTH})


def test_what_two_living_pods_report_stays_with_its_owner_by_a_new_grant_and_marked() -> None:
    """Neither report counts: both have to let go of it."""
    reports = {ONE.key: {3: Said(OLD, marked=False)}, TWO.key: {3: Said(NEW, marked=True)}}
    decided = decide(pool(owned(3, TWO, NEW)), reports, BOTH, BOTH)
    assert brief(decided) == [(3, "amf-2", "", True)]
    assert decided.refused == {(ONE.key, 3), (TWO.key, 3)}
    assert brief(decide(pool(), reports, BOTH, BOTH)) == [(3, "amf-1", "", True)]


def test_a_dead_pods_report_does_not_count() -> None:
    table = pool(living=(TWO,))
    assert not decide(table, {ONE.key: {3: Said(OLD, marked=False)}}, BOTH, {TWO.key}).steps


def test_what_was_decided_is_not_decided_again() -> None:
    """The pod may have given it back since."""
    reports = {ONE.key: {3: Said(NEW, marked=False)}}
    assert not decide(pool(), reports, BOTH, BOTH, settled={(ONE.key, 3)}).steps


def test_what_a_living_pod_does_not_hold_any_more_it_gets_anew_and_marked() -> None:
    """Not what it reported, nor what it was given just now, nor a chunk of one that has not reported all."""
    table = pool(owned(1, ONE), owned(2, ONE), owned(3, ONE, THIRD, marked=True), owned(4, TWO))
    steps = left_over(table, {ONE.key: {1: Said(OLD, marked=False)}}, {ONE.key}, {3: THIRD})
    assert [(step.n, step.owner.name, step.grant, step.marked) for step in steps] == [(2, "amf-1", "", True)]


def test_what_is_left_over_is_written_in_one_order_whatever_the_hashes_of_names() -> None:
    """Else a simulated story would differ from process to process."""
    living = tuple(Owner(f"amf-{i}", "10.0.0.1", "i", 1) for i in range(8))
    table = pool(*(owned(n, owner) for n, owner in enumerate(living)), living=living)
    steps = left_over(table, {}, {owner.key for owner in living}, {})
    assert [step.n for step in steps] == list(range(8))


def test_incarnations_of_the_lost_time_are_told_from_those_before_and_after() -> None:
    restored = Restored(term=10, incarnation=5 << 32 | 7, allocation_ms=1000)
    assert [restored.before(i) for i in (5 << 32, 10 << 32 | 9, 11 << 32)] == [True, True, False]
    assert [restored.lost(i) for i in (5 << 32 | 7, 5 << 32 | 8, 11 << 32)] == [False, True, False]


def test_a_restore_is_announced_once_by_one_write() -> None:
    """Guarded by the one that was announced before; and read back as it was written. Its end leaves open the
    pools that its leader did not know, be it that the database told of them or a pod."""
    first, second = Restored(10, 1, 1000), Restored(20, 2, 1000, unsettled=("one", "two"))
    inserted, updated = announce(None, first), announce(first, second)
    closed = close(second.settled({"one", "new"}, {"new", "three"}))
    assert isinstance(inserted, Insert)
    assert read_restored([{"_id": "settings"}, inserted.document]) == first
    assert isinstance(updated, Update)
    assert updated.where == {"_id": "restored", "term": 10}
    assert read_restored([second.document]) == second
    assert (closed.where["term"], closed.set) == (20, {"open": False, "unsettled": ["three", "two"]})


def test_a_restore_goes_on_when_a_pool_comes_back_whose_chunks_nobody_has_put_back() -> None:
    """For all sessions that there are then; what the database has purged since was not lost."""
    done = Restored(20, 7 << 32, 1000, open=False, unsettled=("two",))
    assert done.resumed(30, {"one"}) is None
    assert replace(done, open=True).resumed(30, {"two"}) is None
    anew = done.resumed(30, {"one", "two"})
    assert anew == Restored(30, 31 << 32, 1000, open=True, unsettled=("two",))
    assert anew.before(30 << 32 | 5)
    assert not anew.lost(30 << 32 | 5)
    assert isinstance(announce(done, anew), Update)
