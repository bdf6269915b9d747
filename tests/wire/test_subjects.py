"""Subjects are spelled and read in one place; nothing that a stranger sends is taken for one of them."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.wire.subjects import POOL_VERBS, SESSION_VERBS, Route, Subjects, valid_pool_name

DRSM = Subjects()
PREFIXES = ["drsm", "a.b.c.d", "Lab_1", "x-y.Z"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_subject_is_spelled_as_the_protocol_says(prefix: str) -> None:
    """The subjects as operators type them, under any prefix."""
    subjects = Subjects(prefix)
    assert [
        subjects.all_requests,
        subjects.pools,
        subjects.probe,
        subjects.session("open"),
        subjects.pool("amfid", "acquire"),
        subjects.event("amfid", "chunk.claimed"),
        subjects.events("amfid"),
    ] == [
        f"{prefix}.rpc.>",
        f"{prefix}.rpc.pools",
        f"{prefix}.rpc.agent.probe",
        f"{prefix}.rpc.session.open",
        f"{prefix}.rpc.pool.amfid.acquire",
        f"{prefix}.evt.amfid.chunk.claimed",
        f"{prefix}.evt.amfid.>",
    ]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_request_finds_its_way(prefix: str) -> None:
    """Each subject that is spelled is routed to its own verb."""
    subjects = Subjects(prefix)
    assert [subjects.route(subjects.session(verb)) for verb in SESSION_VERBS] == [
        Route("session.open"),
        Route("session.join"),
        Route("session.renew"),
        Route("session.report"),
        Route("session.chunks"),
        Route("session.close"),
    ]
    assert [subjects.route(subjects.pool("tm-si_2", verb)) for verb in POOL_VERBS] == [
        Route("acquire", "tm-si_2"),
        Route("release", "tm-si_2"),
        Route("scanned", "tm-si_2"),
        Route("snapshot", "tm-si_2"),
        Route("pods", "tm-si_2"),
        Route("owner", "tm-si_2"),
    ]
    assert [subjects.route(subjects.pools), subjects.route(subjects.probe)] == [
        Route("pools"),
        Route("probe"),
    ]


@pytest.mark.parametrize(
    "subject",
    [
        "",
        ".",
        "drsm",
        "drsm.rpc",
        "drsm.rpc.",
        "drsm.rpc.>",
        "drsm.rpc.*",
        "drsm.rpc.session",
        "drsm.rpc.session.",
        "drsm.rpc.session.*",
        "drsm.rpc.session.OPEN",
        "drsm.rpc.session.open ",
        "drsm.rpc.session.open.x",
        "drsm.rpc.session.open\0",
        "drsm.rpc..session.open",
        "drsm.rpc.pool",
        "drsm.rpc.pool.amfid",
        "drsm.rpc.pool.amfid.",
        "drsm.rpc.pool.amfid.steal",
        "drsm.rpc.pool.amfid.acquire.x",
        "drsm.rpc.pool..acquire",
        "drsm.rpc.pool.*.acquire",
        "drsm.rpc.pool.>.acquire",
        "drsm.rpc.pool.a b.acquire",
        "drsm.rpc.pool.amfid\0.acquire",
        "drsm.rpc.pool.amfid\n.acquire",
        "drsm.rpc.pool.drsm_sessions.acquire",
        "drsm.rpc.pool.$cmd.acquire",
        "drsm.rpc.pool.AMFID.acquire",
        "drsm.rpc.pools.x",
        "drsm.rpc.agent",
        "drsm.rpc.agent.stop",
        "drsm.evt.amfid.sync",
        "drsmx.rpc.pools",
        "x.drsm.rpc.pools",
        "DRSM.rpc.pools",
        " drsm.rpc.pools",
    ],
)
def test_any_other_subject_has_no_route(subject: str) -> None:
    """Unknown verbs, wildcards, empty tokens, control characters, foreign prefixes."""
    assert DRSM.route(subject) is None


@given(st.text(max_size=40) | st.text(max_size=30).map(lambda text: f"drsm.rpc.pool.{text}.acquire"))
def test_a_route_is_that_of_a_subject_that_is_spelled_here(subject: str) -> None:
    """Routing any text raises nothing, and what has a route is spelled exactly so."""
    route = DRSM.route(subject)
    if route and route.pool:
        assert DRSM.pool(route.pool, route.verb) == subject


@pytest.mark.parametrize(
    "prefix", ["", ".", "a.", ".a", "a..b", "a.b.c.d.e", "*", ">", "a.>", "a b", "a\0", "a\n", "ä", "$SYS"]
)
def test_other_prefixes_are_refused(prefix: str) -> None:
    """One to four tokens of letters, digits, '_' and '-'."""
    with pytest.raises(ValueError, match=r"^subject prefix must be 1 to 4 dot-separated tokens"):
        Subjects(prefix)


@pytest.mark.parametrize("name", ["a", "0", "amfid", "a_b-c", "a" * 32, "drsm", "drsm-x", "chunkid-1"])
def test_pool_names(name: str) -> None:
    """Lower case letters, digits, '_' and '-', up to 32 of them."""
    assert valid_pool_name(name) is True


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "_a",
        "-a",
        "a" * 33,
        "drsm_",
        "drsm_sessions",
        "a.b",
        "*",
        ">",
        "a b",
        "a\0",
        "a\n",
        "ä",
        "$x",
        "²",
    ],
)
def test_other_pool_names_are_refused_wherever_a_subject_is_spelled(name: str) -> None:
    """A name is a token of a subject and a collection of a database."""
    assert valid_pool_name(name) is False
    spellings: list[Callable[[], str]] = [
        lambda: DRSM.pool(name, "pods"),
        lambda: DRSM.event(name, "sync"),
        lambda: DRSM.events(name),
    ]
    for spell in spellings:
        with pytest.raises(ValueError, match=r"^pool name must match") as refused:
            spell()
        assert str(refused.value).endswith(f"got {name!r}")


def test_a_refused_pool_name_is_not_repeated_at_length() -> None:
    """Error texts go into answers and logs."""
    with pytest.raises(ValueError, match=r"^pool name must match") as refused:
        DRSM.event("x" * 10_000, "sync")
    assert len(str(refused.value)) < 160


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("verb", ["pod.up", "chunk.claimed", "sync", "reset"])
def test_an_events_verb_is_read_from_its_subject(prefix: str, verb: str) -> None:
    """Verbs of one token and of two."""
    subjects = Subjects(prefix)
    assert subjects.event_verb(subjects.event("amfid", verb)) == verb


@pytest.mark.parametrize(
    ("subject", "ours"),
    [
        ("drsm.rpc.pools", True),
        ("drsm.evt.amfid.sync", True),
        ("drsm.rpc", False),
        ("drsm.other.x", False),
        ("drsmx.rpc.pools", False),
        ("x.drsm.rpc.pools", False),
        ("_INBOX.drsm.rpc.x", False),
        ("", False),
    ],
)
def test_a_domains_own_subjects_are_known(subject: str, ours: bool) -> None:
    """Those that it speaks and listens on, and no inbox."""
    assert Subjects().ours(subject) is ours
