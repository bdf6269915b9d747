"""Ids of 64 bits are exact in every place that has them, and a pool as wide costs what is in use."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from drsm_sdk import Demux, Drsm, Pod, Pool, PoolExhausted, changes
from drsm_sdk.nats_transport import NatsTransport
from drsm_sdk.wire import messages as m
from tests.acceptance.test_operator import shown
from tests.acceptance.test_original_list import event
from tests.harness import POOL, SEEN_SECONDS, Domain, eventually, renewing, requester
from tests.integration.test_start import agent_process, opened_once_it_serves

END, CHUNKS, SLOTS = 2**64, 4, 1024
FIRST, LAST = END - CHUNKS * SLOTS, END - 1
TOP: dict[str, Any] = {
    "allocation_ttl": 2.6,
    "liveness_ttl": 2.5,
    "pools": [{"name": POOL, "bits": 64, "slots": SLOTS, "usage_lag_ms": 0, "reserved": [[0, FIRST - 1]]}],
}
MEMORY_MIB = 32.0
"""Between two processes that do the same there is about one; a bit for each chunk would be 2**31 MiB."""


async def test_the_last_ids_of_64_bits_are_issued_routed_claimed_scanned_and_released_exactly(
    domain: Domain,
) -> None:
    """Floats have 53 bits, JSON's readers too, and MongoDB's integers are signed: nothing is in the way."""
    used, scanned = {FIRST, END - 2000, LAST}, []

    def in_use(first: int, last: int) -> set[int]:
        scanned.append((first, last))
        return {id_ for id_ in used if first <= id_ <= last}

    dying = NatsTransport(domain.nats_url)
    async with (
        domain.agent(**TOP),
        requester(domain.nats_url, domain.prefix) as asking,
        Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS) as demux,
        drsm_of(domain, "amf-1", transport=dying) as one,
        drsm_of(domain, "amf-2") as two,
    ):
        ids = await everything(await one.join(POOL))
        assert sorted(ids) == list(range(FIRST, END))
        await eventually(lambda: demux.synced and len(demux.chunks()) == CHUNKS)
        assert {owner.name for id_ in ids if (owner := demux.owner(id_))} == {"amf-1"}
        assert demux.owner(FIRST - 1) is None
        reply = await asking.client.request(asking.subjects.pool(POOL, "owner"), b'{"id": "%d"}' % LAST)
        answer = json.loads(reply.data)
        assert (answer["chunk"], answer["owner"]["name"]) == (str(LAST >> 10), "amf-1")
        said, plain = await asyncio.gather(
            shown(domain, "owner", POOL, str(LAST)), shown(domain, "owner", POOL, hex(LAST), "--json")
        )
        fields = dict(line.split(maxsplit=1) for line in said.out.splitlines())
        assert (int(fields["id"]), int(fields["chunk"])) == (LAST, LAST >> 10)
        assert fields["owner"].strip() == "amf-1"
        assert plain.json["issuable"]
        assert int(plain.json["chunk"]) == LAST >> 10

        pool = await two.join(POOL, in_use=in_use)
        news = pool.changes()
        await dying.close()
        found = [await event(news, changes.Scanned) for _ in range(CHUNKS)]
        assert sorted(scanned) == [(first, first + SLOTS - 1) for first in range(FIRST, END, SLOTS)]
        assert sum(scan.in_use for scan in found) == len(used)
        await eventually(lambda: all(pool.valid(id_) for id_ in used))  # as the lease is short, too
        owner = demux.owner(LAST)
        assert owner is not None
        assert owner.name == "amf-2"
        fresh = await everything(pool)
        assert sorted(fresh) == sorted(set(range(FIRST, END)) - used)
        pool.release(LAST)
        assert not pool.valid(LAST)
        assert await pool.allocate(timeout=SEEN_SECONDS) == LAST


def drsm_of(domain: Domain, name: str, **options: Any) -> Drsm:
    pod = Pod(name, "10.0.0.1", "nf")
    return Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS, **options)


async def everything(pool: Pool) -> list[int]:
    """Every id that the pool still has."""
    ids: list[int] = []
    while True:
        try:
            ids.append(await pool.allocate(timeout=SEEN_SECONDS))
        except PoolExhausted:
            return ids


async def test_an_agent_of_a_pool_of_2_to_the_54_chunks_takes_no_more_memory_than_one_of_a_small_pool(
    domain: Domain,
) -> None:
    """Only what is in use costs: chunks that are granted, claimed, shown and in a snapshot."""
    wide, small = await asyncio.gather(
        memory(replace(domain, prefix=f"{domain.prefix}w", database=f"{domain.database}w"), bits=64),
        memory(replace(domain, prefix=f"{domain.prefix}s", database=f"{domain.database}s"), bits=24),
    )
    assert abs(wide - small) < MEMORY_MIB


async def memory(domain: Domain, *, bits: int) -> float:
    """Resident MiB of an agent that was asked for everything that looks at a whole pool."""
    pools = json.dumps([{"name": POOL, "bits": bits}])
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        agent_process(domain, DRSM_POOLS=pools) as agent,
    ):
        one, two = [(await opened_once_it_serves(asking, f"amf-{i}")).incarnation for i in (1, 2)]
        async with renewing(asking, ("amf-1", one), ("amf-2", two)):
            await asking.acquire("amf-1", one, 100)
            await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", one), m.Empty)
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
            pages = await asking.snapshot()
            assert sum(len(chunks) for page in pages for _, chunks in page.chunks) == 100
            (row,) = [row for row in (await shown(domain, "pools")).rows if row[:1] == [POOL]]
            assert row[3:6] == ["100", str(2 ** (bits - 10)), "0.0%" if bits == 64 else "0.6%"]
            return resident_mib(agent.pid)


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20
