"""The request protocol of a leading agent, as a bare NATS client meets it."""

import asyncio
import json

import pytest
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from drsm_agent import endpoints
from drsm_sdk.wire import checksum, codec
from drsm_sdk.wire import messages as m
from tests.harness import POOL, Domain, Failed, renewing


async def test_an_open_session_is_not_up_before_its_first_request(domain: Domain) -> None:
    """A late doubled `open` must harm nobody, so it announces nothing and supersedes nobody."""
    async with domain.served() as asking:
        opened = await asking.open("amf-1")
        assert not asking.of(m.PodUp)
        await asking.renew("amf-1", opened.incarnation)
        up = await asking.seen(lambda: asking.of(m.PodUp))
        assert [event.pod.incarnation for event in up] == [opened.incarnation]


async def test_the_same_request_id_gets_the_same_incarnation_and_the_same_chunks(domain: Domain) -> None:
    """Repeats are harmless, one after another and at the same time."""
    async with domain.served() as asking:
        opened = await asyncio.gather(*[asking.open("amf-1", request_id="r") for _ in range(10)])
        assert len({answer.incarnation for answer in opened}) == 1
        incarnation = opened[0].incarnation
        acquired = await asyncio.gather(*[asking.acquire("amf-1", incarnation, 3) for _ in range(10)])
        acquired.append(await asking.acquire("amf-1", incarnation, 3))
        assert len({frozenset(answer.chunks) for answer in acquired}) == 1
        assert len(acquired[0].chunks) == 3
        assert (await asking.renew("amf-1", incarnation)).held[POOL][0] == 3


async def test_chunks_are_granted_in_ascending_order_and_released_ones_last(domain: Domain) -> None:
    """Never-used numbers first; a released number is not granted again at once."""
    async with domain.served() as asking:
        pod = (await asking.open("amf-1")).incarnation
        first = await asking.acquire("amf-1", pod, 4, "a")
        listed = m.ChunkList("amf-1", pod, first.chunks[:2])
        released = await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        second = await asking.acquire("amf-1", pod, 2, "b")
        assert [n for n, _ in first.chunks] == [0, 1, 2, 3]
        assert released.released == (0, 1)
        assert [n for n, _ in second.chunks] == [4, 5]


async def test_a_release_under_another_grant_changes_nothing(domain: Domain) -> None:
    """A late release must not free what was granted anew; it counts as released."""
    async with domain.served() as asking:
        pod = (await asking.open("amf-1")).incarnation
        (n, grant), *_ = (await asking.acquire("amf-1", pod)).chunks
        listed = m.ChunkList("amf-1", pod, ((n, "0" * 16), (77, grant)))
        released = await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        held = await asking.renew("amf-1", pod)
        assert released.released == (n, 77)
        assert held.held[POOL] == (1, checksum.holding(n, grant, marked=False))


async def test_a_restarted_pod_supersedes_its_old_incarnation(domain: Domain) -> None:
    """The old one is told so, and gets nothing more; the new one is at once served with fresh chunks."""
    async with domain.served() as asking:
        old = (await asking.open("amf-1", request_id="old")).incarnation
        (taken, _), *_ = (await asking.acquire("amf-1", old, request_id="x")).chunks
        new = (await asking.open("amf-1", request_id="new")).incarnation
        (fresh, _), *_ = (await asking.acquire("amf-1", new, request_id="y")).chunks
        assert new > old
        assert fresh != taken
        with pytest.raises(Failed) as lost:
            await asking.renew("amf-1", old)
        assert (lost.value.failure.error, lost.value.failure.reason) == ("session_lost", "superseded")
        down = await asking.seen(lambda: asking.of(m.PodDown))
        assert [(event.pod.incarnation, event.reason) for event in down] == [(old, "superseded")]


async def test_a_restarted_pod_gets_its_old_chunks_back_marked(domain: Domain) -> None:
    """The same name is preferred as claimer, once the old incarnation's liveness lease has run out."""
    async with domain.served() as asking:
        other = (await asking.open("amf-2")).incarnation
        old = (await asking.open("amf-1", request_id="old")).incarnation
        (taken, _), *_ = (await asking.acquire("amf-1", old, request_id="x")).chunks
        new = (await asking.open("amf-1", request_id="new")).incarnation
        async with renewing(asking, ("amf-1", new), ("amf-2", other)):
            (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        assert (claimed.chunks, claimed.owner.incarnation) == ((taken,), new)
        assert claimed.hold_ms == 310_000


async def test_a_closed_session_hands_over_at_once_and_holds_only_for_the_usage_lag(domain: Domain) -> None:
    """After a graceful close the former owner has certainly stopped: only `W` remains."""
    async with domain.served() as asking:
        pod, other = (await asking.open("amf-1")).incarnation, (await asking.open("amf-2")).incarnation
        await asking.acquire("amf-1", pod)
        await asking.renew("amf-2", other)
        closing = m.SessionRef("amf-1", pod)
        for _ in range(2):  # a late second close is accepted and changes nothing
            await asking.ask(asking.subjects.session("close"), closing, m.Empty)
        (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        assert (claimed.owner.name, claimed.hold_ms) == ("amf-2", 10_000)
        with pytest.raises(Failed, match="session_lost"):
            await asking.renew("amf-1", pod)


async def test_a_scan_clears_the_mark_and_a_marked_chunk_cannot_be_given_back(domain: Domain) -> None:
    """Until the new owner knows what is in use, the chunk stays; then it is like any other."""
    async with domain.served() as asking:
        pod, other = (await asking.open("amf-1")).incarnation, (await asking.open("amf-2")).incarnation
        await asking.acquire("amf-1", pod)
        await asking.renew("amf-2", other)
        await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", pod), m.Empty)
        (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        listed = m.ChunkList("amf-2", other, ((claimed.chunks[0], claimed.grants[0]),))
        refused = await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        (page,) = await asking.snapshot()
        cleared = await asking.ask(asking.subjects.pool(POOL, "scanned"), listed, m.Cleared)
        released = await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        assert (refused.released, page.marked) == ((), claimed.chunks)
        assert (cleared.cleared, released.released) == (claimed.chunks, claimed.chunks)
        assert asking.of(m.ChunkScanned)


async def test_session_chunks_lists_what_is_owned_with_its_hold(domain: Domain) -> None:
    """The list that heals a disagreement: grants, and the full hold of marked chunks."""
    async with domain.served() as asking:
        pod, other = (await asking.open("amf-1")).incarnation, (await asking.open("amf-2")).incarnation
        own = (await asking.acquire("amf-2", other)).chunks[0]
        await asking.acquire("amf-1", pod)
        await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", pod), m.Empty)
        (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        ref = m.SessionRef("amf-2", other)
        listed = await asking.ask(asking.subjects.session("chunks"), ref, m.SessionChunks)
        assert set(listed.chunks) == {
            (POOL, *own, None),
            (POOL, claimed.chunks[0], claimed.grants[0], 10_000),
        }
        assert listed.version[POOL] >= asking.events[-1][0].version


async def test_who_has_not_joined_is_told_so_and_may_join(domain: Domain) -> None:
    """`join` is idempotent and announces the pod in the new pool only."""
    pools = [{"name": POOL}, {"name": "tmsi", "bits": 32}]
    async with domain.served(pools=pools) as asking:
        pod = (await asking.open("amf-1", pools=())).incarnation
        with pytest.raises(Failed, match="not_joined"):
            await asking.acquire("amf-1", pod)
        joining = m.Join("amf-1", pod, (POOL,))
        for _ in range(2):
            joined = await asking.ask(asking.subjects.session("join"), joining, m.Joined)
        assert [definition.name for definition in joined.definitions] == [POOL]
        assert (await asking.acquire("amf-1", pod)).chunks
        assert [event.pod.name for event in asking.of(m.PodUp)] == ["amf-1"]


async def test_an_exhausted_pool_says_so_at_once_and_serves_again_after_a_release(domain: Domain) -> None:
    """Exhaustion is an error only when not one chunk could be granted; fewer than asked for is an answer."""
    async with domain.served(pools=[{"name": POOL, "bits": 12}]) as asking:
        pod = (await asking.open("amf-1")).incarnation
        all_of_it = await asking.acquire("amf-1", pod, 256, "a")
        assert len(all_of_it.chunks) == 4
        with pytest.raises(Failed, match="pool_exhausted"):
            await asking.acquire("amf-1", pod, 1, "b")
        listed = m.ChunkList("amf-1", pod, all_of_it.chunks[1:2])
        await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        assert [n for n, _ in (await asking.acquire("amf-1", pod, 2, "c")).chunks] == [1]


async def test_a_large_snapshot_comes_in_pages_of_one_version_that_add_up_to_the_table(
    domain: Domain,
) -> None:
    """Many owners do not fit one message; the last page says so and an empty message follows."""
    async with domain.served() as asking:
        names = [f"amf-{i}.{'x' * 60}.{'y' * 60}.{'z' * 60}" for i in range(2000)]
        opened = await asyncio.gather(*[asking.open(name, request_id=name[:60]) for name in names])
        pods = zip(names, opened, strict=True)
        await asyncio.gather(*[asking.renew(name, answer.incarnation) for name, answer in pods])
        await asking.acquire(names[0], opened[0].incarnation, 256)
        pages = await asking.snapshot()
        assert len(pages) > 1
        assert [page.page for page in pages] == list(range(len(pages)))
        assert {page.version for page in pages} == {pages[0].version}
        assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
        assert [page.definition is not None for page in pages] == [True] + [False] * (len(pages) - 1)
        assert {owner.name for page in pages for owner in page.owners} == set(names)
        assert sorted(n for page in pages for _, ns in page.chunks for n in ns) == list(range(256))


async def test_people_can_ask_in_json(domain: Domain) -> None:
    """`nats req` by hand: the answer is JSON, integers above 2**53 as text."""
    async with domain.served() as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod)
        reply = await asking.client.request(asking.subjects.pool(POOL, "owner"), b'{"id": "5"}')
        answer = json.loads(reply.data)
        assert (answer["chunk"], answer["owner"]["name"], answer["marked"]) == (0, "amf-1", False)
        assert {"agent", "term", "history"} <= answer.keys()
        pages = await asking.client.request(asking.subjects.pool(POOL, "snapshot"), b"{}")
        assert all(isinstance(part, str | int) for part in json.loads(pages.data)["version"])
        assert isinstance(json.loads(pages.data)["version"][0], str)


async def test_events_carry_headers_for_people_and_for_deduplication(domain: Domain) -> None:
    """A readable summary, the content type, and an id for a JetStream stream laid over the events."""
    async with domain.served() as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 3)
        allocated = await asking.seen(lambda: [r for r in asking.raw if "allocated" in r.subject])
        headers = allocated[0].headers or {}
        assert headers["Content-Type"] == "application/msgpack"
        assert headers["Drsm-Summary"].startswith("amfid allocated 3 chunks 0,1,2 to amf-1/")
        assert headers["Nats-Msg-Id"].startswith("amfid.chunk.allocated.")
        syncs = await asking.seen(lambda: [r for r in asking.raw if r.subject.endswith("sync")])
        assert "Nats-Msg-Id" not in (syncs[0].headers or {})


HOSTILE = {
    "not msgpack": b"\xc1\xc1",
    "not a map": codec.encode({"a": 1})[1:],
    "a list": b"\x93\x01\x02\x03",
    "wrong types": codec.encode({"pod": 1, "incarnation": "x", "count": [], "request_id": {}}),
    "negative": codec.encode({"pod": "amf-1", "incarnation": -1, "count": -5, "request_id": "r"}),
    "nested": b"\x91" * 10_000 + b"\xc0",
    "nested json": b'{"a":' * 10_000,
    "numeric keys": b"\x81\x01\x02",
    "empty": b"",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_bodies_get_bad_request_on_every_subject_that_has_fields(
    domain: Domain, body: bytes
) -> None:
    """A typed error, nothing of what was sent in it, and the next good request is served."""
    async with domain.served() as asking:
        subjects = [asking.subjects.session(verb) for verb in ("open", "join", "renew", "chunks", "close")]
        subjects += [asking.subjects.pool(POOL, v) for v in ("acquire", "release", "scanned", "owner")]
        for subject in subjects:
            reply = await asking.client.request(subject, body, timeout=5)
            headers = reply.headers or {}
            assert headers[m.ERROR_CODE_HEADER] == "400", subject
            assert codec.decode(reply.data)["error"] == "bad_request"
            assert len(reply.data) < 600
        assert (await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)).pools[0].chunks == 0


async def test_too_large_unknown_and_unanswerable_requests_do_no_harm(domain: Domain) -> None:
    """More than 64 KiB, unknown pools and verbs, no reply subject: typed errors or silence."""
    async with domain.served() as asking:
        too_large = await asking.client.request(asking.subjects.session("renew"), b"\x00" * 1_000_000)
        unknown = await asking.client.request(asking.subjects.pool("nosuch", "acquire"), b"\x80")
        assert (too_large.headers or {})[m.ERROR_CODE_HEADER] == "413"
        assert (unknown.headers or {})[m.ERROR_CODE_HEADER] == "404"
        for verb in ("acquire.more", "no such".replace(" ", "_"), "snapshot.1"):
            with pytest.raises((NatsTimeout, NoRespondersError)):
                await asking.client.request(
                    f"{asking.subjects.prefix}.rpc.pool.{POOL}.{verb}", b"", timeout=0.2
                )
        for body in HOSTILE.values():
            await asking.client.publish(asking.subjects.session("open"), body)
        await asking.client.publish(asking.subjects.pool(POOL, "snapshot"), b"\x80")
        assert (await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)).pools[0].chunks == 0


async def test_names_that_could_be_other_documents_or_subjects_are_refused(domain: Domain) -> None:
    """A pod must not be able to name a chunk's document, nor to hide wildcards in a name."""
    async with domain.served() as asking:
        for name in ("chunkid-1", "a b", "amf*", "a>", "", "a\x00b", "A", "-a", "x" * 254, "a..b", "a:1"):
            body = {"pod": {"name": name, "ip": "", "instance": ""}, "pools": [], "request_id": "r"}
            reply = await asking.client.request(asking.subjects.session("open"), codec.encode(body))
            assert (reply.headers or {})[m.ERROR_CODE_HEADER] == "400", name


async def test_more_requests_at_once_than_the_bound_are_told_to_come_back(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is done for them, and with `retry`; afterwards they are served."""
    async with domain.served() as asking:
        with monkeypatch.context() as bounded:
            bounded.setattr(endpoints, "IN_FLIGHT_MAX", 0)
            with pytest.raises(Failed) as refused:
                await asking.open("amf-1")
        failure = refused.value.failure
        assert (failure.error, failure.reason, failure.retry) == ("store_unavailable", "overloaded", True)
        assert (await asking.open("amf-1")).incarnation


async def test_a_flood_of_bad_requests_is_answered_and_good_ones_are_served_meanwhile(domain: Domain) -> None:
    """Ten thousand bad requests: none of them holds up a good one for long, or leaves anything."""
    async with domain.served() as asking:
        answers: list[str] = []
        inbox = asking.client.new_inbox()
        done = asyncio.Event()

        async def count(message: object) -> None:
            answers.append("")
            if len(answers) == 10_000:
                done.set()

        await asking.client.subscribe(inbox, cb=count)
        for _ in range(10_000):
            await asking.client.publish(asking.subjects.pool(POOL, "acquire"), b"\xc1", reply=inbox)
        good = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools, timeout=20)
        assert good.pools[0].chunks == 0
        async with asyncio.timeout(30):
            await done.wait()
