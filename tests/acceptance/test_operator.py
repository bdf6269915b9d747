"""The operator's commands, each as a process: output, exit code, what it says when something is missing."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drsm_sdk import Demux, Drsm, Pod
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.codec import encode
from tests.harness import (
    NONE_EXPIRES,
    ONE_LEAD,
    POOL,
    PROCESS_SECONDS,
    SEEN_SECONDS,
    Domain,
    Requester,
    eventually,
    mongo_table,
    renewing,
    requester,
    within,
)
from tests.sdk.fake_agent import SkippingClock

DRSM = Path(sys.executable).with_name("drsm")
NOTHING: Mapping[str, str] = {}


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """The cells of each line below the table's head."""
        return [line.split() for line in self.out.splitlines()[1:]]


async def start(
    domain: Domain, *arguments: str, changed: Mapping[str, str] = NOTHING
) -> asyncio.subprocess.Process:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DRSM_")}
    return await asyncio.create_subprocess_exec(
        DRSM,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean | domain.environment | dict(changed),
    )


async def ended(process: asyncio.subprocess.Process, data: bytes = b"") -> Ended:
    out, err = await within(process.communicate(data), PROCESS_SECONDS)
    return Ended(process.returncode, out.decode(), err.decode())


async def drsm(
    domain: Domain, *arguments: str, data: bytes = b"", changed: Mapping[str, str] = NOTHING
) -> Ended:
    """Run a command to its end."""
    return await ended(await start(domain, *arguments, changed=changed), data)


async def shown(domain: Domain, *arguments: str) -> Ended:
    """Run a command that must succeed without a word on standard error."""
    result = await drsm(domain, *arguments)
    assert (result.code, result.err) == (0, ""), arguments
    return result


@asynccontextmanager
async def populated(domain: Domain) -> AsyncIterator[tuple[Requester, int, int]]:
    """A domain in which amf-1 owns chunks 0-2 and amf-2 owns chunk 3, in its first lead."""
    async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:
        one = (await asking.open("amf-1")).incarnation
        two = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-1", one), ("amf-2", two)):
            await asking.acquire("amf-1", one, 3, "r1")
            await asking.acquire("amf-2", two, 1, "r2")
            yield asking, one, two


async def test_pools_shows_how_full_each_is_and_who_leads(domain: Domain) -> None:
    async with populated(domain):
        text, plain = await asyncio.gather(shown(domain, "pools"), shown(domain, "pools", "--json"))
    assert text.out.splitlines()[0].split() == [
        "POOL",
        "IDS",
        "CHUNKS",
        "CAPACITY",
        "USED",
        "PODS",
        "ORPHANS",
        "MARKED",
    ]
    assert text.rows[0] == [POOL, "24", "bits", "4", "16384", "0.0%", "2", "0", "0"]
    assert "led by " in text.out
    assert "(term 1) for " in text.out
    assert plain.json["pools"][0]["definition"]["name"] == POOL
    assert plain.json["leader"]["term"] == 1


async def test_pools_show_has_the_whole_definition(domain: Domain) -> None:
    async with populated(domain):
        text, plain, unknown = await asyncio.gather(
            shown(domain, "pools", "show", POOL),
            shown(domain, "pools", "show", POOL, "--json"),
            drsm(domain, "pools", "show", "nosuch"),
        )
    fields = dict(line.split(maxsplit=1) for line in text.out.splitlines())
    assert fields["usage_lag_ms"].strip() == "10000"
    assert fields["chunks"].strip() == "4 of 16384 owned"
    assert plain.json["definition"]["slots"] == 1000
    assert unknown.code == 2
    assert unknown.err == f"drsm: expected one of the pools {POOL}; found no pool nosuch\n"


async def test_pods_shows_what_they_own_and_what_they_say_of_their_stock(domain: Domain) -> None:
    """One id is a minute and a half old by the pod's clock, one is new, one was released."""
    clock = SkippingClock()
    async with (
        domain.agent(),
        Drsm.connect(
            domain.nats_url,
            Pod("amf-1", "10.0.0.1", "i"),
            prefix=domain.prefix,
            timeout=SEEN_SECONDS,
            clock=clock,
        ) as pod,
    ):
        pool = await pod.join(POOL)
        pool.allocate_nowait()
        clock.skipped += 90.0
        await eventually(lambda: pod.state == "live")
        pool.allocate_nowait()
        pool.release(pool.allocate_nowait())
        async with requester(domain.nats_url, domain.prefix) as asking:

            async def heard() -> m.Use:
                (pod,) = (await asking.ask(asking.subjects.pool(POOL, "pods"), m.Empty(), m.Pods)).pods
                assert pod.use is not None
                return pod.use

            async with asyncio.timeout(SEEN_SECONDS):
                while ((use := await heard()).issued, use.released) != (2, 1):
                    await asyncio.sleep(0.05)
        text, plain = await asyncio.gather(shown(domain, "pods"), shown(domain, "pods", POOL, "--json"))
    header, line = [re.split(r"\s\s+", line) for line in text.out.splitlines()]
    row = dict(zip(header, line, strict=True))
    assert (row["POOL"], row["POD"], row["STATE"], row["ISSUED"]) == (POOL, "amf-1", "live", "2")
    assert row["RELEASED"] == "1"
    assert re.fullmatch(r"1 min \d+ s", row["OLDEST"])
    assert int(row["INCARNATION"]) == plain.json[0]["pod"]["incarnation"]
    said = plain.json[0]["use"]
    assert (said["issued"], said["released"]) == (2, 1)
    assert said["oldest_ms"] >= 90_000


async def test_chunks_shows_neighbours_of_one_owner_in_one_line(domain: Domain) -> None:
    async with populated(domain) as (_, one, two):
        text, filtered, plain = await asyncio.gather(
            shown(domain, "chunks"),
            shown(domain, "chunks", POOL, "--pod", "amf-2"),
            shown(domain, "chunks", "--json"),
        )
    assert text.rows == [
        [POOL, "0-2", "3", "0-3071", "amf-1", str(one), "live"],
        [POOL, "3", "1", "3072-4095", "amf-2", str(two), "live"],
    ]
    assert filtered.rows == [[POOL, "3", "1", "3072-4095", "amf-2", str(two), "live"]]
    assert [(run["first"], run["last"], run["owner"]["name"]) for run in plain.json] == [
        (0, 2, "amf-1"),
        (3, 3, "amf-2"),
    ]


async def test_orphans_are_shown_until_a_living_pod_has_claimed_them_marked(domain: Domain) -> None:
    async with domain.served(**NONE_EXPIRES) as asking:
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 2)
        await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", pod), m.Empty)
        await asking.seen(lambda: asking.of(m.PodDown))
        orphans = await shown(domain, "orphans")
        heir = (await asking.open("amf-2")).incarnation
        async with renewing(asking, ("amf-2", heir)):
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
            none, marked = await asyncio.gather(shown(domain, "orphans"), shown(domain, "chunks", "--marked"))
    assert orphans.rows == [[POOL, "0-1", "2", "0-2047", "amf-1", str(pod), "down"]]
    assert none.rows == []
    assert marked.rows == [[POOL, "0-1", "2", "0-2047", "amf-2", str(heir), "live", "marked"]]


async def test_a_chunk_is_shown_as_marked_until_its_scan_is_over(domain: Domain) -> None:
    go_on = asyncio.Event()

    async def in_use(first: int, last: int) -> list[int]:
        await go_on.wait()
        return []

    pod = Pod("amf-2", "10.0.0.2", "i")
    heir = Drsm.connect(domain.nats_url, pod, prefix=domain.prefix, timeout=SEEN_SECONDS)
    async with domain.served(pools=[{"name": POOL, "usage_lag_ms": 0}], **NONE_EXPIRES) as asking:
        dying = (await asking.open("amf-1")).incarnation
        ((n, _),) = (await asking.acquire("amf-1", dying)).chunks
        async with heir:
            await heir.join(POOL, in_use=in_use)
            await asking.ask(asking.subjects.session("close"), m.SessionRef("amf-1", dying), m.Empty)
            await asking.seen(lambda: asking.of(m.ChunkClaimed))
            before = await shown(domain, "chunks", "--marked")
            go_on.set()
            await asking.seen(lambda: asking.of(m.ChunkScanned))
            after = await shown(domain, "chunks", "--marked")
            assert (await mongo_table(domain))[n][0] == "amf-2"
    assert [(row[1], row[4], row[-1]) for row in before.rows] == [(str(n), "amf-2", "marked")]
    assert after.rows == []


async def test_owner_tells_whose_an_id_is(domain: Domain) -> None:
    async with populated(domain) as (_, one, _two):
        mine, hexadecimal, nobody, outside, plain, nonsense, never = await asyncio.gather(
            shown(domain, "owner", POOL, "2049"),
            shown(domain, "owner", POOL, "0xC00"),
            shown(domain, "owner", POOL, "9999"),
            shown(domain, "owner", POOL, str(2**60)),
            shown(domain, "owner", POOL, "2049", "--json"),
            drsm(domain, "owner", POOL, "ten"),
            shown(domain, "owner", POOL, "1001"),
        )
    fields = dict(line.split(maxsplit=1) for line in mine.out.splitlines())
    assert {name: value.strip() for name, value in fields.items()} == {
        "id": "2049",
        "chunk": "2",
        "owner": "amf-1",
        "ip": "10.0.0.1",
        "instance": "i",
        "incarnation": str(one),
        "state": "live",
    }
    assert "amf-2" in hexadecimal.out
    assert "never: 0, reserved, excluded, or beyond the slots" in never.out
    assert plain.json["issuable"]
    assert "nobody" in nobody.out
    assert "no id of this pool" in outside.out
    assert (plain.json["chunk"], plain.json["owner"]["name"], plain.json["marked"]) == (2, "amf-1", False)
    assert (nonsense.code, nonsense.err) == (2, f"drsm: pool {POOL}: expected an id as int, found str\n")


async def line(process: asyncio.subprocess.Process, *, sync: bool) -> str:
    """The next line that a watch prints, of a sync or of anything else."""
    assert process.stdout is not None
    while said := str((await within(process.stdout.readline(), PROCESS_SECONDS)).decode()):
        if ("sync" in said) == sync:
            return said.strip()
    raise AssertionError("the watch has ended")


async def test_watch_tells_each_event_in_one_line(domain: Domain) -> None:
    async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:
        text, plain = (
            await start(domain, "watch", "--syncs"),
            await start(domain, "watch", POOL, "--syncs", "--json"),
        )
        for process in (text, plain):
            assert POOL in await line(process, sync=True)  # it has subscribed
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod, 2)
        assert (await line(text, sync=False)).endswith(f"{POOL} pod up amf-1:{pod}")
        assert (await line(text, sync=False)).endswith(f"{POOL} allocated 2 chunks 0,1 to amf-1:{pod}")
        events = [json.loads(await line(plain, sync=False)) for _ in range(2)]
        assert [event["event"] for event in events] == ["pod.up", "chunk.allocated"]
        assert events[1]["chunks"] == [0, 1]
        for process in (text, plain):
            process.terminate()
            assert (await ended(process))[::2] == (0, "")


async def test_watch_ends_after_a_count_and_counts_only_what_it_tells(domain: Domain) -> None:
    async with domain.served(**ONE_LEAD, **NONE_EXPIRES) as asking:
        counted = await start(domain, "watch", "--count", "1")
        one = await drsm(domain, "watch", "--syncs", "--count", "1")
        assert (one.code, len(one.out.splitlines())) == (0, 1)
        assert f"{POOL} sync 0 pods, 0 chunks" in one.out
        pods = iter(range(1000))
        while counted.returncode is None:  # until it has subscribed, and then seen one
            name = f"amf-{next(pods)}"
            await asking.renew(name, (await asking.open(name)).incarnation)
            await asyncio.sleep(0.05)
        told = await ended(counted)
    assert (told.code, len(told.out.splitlines())) == (0, 1)
    assert f"{POOL} pod up amf-" in told.out


async def test_ctrl_c_ends_a_watch_in_good_order(domain: Domain) -> None:
    async with domain.agent():
        process = await start(domain, "watch", "--syncs")
        assert process.stdout is not None
        assert b"sync" in await within(process.stdout.readline(), PROCESS_SECONDS)
        process.send_signal(2)
        result = await ended(process)
    assert (result.code, result.err) == (0, "")


async def test_a_watch_says_when_nobody_leads(domain: Domain) -> None:
    process = await start(domain, "watch")
    assert process.stderr is not None
    said = await within(process.stderr.readline(), PROCESS_SECONDS)
    process.terminate()
    assert said.startswith(b"drsm: no event for 6 s, not even a sync: nobody leads")
    assert (await ended(process)).code == 0


async def test_decode_turns_a_message_into_text(domain: Domain) -> None:
    text, plain, empty, garbage = await asyncio.gather(
        drsm(domain, "decode", data=encode({"pod": "amf-1", "incarnation": 2**60})),
        drsm(domain, "decode", "--json", data=encode({"incarnation": 2**60})),
        drsm(domain, "decode"),
        drsm(domain, "decode", data=b"\xc1"),
    )
    assert text.out == f'pod         "amf-1"\nincarnation {2**60}\n'
    assert plain.json == {"incarnation": str(2**60)}
    assert empty.out == "(empty)\n"
    assert (garbage.code, garbage.out) == (2, "")
    assert garbage.err.startswith("drsm: expected a msgpack or JSON map")


@pytest.mark.parametrize(
    "command",
    [("pools",), ("pods",), ("chunks",), ("orphans",), ("owner", POOL, "1"), ("pools", "show", POOL)],
)
async def test_without_an_agent_every_question_says_so(domain: Domain, command: tuple[str, ...]) -> None:
    result = await drsm(domain, *command, "--timeout", "3")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "drsm: no agent leads just now (no responders); "
        f"does a drsm-agent run with the subject prefix '{domain.prefix}'?\n"
    )


@pytest.mark.parametrize("command", ["pools", "watch"])
async def test_without_nats_a_command_says_so(domain: Domain, command: str, unused_tcp_port: int) -> None:
    url = f"nats://127.0.0.1:{unused_tcp_port}"
    result = await drsm(domain, command, "--timeout", "0.5", changed={"DRSM_NATS_URL": url})
    assert (result.code, result.out) == (1, "")
    assert f"no connection to NATS at 127.0.0.1:{unused_tcp_port} within 0.5 s" in result.err
    assert len(result.err.splitlines()) == 1


async def test_a_mistake_is_one_message_and_exit_code_2(domain: Domain) -> None:
    mistakes: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
        ("no pool nosuch; `drsm pools` lists those there are", ("pods", "nosuch"), {}),
        ("pool name: expected [a-z0-9]", ("chunks", "a b"), {}),
        ("subject prefix must be", ("pools", "--prefix", "a b"), {}),
        ("expected a NATS URL such as nats://", ("pools", "--nats-url", "http://127.0.0.1:4222"), {}),
        ("DRSM_NATS_TLS_*: cannot load the certificates", ("pools",), {"DRSM_NATS_TLS_CA": "/nonexistent"}),
        ("No such command", ("nosuch",), {}),
    ]
    async with domain.agent():
        results = [await drsm(domain, *arguments, changed=changed) for _, arguments, changed in mistakes]
    for (says, arguments, _), result in zip(mistakes, results, strict=True):
        assert (result.code, result.out) == (2, ""), arguments
        assert says in result.err
        assert "Traceback" not in result.err


async def test_the_same_answers_as_a_demux_has(domain: Domain) -> None:
    """What `drsm chunks` says is what consumers route by."""
    connecting = Demux.connect(domain.nats_url, POOL, prefix=domain.prefix, timeout=SEEN_SECONDS)
    async with populated(domain), connecting as demux:
        await eventually(lambda: len(demux.chunks()) == 4)
        runs = (await shown(domain, "chunks", "--json")).json
        said = {n: run["owner"]["name"] for run in runs for n in range(run["first"], run["last"] + 1)}
        assert said == {n: owner.name for n, owner in demux.chunks().items()}
