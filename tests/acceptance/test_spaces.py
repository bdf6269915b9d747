"""A pool of several spaces on a real agent, as operators and other programs see it."""

from contextlib import AsyncExitStack
from typing import Any

import pytest

from drsm_sdk import Drsm, Pod, Pool, PoolEmpty, PoolExhausted
from drsm_sdk.ambient import boottime
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import drsm, shown
from tests.harness import SEEN_SECONDS, Domain, Failed, eventually, requester

SESSION = "session"
SPACES: list[dict[str, Any]] = [
    {"name": "seid", "bits": 64},
    {"name": "ue_ip", "kind": "ipv4", "ranges": ["10.45.0.0/22"], "block_bits": 8},
    {"name": "ue_v6", "kind": "ipv6", "ranges": ["2001:db8::/48"], "prefix": 64},
]
POOL = {"name": SESSION, "usage_lag_ms": 0, "spaces": SPACES}


def drsm_of(domain: Domain, name: str, **options: Any) -> Drsm:
    pod = Pod(name, "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, **options)


async def test_operators_see_each_space(domain: Domain) -> None:
    async with domain.agent(pools=[POOL]), drsm_of(domain, "smf-1") as one:
        pool = await one.join(SESSION)
        ids = await pool.allocate_set()
        listed = await shown(domain, "pools")
        assert "seid: 64 bits + ue_ip: 10.45.0.0/22 + ue_v6: 2001:db8::/48 by /64" in listed.out
        assert " 4  " in listed.out  # as many chunks as the smallest space has
        defined = (await shown(domain, "pools", "show", SESSION)).out
        fields = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in defined.splitlines()}
        assert (fields["seid.bits"], fields["ue_ip.ranges"]) == ("64", "10.45.0.0/22")
        assert fields["ids of a chunk"] == "256"
        chunks = (await shown(domain, "chunks")).out
        assert "0-" in chunks
        assert "10.45.0.0/24" in chunks
        assert "2001:db8::/56" in chunks
        for space, id_ in ids.items():
            found = await shown(domain, "owner", SESSION, str(id_), "--space", space)
            assert "smf-1" in found.out
        unsaid = await drsm(domain, "owner", SESSION, "1")
        assert (unsaid.code, unsaid.err) == (
            2,
            "drsm: pool session: space: expected one of seid, ue_ip, ue_v6, found none\n",
        )


async def test_another_languages_client_asks_for_an_owner_by_space_and_gets_prefixes_in_events(
    domain: Domain,
) -> None:
    """Addresses as text; a wrong question changes nothing and is answered with what was expected."""
    async with (
        requester(domain.nats_url, domain.prefix, SESSION) as asking,
        domain.agent(pools=[POOL]),
        drsm_of(domain, "smf-1") as one,
    ):
        await one.join(SESSION)
        await asking.seen(lambda: asking.of(m.ChunkAllocated))
        (event,) = asking.of(m.ChunkAllocated)[:1]
        assert event.chunks[0] == 0
        assert {name: texts[0] for name, texts in event.prefixes.items()} == {
            "ue_ip": "10.45.0.0/24",
            "ue_v6": "2001:db8::/56",
        }
        subject = asking.subjects.pool(SESSION, "owner")
        questions = [m.OwnerQuery(7, "seid"), m.OwnerQuery("10.45.0.9", "ue_ip")]
        questions.append(m.OwnerQuery("2001:db8:0:9:1::5", "ue_v6"))
        for question in questions:
            answer = await asking.ask(subject, question, m.OwnerAnswer)
            assert answer.chunk == 0
            assert answer.owner is not None
            assert answer.owner.name == "smf-1"
        outside = await asking.ask(subject, m.OwnerQuery("10.99.0.9", "ue_ip"), m.OwnerAnswer)
        assert (outside.chunk, outside.owner) == (None, None)
        beyond = await asking.ask(subject, m.OwnerQuery(4 << 10, "seid"), m.OwnerAnswer)
        assert beyond.chunk is None  # no chunk 4, as there are no addresses for it
        for wrong, says in (
            (m.OwnerQuery(7), "space: expected one of seid, ue_ip, ue_v6, found none"),
            (m.OwnerQuery(7, "ue_ip"), "expected an ipv4 address, found int"),
            (m.OwnerQuery("10.45.0.9", "seid"), "expected an id as int, found str"),
        ):
            with pytest.raises(Failed, match=f"bad_request: pool session: {says}"):
                await asking.ask(subject, wrong, m.OwnerAnswer)


async def test_a_pod_whose_free_ids_are_in_different_chunks_gets_another_chunk(domain: Domain) -> None:
    """There are free ids of each space, but no set: the SDK asks for a chunk although it has a stock. Its
    clock stands still, so that it knows of no pace at which to want more."""
    began = boottime()
    async with domain.agent(pools=[POOL]), drsm_of(domain, "smf-1", clock=lambda: began) as one:
        pool = await one.join(SESSION)
        await eventually(lambda: pool.stats.chunks == 2)  # the first has fewer addresses than a chunk
        for space in ("ue_ip", "seid"):
            chunk = 0 if space == "ue_ip" else 1
            beside = ("ue_v6", pool.definition.parts[2].item(chunk << 8))
            while True:
                try:
                    pool.allocate_nowait(space=space, beside=beside)
                except PoolEmpty:
                    break
        ids = await pool.allocate_set(timeout=SEEN_SECONDS)
        assert pool.definition.chunk_of(ids["seid"], "seid") == 2


async def test_a_pool_is_exhausted_by_the_space_that_has_fewest(domain: Domain) -> None:
    """Every address comes once, each with a SEID of its own."""
    small = {**POOL, "spaces": [SPACES[0], SPACES[1] | {"block_bits": 7}]}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(domain.agent(pools=[small]))
        pods = [await stack.enter_async_context(drsm_of(domain, f"smf-{i}")) for i in (1, 2)]
        sets: list[dict[str, Any]] = []
        for pod in pods:
            pool = await pod.join(SESSION)
            with pytest.raises(PoolExhausted, match="8 of 8 owned"):
                await take_all(pool, sets)
        assert len(sets) == 1024 - 3
        assert len({ids["ue_ip"] for ids in sets}) == len({ids["seid"] for ids in sets}) == len(sets)


async def take_all(pool: Pool, sets: list[dict[str, Any]]) -> None:
    while True:
        sets.append(await pool.allocate_set("ue_ip", "seid", timeout=SEEN_SECONDS))
