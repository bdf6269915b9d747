"""The request protocol of a leading agent, as a bare NATS client meets it."""

import asyncio
import json

import pytest
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from drsm_agent.core import lease
from drsm_sdk import Drsm, Pod
from drsm_sdk.wire import checksum
from drsm_sdk.wire import messages as m
from tests.harness import (
    ONE_LEAD,
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Failed,
    Requester,
    eventually,
    renewing,
    requester,
)


async def test_an_open_session_is_not_up_before_its_first_request(domain: Domain) -> None:
    """A late doubled `open` must harm nobody, so it announces nothing and supersedes nobody."""
    async with domain.served(**UNHURRIED) as asking:
        opened = await asking.open("amf-1")
        assert not asking.of(m.PodUp)
        await asking.renew("amf-1", opened.incarnation)
        up = await asking.seen(lambda: asking.of(m.PodUp))
        assert [event.pod.incarnation for event in up] == [opened.incarnation]


async def test_the_same_request_id_gets_the_same_incarnation_and_the_same_chunks(domain: Domain) -> None:
    """Repeats are harmless, one after another and at the same time."""
    async with domain.served(**UNHURRIED) as asking:
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
    async with domain.served(**UNHURRIED) as asking:
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
    async with domain.served(**UNHURRIED) as asking:
        pod = (await asking.open("amf-1")).incarnation
        (n, grant), *_ = (await asking.acquire("amf-1", pod)).chunks
        listed = m.ChunkList("amf-1", pod, ((n, "0" * 16), (77, grant)))
        released = await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
        held = await asking.renew("amf-1", pod)
        assert released.released == (n, 77)
        assert held.held[POOL] == (1, checksum.holding(n, grant, marked=False))


async def test_a_restarted_pod_supersedes_its_old_incarnation(domain: Domain) -> None:
    """The old one is told so, and gets nothing more; the new one is at once served with fresh chunks."""
    async with domain.served(**UNHURRIED) as asking:
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


async def test_whoever_lost_its_session_is_told_how_by_every_request_but_close(domain: Domain) -> None:
    """The SDK tells the application, and backs off longer when superseded. A late close is accepted."""
    async with domain.served(leader_ttl=20.0) as asking:
        subjects, lost = asking.subjects, dict[str, tuple[str, int]]()
        # One after the other, and the one that is to expire first: none of the others may come to that.
        for reason in ("expired", "closed", "superseded"):
            lost[reason] = f"amf-{reason}", await activated(asking, f"amf-{reason}", "first")
            if reason == "closed":
                await asking.ask(subjects.session("close"), m.SessionRef(*lost[reason]), m.Empty)
        await activated(asking, "amf-superseded", "second")
        over = {(*who, reason) for reason, who in lost.items()}
        await asking.seen(lambda: over <= {(*_key(down), down.reason) for down in asking.of(m.PodDown)})
        lost["unknown"] = "amf-unknown", lost["closed"][1] ^ 1 << 31  # no term has so many
        for reason, who in lost.items():
            requests: dict[str, object] = {
                subjects.session("join"): m.Join(*who, (POOL,)),
                subjects.session("renew"): m.Renew(*who),
                subjects.session("report"): m.Report(*who, (), total=0),
                subjects.session("chunks"): m.SessionRef(*who),
                subjects.pool(POOL, "acquire"): m.Acquire(*who, 1, "r"),
                subjects.pool(POOL, "release"): m.ChunkList(*who, ()),
                subjects.pool(POOL, "scanned"): m.ChunkList(*who, ()),
            }
            for subject, request in requests.items():
                with pytest.raises(Failed) as failed:
                    await asking.ask(subject, request, m.Empty)
                failure = failed.value.failure
                assert (failure.error, failure.reason) == ("session_lost", reason), subject
            await asking.ask(subjects.session("close"), m.SessionRef(*who), m.Empty)


def _key(down: m.PodDown) -> tuple[str, int]:
    return down.pod.name, down.pod.incarnation


async def activated(asking: Requester, name: str, request_id: str) -> int:
    """The incarnation of a session that has sent its first request."""
    opened = await asking.open(name, request_id=request_id)
    await asking.renew(name, opened.incarnation)
    return opened.incarnation


async def test_a_restarted_pod_gets_its_old_chunks_back_marked(domain: Domain) -> None:
    """The same name is preferred as claimer, once the old incarnation's liveness lease has run out."""
    async with domain.served(leader_ttl=20.0) as asking:
        old = (await asking.open("amf-1", request_id="old")).incarnation
        (taken, _), *_ = (await asking.acquire("amf-1", old, request_id="x")).chunks
        new = (await asking.open("amf-1", request_id="new")).incarnation
        other = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-1", new), ("amf-2", other)):
            (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        assert (claimed.chunks, claimed.owner.incarnation) == ((taken,), new)
        assert claimed.hold_ms == 310_050


async def test_a_closed_session_hands_over_at_once_and_holds_only_for_the_usage_lag(domain: Domain) -> None:
    """After a graceful close the former owner has certainly stopped: only `W` remains."""
    async with domain.served(**UNHURRIED) as asking:
        pod, other = (await asking.open("amf-1")).incarnation, (await asking.open("amf-2")).incarnation
        await asking.acquire("amf-1", pod)
        await asking.renew("amf-2", other)
        closing = m.SessionRef("amf-1", pod)
        for _ in range(2):  # a late second close is accepted and changes nothing
            await asking.ask(asking.subjects.session("close"), closing, m.Empty)
        (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        assert (claimed.owner.name, claimed.hold_ms) == ("amf-2", 10_050)
        with pytest.raises(Failed, match="session_lost"):
            await asking.renew("amf-1", pod)


async def test_a_scan_clears_the_mark_and_a_marked_chunk_cannot_be_given_back(domain: Domain) -> None:
    """Until the new owner knows what is in use, the chunk stays; then it is like any other."""
    async with domain.served(**UNHURRIED) as asking:
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
    async with domain.served(**UNHURRIED) as asking:
        pod, other = (await asking.open("amf-1")).incarnation, (await asking.open("amf-2")).incarnation
        own = (await asking.acquire("amf-2", other)).chunks[0]
        await asking.acquire("amf-1", pod)
        await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", pod), m.Empty)
        (claimed,) = await asking.seen(lambda: asking.of(m.ChunkClaimed))
        ref = m.SessionRef("amf-2", other)
        listed = await asking.ask(asking.subjects.session("chunks"), ref, m.SessionChunks)
        assert set(listed.chunks) == {
            (POOL, *own, None),
            (POOL, claimed.chunks[0], claimed.grants[0], 10_050),
        }
        assert listed.version[POOL] >= asking.events[-1][0].version


async def test_who_has_not_joined_is_told_so_and_may_join(domain: Domain) -> None:
    """`join` is idempotent and announces the pod in the new pool only."""
    pools = [{"name": POOL}, {"name": "tmsi", "bits": 32}]
    async with domain.served(**UNHURRIED, pools=pools) as asking:
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
    async with domain.served(**UNHURRIED, pools=[{"name": POOL, "bits": 12}]) as asking:
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
    """Many owners do not fit one message; the last page says so and the end follows."""
    async with domain.served(**UNHURRIED) as asking:
        names = [f"amf-{i}.{'x' * 60}.{'y' * 60}.{'z' * 60}" for i in range(2000)]
        opened = await asyncio.gather(
            *[asking.open(name, request_id=name[:60], timeout=SEEN_SECONDS) for name in names]
        )
        pods = zip(names, opened, strict=True)
        await asyncio.gather(
            *[asking.renew(name, answer.incarnation, timeout=SEEN_SECONDS) for name, answer in pods]
        )
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
    async with domain.served(**UNHURRIED) as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod)
        owner, snapshot = (asking.subjects.pool(POOL, verb) for verb in ("owner", "snapshot"))
        reply = await asking.client.request(owner, b'{"id": "5"}', timeout=SEEN_SECONDS)
        answer = json.loads(reply.data)
        assert (answer["chunk"], answer["owner"]["name"], answer["marked"]) == (0, "amf-1", False)
        assert {"agent", "term", "history"} <= answer.keys()
        pages = await asking.client.request(snapshot, b"{}", timeout=SEEN_SECONDS)
        assert all(isinstance(part, str | int) for part in json.loads(pages.data)["version"])
        assert isinstance(json.loads(pages.data)["version"][0], str)


async def test_events_carry_headers_for_people_and_for_deduplication(domain: Domain) -> None:
    """A readable summary, the content type, and an id for a JetStream stream laid over the events."""
    async with domain.served(**UNHURRIED) as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 3)
        allocated = await asking.seen(lambda: [r for r in asking.raw if "allocated" in r.subject])
        headers = allocated[0].headers or {}
        assert headers["Content-Type"] == "application/msgpack"
        assert headers["Drsm-Summary"].startswith("amfid allocated 3 chunks 0,1,2 to amf-1:")
        assert headers["Nats-Msg-Id"].startswith("amfid.chunk.allocated.")
        syncs = await asking.seen(lambda: [r for r in asking.raw if r.subject.endswith("sync")])
        assert "Nats-Msg-Id" not in (syncs[0].headers or {})


async def test_what_a_pod_says_of_a_pool_that_was_removed_is_left_aside(domain: Domain) -> None:
    """The pod goes on in the others."""
    both = [{"name": POOL}, {"name": "gone"}]
    use = {POOL: m.Use(5, 6), "gone": m.Use(7, 8)}
    async with requester(domain.nats_url, domain.prefix) as asking:
        async with domain.agent(**UNHURRIED, pools=both):
            pod = (await asking.open("amf-1", pools=(POOL, "gone"))).incarnation
            request = m.Renew("amf-1", pod, {}, use)
            assert set((await asking.ask(asking.subjects.session("renew"), request, m.Renewed)).held) == {
                POOL,
                "gone",
            }
        async with domain.agent(**UNHURRIED, pools=both[:1], settings_revision=2):
            for _ in range(2):
                renewed = await asking.ask(asking.subjects.session("renew"), request, m.Renewed)
                assert set(renewed.held) == {POOL}
            answer = await asking.ask(asking.subjects.pool(POOL, "pods"), m.Empty(), m.Pods)
            assert answer.pods[0].use == use[POOL]


async def test_the_more_pods_there_are_the_less_often_each_of_them_renews(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3: the agent says how often, here each 0.5 s of one pod and 1 s of three, with an `L` of five times
    that; the SDK follows, both ways."""
    monkeypatch.setattr(lease, "RENEWALS_PER_SECOND", 3)
    renewed_at: list[float] = []

    async def note(_: Msg) -> None:
        renewed_at.append(asyncio.get_running_loop().time())

    def waited(least: float, most: float) -> bool:
        """Whether there was such a while between the last two renewals."""
        return len(renewed_at) > 1 and least < renewed_at[-1] - renewed_at[-2] < most

    identity = Pod("amf-1", "10.0.0.1", "nf")
    async with (
        domain.served(leader_ttl=20.0) as asking,
        Drsm.connect(domain.nats_url, identity, prefix=domain.prefix),
    ):
        await asking.client.subscribe(asking.subjects.session("renew"), cb=note)
        await eventually(lambda: waited(0.0, 0.75))
        opened = {name: await asking.open(name) for name in ("amf-2", "amf-3")}
        assert [answer.renew_ms for answer in opened.values()] == [666, 1000]
        assert opened["amf-3"].liveness_ms > 4 * 1000
        await eventually(lambda: waited(0.75, SEEN_SECONDS))
        for name, answer in opened.items():
            closing = m.SessionRef(name, answer.incarnation)
            await asking.ask(asking.subjects.session("close"), closing, m.Empty)
        await eventually(lambda: waited(0.0, 0.75))


async def test_a_pod_that_dies_again_and_again_does_not_drain_a_small_pool(domain: Domain) -> None:
    """Each life leaves a chunk, which nobody may claim at once, and which is on hold then. With more than two
    of them the pod gets no fresh one, before that and after, and hears for how long; others do."""
    pools = [{"name": POOL, "bits": 14}]  # 16 chunks
    with capture_logs() as logs:
        async with domain.served(**ONE_LEAD, liveness_ttl=5.0, pools=pools) as asking:
            for life in range(3):
                opened = await asking.open("amf-1", request_id=f"life-{life}")
                assert (await asking.acquire("amf-1", opened.incarnation, 1, f"r-{life}")).chunks
            opened = await asking.open("amf-1", request_id="the last life")
            async with renewing(asking, ("amf-1", opened.incarnation)):
                refused = await _refused(asking, opened.incarnation)
                assert (refused.error, refused.reason) == ("pool_exhausted", "former_lives")
                assert refused.wait_ms == 315_000
                await asking.seen(lambda: sum(len(c.chunks) for c in asking.of(m.ChunkClaimed)) == 3)
                refused = await _refused(asking, opened.incarnation)
                assert (refused.reason, 300_000 < refused.wait_ms < 315_000) == ("former_lives", True)
                other = await asking.open("amf-2")
                assert len((await asking.acquire("amf-2", other.incarnation, 4)).chunks) == 4
    told = [log for log in logs if log["event"] == "pod_crash_loops"]
    assert [(log["pod"], log["chunks"]) for log in told] == [("amf-1", 3)]


async def _refused(asking: Requester, incarnation: int) -> m.Failure:
    """Why the pod gets no chunk."""
    with pytest.raises(Failed) as caught:
        await asking.acquire("amf-1", incarnation, 1, "one more")
    return caught.value.failure
