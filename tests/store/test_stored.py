"""Agents of one domain agree on settings and pools: the first stores them, others must have the same."""

import asyncio
from typing import Any

import pytest

from drsm_agent import alone
from drsm_agent.core.documents import Document, Owner
from drsm_agent.core.settings import former_liveness, reconcile
from drsm_agent.core.table import STAMPS
from drsm_agent.core.writes import (
    POSITION,
    SETTINGS,
    Insert,
    LeaderRecord,
    Update,
    allocate,
    first_lead,
    renew_lead,
    save_position,
    touch_stamp,
)
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.ports import Store
from drsm_agent.store import stored
from drsm_agent.store.memory import MemoryStore
from drsm_agent.store.stored import check_current, ensure_stored
from drsm_sdk.wire import codec
from drsm_sdk.wire.definition import Definition
from tests.store.tools import TERM, AnyStore, found, only, stamped

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


def test_an_agent_of_former_settings_gives_the_leases_that_are_stored() -> None:
    """It was left standing by, and leads after an agent that promised the longer `L` of a later revision."""
    stored = SETTING | {"liveness_ms": 10_000, "former_liveness_ms": 3000, "revision": 2}
    assert former_liveness([stored, POOL]) == 10.0


@pytest.mark.parametrize("name", ["settings", "restored"])
def test_a_pool_may_be_called_as_another_document_of_the_settings(name: str) -> None:
    """Only what is stored of the pool itself says something of it."""
    others: list[Document] = [SETTING | {"revision": 9}, {"_id": "restored", "term": 3}, POOL]
    check_current(others, {name: Definition(name=name)})


def test_an_agent_whose_pool_was_moved_meanwhile_does_not_lead() -> None:
    with pytest.raises(
        Misconfigured, match=r"pool:amfid: expected revision 1 .* found 2, which moves chunks"
    ):
        check_current(
            [_pool(revision=2, block_bits=8, slots=200)], {"amfid": Definition(name="amfid", bits=24)}
        )


class Elsewhere(MemoryStore):
    """A store that says in which other database a pool has chunks."""

    chunks_in = ""

    async def has_chunks(self, space: str, database: str | None = None) -> bool:
        return database == self.chunks_in


async def test_a_pool_changes_its_database_only_while_it_has_no_chunks_there() -> None:
    """Whoever finds that the Go fleet is elsewhere follows it; chunks that were granted would be lost."""
    store = Elsewhere(["amfid"])
    await ensure_stored(store, [_pool(database="sdcore")])
    moved = _pool(revision=2, database="other")
    store.chunks_in = "sdcore"
    with pytest.raises(Misconfigured, match="chunks in database sdcore"):
        await ensure_stored(store, [moved])
    store.chunks_in = ""
    with pytest.raises(Misconfigured, match="a change needs a revision above 1"):
        await ensure_stored(store, [_pool(database="other")])
    await ensure_stored(store, [moved])
    assert {d["_id"]: d["database"] for d in await store.read(SETTINGS)} == {"pool:amfid": "other"}


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
        await ensure_stored(store, [SETTING | {"leader_ms": 9000}, _pool(bits=23)])
    text = str(caught.value)
    assert "settings: a change needs a revision above 1" in text
    assert "'leader_ms': 3000" in text
    assert "'leader_ms': 9000" in text
    assert "pool:amfid: a change needs a revision above 1" in text
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


UES: Document = {
    "_id": "pool:amfid",
    "name": "amfid",
    "kind": "ipv4",
    "ranges": ["10.45.0.0/16", "10.60.0.0/24"],
    "revision": 1,
}


async def test_a_pool_that_an_older_agent_stored_with_fewer_fields_is_the_same(store: AnyStore) -> None:
    """An upgrade alone needs no higher revision."""
    await ensure_stored(store, [SETTING, UES])
    definition = Definition(name="amfid", kind="ipv4", ranges=tuple(UES["ranges"]))
    await ensure_stored(store, [SETTING, {"_id": "pool:amfid"} | codec.to_map(definition)])
    assert await found(store, SETTINGS, "pool:amfid") == UES


async def owning(store: AnyStore, *numbers: int) -> None:
    owner = Owner("amf-1", "10.0.0.7", "nf-1", 5)
    await store.write([allocate("amfid", n, owner, f"{n:016x}", "r") for n in numbers])


@pytest.mark.parametrize(
    "ranges",
    [
        ["10.45.0.0/16", "10.60.0.0/24", "10.61.0.0/24"],
        ["10.45.0.0/16", "10.60.0.0/23"],
        ["10.45.0.0/17", "10.45.128.0/17", "10.60.0.0/24"],
    ],
)
async def test_a_pool_of_addresses_grows_by_whatever_leaves_its_chunks_where_they_are(
    store: AnyStore, ranges: list[str]
) -> None:
    """Another range, a longer last one, one range written as two."""
    await ensure_stored(store, [SETTING, UES])
    await owning(store, 0, 255, 256)
    await ensure_stored(store, [SETTING, UES | {"ranges": ranges, "revision": 2}])
    document = await found(store, SETTINGS, "pool:amfid")
    assert document
    assert document["ranges"] == ranges


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ranges": ["10.45.0.0/16"]}, "chunk 256 of amf-1"),
        ({"ranges": ["10.44.0.0/16", "10.60.0.0/24"]}, "chunk 0 of amf-1, chunk 255 of amf-1"),
        ({"ranges": ["10.44.0.0/15"]}, "chunk 0 of amf-1, chunk 255 of amf-1, chunk 256 of amf-1"),
        ({"block_bits": 7}, "chunk 0 of amf-1, chunk 255 of amf-1, chunk 256 of amf-1"),
        ({"kind": "integer", "ranges": []}, "chunk 0 of amf-1, chunk 255 of amf-1, chunk 256 of amf-1"),
    ],
)
async def test_what_would_not_stay_where_it_is_stands_in_the_way_of_a_change(
    store: AnyStore, change: Document, named: str
) -> None:
    """All of it is named, and nothing is changed."""
    await ensure_stored(store, [SETTING, UES])
    await owning(store, 0, 255, 256)
    with pytest.raises(Misconfigured, match=f"would not stay where they are: {named}; have them given back"):
        await ensure_stored(store, [SETTING, UES | {"revision": 2} | change])
    assert await found(store, SETTINGS, "pool:amfid") == UES


async def test_a_pool_shrinks_to_what_is_owned_while_no_agent_leads(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader would go on granting what is to go."""
    await ensure_stored(store, [SETTING, UES])
    await owning(store, 3)
    smaller = UES | {"ranges": ["10.45.0.0/16"], "revision": 2}
    led = LeaderRecord("agent-1", 1, 0, 300)
    await only(store, first_lead(led))
    look = alone._leader

    async def look_before_it_is_renewed(store: Store) -> LeaderRecord | None:
        seen = await look(store)
        await store.write([renew_lead(led)])
        return seen

    with monkeypatch.context() as led_by_another:
        led_by_another.setattr(alone, "_leader", look_before_it_is_renewed)
        with pytest.raises(Misconfigured, match="agent-1 leads: stop them all"):
            await ensure_stored(store, [SETTING, smaller])
    assert await found(store, SETTINGS, "pool:amfid") == UES
    await ensure_stored(store, [SETTING, smaller])
    assert await found(store, SETTINGS, "pool:amfid") == smaller


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
    assert await found(store, STAMPS, "stamp") == stamped(1)


async def test_endless_changes_by_others_end_the_attempt(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded, as everything."""
    monkeypatch.setattr(stored, "ATTEMPTS", 0)
    with pytest.raises(StoreUnavailable, match="start only one revision"):
        await ensure_stored(store, [SETTING])


async def test_what_the_old_leader_granted_last_stands_in_the_way_too(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died right after the look at what is owned."""
    await ensure_stored(store, [SETTING, UES])

    async def meanwhile(looked: AnyStore) -> None:
        await owning(looked, 256)

    monkeypatch.setattr(stored, "see_nobody_lead", meanwhile)
    with pytest.raises(Misconfigured, match="chunk 256 of amf-1; have them given back"):
        await ensure_stored(store, [SETTING, UES | {"ranges": ["10.45.0.0/16"], "revision": 2}])
