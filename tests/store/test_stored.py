"""Agents of one domain agree on settings and pools: the first stores them, others must have the same."""

import asyncio
from typing import Any

import pytest

from drsm_agent.core.documents import Document
from drsm_agent.core.settings import former_liveness, reconcile
from drsm_agent.core.table import STAMPS
from drsm_agent.core.writes import POSITION, SETTINGS, Insert, Update, save_position, touch_stamp
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.store import stored
from drsm_agent.store.stored import ensure_stored
from tests.store.tools import TERM, AnyStore, found, only

SETTING: Document = {
    "_id": "settings",
    "allocation_ms": 300_000,
    "liveness_ms": 3000,
    "leader_ms": 3000,
    "revision": 1,
}
POOL: Document = {
    "_id": "pool:amfid",
    "name": "amfid",
    "kind": "integer",
    "bits": 24,
    "block_bits": 10,
    "slots": 1000,
    "reserved": ((5, 9),),
    "revision": 1,
}


def _pool(**changes: Any) -> Document:
    return POOL | changes


# --- The rule -----------------------------------------------------------------------------------------


def test_what_is_not_stored_yet_is_inserted() -> None:
    """The first agent decides."""
    assert reconcile(None, SETTING) == Insert(SETTINGS, SETTING)


def test_what_is_stored_already_is_left() -> None:
    """Also when the database gave tuples back as lists, or None for what is absent."""
    assert reconcile(_pool(reserved=[[5, 9]], database=None), POOL) is None


def test_a_change_needs_a_higher_revision() -> None:
    """And the message shows both."""
    with pytest.raises(ValueError, match="revision above 1") as caught:
        reconcile(SETTING, SETTING | {"allocation_ms": 60_000})
    assert "{'allocation_ms': 300000}" in str(caught.value)
    assert "{'allocation_ms': 60000}" in str(caught.value)


def test_an_agent_with_an_older_revision_does_not_start() -> None:
    """It was left behind."""
    with pytest.raises(ValueError, match="revision above 2"):
        reconcile(SETTING | {"revision": 2}, SETTING)


def test_a_higher_revision_replaces_exactly_the_one_that_was_seen() -> None:
    """Guarded, so that two changes at once cannot both win. The `L` before it is kept, as pods may still
    count on it, and is no setting to compare."""
    new = SETTING | {"allocation_ms": 60_000, "revision": 2}
    stored = new | {"former_liveness_ms": SETTING["liveness_ms"]}
    assert reconcile(SETTING, new) == Update(SETTINGS, {"_id": "settings", "revision": 1}, set=stored)
    assert reconcile(stored, new) is None
    assert former_liveness([stored]) == SETTING["liveness_ms"] / 1000


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"bits": 23}, "bits can only grow"),
        ({"slots": 999}, "slots can only grow"),
        ({"block_bits": 11}, "block_bits cannot change"),
        ({"kind": "ipv4"}, "kind cannot change"),
        ({"database": "other"}, "database cannot change"),
    ],
)
def test_a_pool_never_changes_where_its_ids_lie(change: Document, fault: str) -> None:
    """Not with any revision."""
    with pytest.raises(ValueError, match=fault):
        reconcile(POOL, _pool(revision=9, **change))


@pytest.mark.parametrize("change", [{"bits": 32}, {"slots": 1024}, {"reserved": ()}, {}])
def test_a_pool_may_grow(change: Document) -> None:
    """With a higher revision."""
    assert isinstance(reconcile(POOL, _pool(revision=2, **change)), Update)


def test_a_field_that_is_not_configured_any_more_is_cleared() -> None:
    """Otherwise the next start would find a difference."""
    write = reconcile(_pool(order="random"), _pool(revision=2))
    assert isinstance(write, Update)
    assert write.set["order"] is None


# --- With a store ---------------------------------------------------------------------------------------


async def test_the_first_agent_stores_and_the_next_agrees(store: AnyStore) -> None:
    """Any number of starts with the same."""
    for _ in range(3):
        await ensure_stored(store, [SETTING, POOL])
    documents = {document["_id"]: document for document in await store.read(SETTINGS)}
    assert documents == {"settings": SETTING, "pool:amfid": _pool(reserved=[[5, 9]])}


async def test_an_agent_with_other_settings_is_refused_with_all_differences(store: AnyStore) -> None:
    """One message for everything, and nothing is changed."""
    await ensure_stored(store, [SETTING, POOL])
    with pytest.raises(Misconfigured) as caught:
        await ensure_stored(store, [SETTING | {"leader_ms": 9000}, _pool(bits=23, revision=2)])
    text = str(caught.value)
    assert "settings: a change needs a revision above 1" in text
    assert "'leader_ms': 3000" in text
    assert "'leader_ms': 9000" in text
    assert "pool:amfid: bits can only grow" in text
    assert await found(store, SETTINGS, "settings") == SETTING


async def test_a_higher_revision_is_stored(store: AnyStore) -> None:
    """From then on the old one is refused."""
    await ensure_stored(store, [SETTING, _pool(order="random")])
    await ensure_stored(store, [SETTING, _pool(bits=32, revision=2)])
    document = await found(store, SETTINGS, "pool:amfid")
    assert document
    assert (document["bits"], document["revision"], document["order"]) == (32, 2, None)
    await ensure_stored(store, [SETTING, _pool(bits=32, revision=2)])
    with pytest.raises(Misconfigured):
        await ensure_stored(store, [SETTING, POOL])


async def test_agents_that_start_together_agree(store: AnyStore) -> None:
    """Whoever comes second finds what the first stored."""
    await asyncio.gather(*(ensure_stored(store, [SETTING, POOL]) for _ in range(8)))
    assert len(await store.read(SETTINGS)) == 2


async def test_of_two_different_agents_that_start_together_one_is_refused(store: AnyStore) -> None:
    """Never both, and what is stored is the other's."""
    rivals = [SETTING | {"allocation_ms": 1000 * n} for n in (60, 90)]
    outcomes = await asyncio.gather(
        *(ensure_stored(store, [rival]) for rival in rivals), return_exceptions=True
    )
    refused = [isinstance(outcome, Misconfigured) for outcome in outcomes]
    assert sorted(refused) == [False, True]
    assert await found(store, SETTINGS, "settings") == rivals[refused.index(False)]


async def test_the_documents_that_are_there_from_the_start(store: AnyStore) -> None:
    """The guards of position and stamp need something to match; a start resets neither."""
    await ensure_stored(store, [SETTING])
    assert await only(store, save_position(TERM, {"token": "t"})) == 1
    assert await only(store, touch_stamp(TERM, "agent")) == 1
    await ensure_stored(store, [SETTING])
    position = {"_id": "position", "term": TERM, "token": "t", "saves": 1}
    assert await found(store, POSITION, "position") == position
    assert await found(store, STAMPS, "stamp") == {"_id": "stamp", "term": TERM, "n": 1, "agent": "agent"}


async def test_endless_changes_by_others_end_the_attempt(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded, as everything."""
    monkeypatch.setattr(stored, "ATTEMPTS", 0)
    with pytest.raises(StoreUnavailable, match="start only one revision"):
        await ensure_stored(store, [SETTING])
