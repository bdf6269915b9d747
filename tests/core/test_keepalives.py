"""Which keepalives there shall be, decided on tables: what Go pods are shown of our pods, and when."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from drsm_agent.core import keepalives
from drsm_agent.core.documents import Chunk, Document, Drsm, GoState, Owner, merge
from drsm_agent.core.keepalives import Ends
from drsm_agent.core.table import Hashes, PoolTable, Table
from drsm_agent.core.writes import Insert, Update, mirror_keepalive

NOW = datetime(2030, 1, 1, tzinfo=UTC)
FAR = NOW + timedelta(hours=1)
ENDS = Ends(FAR, FAR.timestamp() - 150)
ME = Owner("amf-1", "10.0.0.7", "nf-1", 7 << 32 | 5)
NEWER = replace(ME, incarnation=ME.incarnation + 1)
GO = Owner("amf-1", "10.0.0.7", "nf-1", 0)
HASHES = Hashes(lambda *_: 0, lambda *_: 0)


def table(*documents: Document) -> PoolTable:
    """A pool with these documents."""
    made = Table(["amfid"], 100, HASHES)
    made.load("amfid", documents)
    return made.pools["amfid"]


def go_keepalive(expire_at: Any = NOW, **drsm: Any) -> Document:
    """A Go pod's, with what the agent wrote beside it."""
    fields = {"podId": GO.name, "podIp": GO.ip, "podInstance": GO.instance, "expireAt": expire_at}
    return {"_id": GO.name, "type": "keepalive"} | fields | ({"drsm": drsm} if drsm else {})


def mirror(owner: Owner = ME, expire_at: Any = FAR) -> Document:
    """As the agent writes it."""
    return mirror_keepalive("amfid", owner, expire_at).document


def go_chunk(n: int = 1) -> Document:
    """A chunk of the Go pod."""
    return Chunk(n, GO.name, GO.ip, GO.instance).document


def result(pool: PoolTable, write: Insert | Update | None) -> PoolTable:
    """The pool after a write, which must match what it was decided on."""
    assert write is not None
    known = pool.keepalives.get(write.key)
    if isinstance(write, Insert):
        assert known is None
        return table(write.document)
    assert known is not None
    document = {"_id": write.key} | known.document
    assert all(document.get(name) == value for name, value in write.where.items())
    return table(merge(document, write.set))


def needed(*documents: Document, owner: Owner = ME) -> Insert | Update | None:
    """What a living pod's keepalive needs, given these documents."""
    return keepalives.for_living(table(*documents), owner, ENDS)


def test_a_pod_without_a_keepalive_gets_its_mirror() -> None:
    assert needed() == mirror_keepalive("amfid", ME, FAR)


def test_the_mirror_of_an_older_incarnation_is_taken_over_and_a_newer_ones_left_alone() -> None:
    """In one update: between a delete and an insert Go pods would claim what names the pod."""
    write = needed(mirror(), owner=NEWER)
    assert result(table(mirror()), write).keepalives["amf-1"].mirrored == NEWER
    pool = table(mirror(NEWER))
    assert result(pool, needed(mirror(NEWER))).keepalives["amf-1"].mirrored == ME  # nobody lives by it
    pool.live[NEWER.key] = NEWER
    assert keepalives.for_living(pool, ME, ENDS) is None


def test_a_mirror_is_prolonged_before_it_ends_and_not_more_often() -> None:
    assert needed(mirror(expire_at=FAR - timedelta(seconds=149))) is None
    write = needed(mirror(expire_at=FAR - timedelta(seconds=151)))
    assert (
        result(table(mirror(expire_at=FAR - timedelta(seconds=151))), write).keepalives["amf-1"].expire_at
        == FAR
    )


@pytest.mark.parametrize(("beside", "down"), [({}, False), ({"silent": NOW}, True), ({"silent": FAR}, False)])
def test_a_go_namesakes_keepalive_becomes_the_mirror_and_says_what_is_known_of_it(
    beside: Document, down: bool
) -> None:
    """Whoever deletes it has Go pods claim the chunks of both: so its end is far, and no `DeletePod` names
    its instance."""
    seen = go_keepalive(**beside)
    after = result(table(seen), needed(seen)).keepalives["amf-1"]
    assert (after.mirrored, after.expire_at) == (ME, FAR)
    assert after.go_state == GoState(GO, down=down)
    assert (after.go_owner is not None) == (not down)
    taken = {"_id": "amf-1"} | after.document
    assert needed(taken, go_chunk()) is None
    renewed = merge(taken, {"podInstance": GO.instance, "expireAt": FAR})
    assert needed(renewed) is not None


def test_an_end_that_is_no_date_is_put_off() -> None:
    """MongoDB never deletes by it; and nothing fails because of it."""
    for odd in (None, "soon", 5, float("nan")):
        assert needed(mirror(expire_at=odd)) is not None
        assert needed(go_keepalive(odd)) is not None


def test_a_session_that_has_only_begun_takes_over_what_a_living_go_pod_left_and_no_more() -> None:
    """It may never live; and an older one of its name may."""
    assert keepalives.for_beginning(table(), ME, ENDS) is None
    assert keepalives.for_beginning(table(mirror(expire_at=NOW)), ME, ENDS) is None
    assert keepalives.for_beginning(table(go_keepalive(silent=NOW)), ME, ENDS) is None
    pool = table(go_keepalive())
    taken = result(pool, keepalives.for_beginning(pool, ME, ENDS))
    assert (taken.keepalives["amf-1"].mirrored, taken.keepalives["amf-1"].expire_at) == (ME, FAR)
    assert keepalives.for_beginning(taken, NEWER, ENDS) is None
    assert keepalives.for_beginning(taken, ME, ENDS) is None
    late = Ends(FAR + timedelta(hours=1), ENDS.least + 3600)
    assert result(taken, keepalives.for_beginning(taken, ME, late)).keepalives["amf-1"].expire_at > FAR


def test_of_a_dead_pod_that_may_still_issue_a_keepalive_is_the_agents_and_does_not_end() -> None:
    """Whoever deletes it has Go pods claim what names it: the TTL monitor, or a `DeletePod` of its Go
    namesake."""
    assert keepalives.for_dead(table(), ME, ENDS) is None
    pool = table(go_keepalive())
    taken = result(pool, keepalives.for_dead(pool, ME, ENDS))
    assert (taken.keepalives["amf-1"].mirrored, taken.keepalives["amf-1"].go_owner) == (ME, GO)
    assert keepalives.for_dead(taken, ME, ENDS) is None
    for shown in (ME, NEWER):
        pool = table(mirror(shown, expire_at=NOW))
        kept = result(pool, keepalives.for_dead(pool, ME, ENDS)).keepalives["amf-1"]
        assert (kept.mirrored, kept.expire_at) == (shown, FAR)


def test_a_pod_is_shown_by_its_own_mirror_alone() -> None:
    """Not by that of its former life: a late delete of it would still match. Nor by a Go pod's: a `DeletePod`
    may name that."""
    shown = [table(mirror()), table(mirror(expire_at=NOW))]
    not_shown = [
        table(),
        table(mirror(NEWER)),
        table(mirror(replace(ME, incarnation=1))),
        table(go_keepalive(FAR)),
        table(go_keepalive(FAR, silent=FAR)),
    ]
    assert [keepalives.shows(pool, ME) for pool in shown + not_shown] == [True] * 2 + [False] * 5


def test_a_mirror_says_no_more_that_a_go_pod_is_down_once_that_has_no_chunks() -> None:
    """The next Go pod of this name is another one, and has chunks before its first keepalive."""
    taken = mirror() | {"drsm": mirror()["drsm"] | {"go": {"ip": GO.ip, "instance": "nf-1", "down": True}}}
    assert needed(taken, go_chunk()) is None
    after = result(table(taken), needed(taken))
    assert not after.keepalives["amf-1"].go_down


def test_a_go_pod_that_writes_under_a_mirrors_name_keeps_it_from_being_deleted() -> None:
    """It allocates up to five seconds before its first keepalive."""
    assert keepalives.go_writes_under(table(mirror(), go_chunk()), "amf-1")
    assert not keepalives.go_writes_under(table(mirror()), "amf-1")
    told = mirror() | {"drsm": mirror()["drsm"] | {"go": {"ip": GO.ip, "instance": "nf-1", "down": True}}}
    assert keepalives.go_writes_under(table(told, go_chunk()), "amf-1")
    assert not keepalives.is_unknown(table(told, go_chunk()), "amf-1")
    assert keepalives.is_unknown(table(mirror(), go_chunk()), "amf-1")
    ours = Chunk(1, "amf-1", "10.0.0.7", "nf-1", Drsm("amf-1", "10.0.0.7", "nf-1", ME.incarnation))
    assert not keepalives.go_writes_under(table(mirror(), ours.document), "amf-1")


@pytest.mark.parametrize("documents", [[], [mirror()]])
def test_a_silent_go_pod_with_chunks_and_no_keepalive_is_said_to_be_down(documents: list[Document]) -> None:
    """By a stand-in, or by a dead namesake's mirror; no Go pod writes either."""
    pool = table(go_chunk(), *documents)
    assert pool.state(GO) == "unknown"
    after = table(go_chunk(), *_documents(result(pool, keepalives.for_silent_go(pool, "amf-1", ENDS))))
    assert after.state(GO) == "down"
    assert [owner.name for _, owner in keepalives.of_nobody(after)] == ["amf-1"]


def _documents(pool: PoolTable) -> list[Document]:
    return [{"_id": key} | keepalive.document for key, keepalive in pool.keepalives.items()]


def test_of_a_living_pod_no_keepalive_is_of_nobody() -> None:
    """Whichever incarnation it shows."""
    pool = table(mirror())
    pool.live[NEWER.key] = NEWER
    assert list(keepalives.of_nobody(pool)) == []


def test_a_silent_go_pods_keepalive_is_overdue_only_when_mongodb_should_have_deleted_it() -> None:
    """The Go pod lives perhaps, and would claim its own chunks."""
    seen, end = table(go_keepalive(NOW, silent=NOW)).keepalives["amf-1"], NOW.timestamp()
    late = keepalives.TTL_MONITOR + keepalives.TTL_LATE
    assert [keepalives.overdue(seen, end + late + by) for by in (-1, 0)] == [False, True]


@pytest.mark.parametrize(("allocation", "lag"), [(300.0, 10.0), (2.6, 2.6), (86_000.0, 86_000.0)])
def test_a_mirror_ends_more_than_a_lease_and_a_lag_ahead_at_any_time(allocation: float, lag: float) -> None:
    """It is put off before less than that is left; and the table is a few seconds behind the database."""
    behind = 10.0
    assert keepalives.ahead(allocation) - allocation / 2 - behind > allocation + lag
