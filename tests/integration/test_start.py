"""How the agent starts, refuses to start, and stops: as a process, with its exit code and what it says."""

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from nats.errors import NoRespondersError

from drsm_agent import settings
from drsm_agent.embedded import Scratch, Stack, start_nats_server, start_replica_set, start_standalone
from drsm_agent.embedded.server import free_port
from drsm_agent.errors import Misconfigured
from drsm_agent.settings import SpaceSettings
from drsm_sdk.wire import messages as m
from tests.harness import SEEN_SECONDS, Domain, Requester, requester, within

EXIT_OK, EXIT_FAULT, EXIT_REFUSED = 0, 1, 2


PROGRAM = "from drsm_agent.cli import main; main()"


async def start_agent(
    domain: Domain, *, program: str = PROGRAM, **changed: str
) -> asyncio.subprocess.Process:
    """`drsm-agent run` with a test's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DRSM_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        "run",
        env=clean | domain.environment | changed,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def agent_process(
    domain: Domain, *, program: str = PROGRAM, **changed: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await start_agent(domain, program=program, **changed)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def opened_once_it_serves(asking: Requester, name: str) -> m.Opened:
    """A session of an agent that is a process; it may still be starting."""
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            try:
                return await asking.open(name)
            except NoRespondersError:
                await asyncio.sleep(0.05)


async def refused(domain: Domain, **changed: str) -> str:
    """What an agent says that refuses to start; its exit code is checked."""
    process = await start_agent(domain, **changed)
    _, errors = await within(process.communicate(), 40)
    assert process.returncode == EXIT_REFUSED, errors.decode()
    said = [line for line in errors.decode().splitlines() if line.startswith("drsm-agent: ")]
    assert "Traceback" not in errors.decode()
    assert len(said) == 1
    return str(said[0])


FIELDS = ", ".join(SpaceSettings.model_fields)
BAD_POOLS = {
    "ranges that overlap": (
        '"kind": "ipv4", "ranges": ["10.45.0.0/16", "10.45.9.0/24"]',
        "[0]: pool p: ranges: expected prefixes that do not overlap, got '10.45.0.0/16 and 10.45.9.0/24'",
    ),
    "prefix not aligned": (
        '"kind": "ipv4", "ranges": ["10.45.0.1/16"]',
        "[0]: pool p: ranges: expected ipv4 prefixes without host bits, such as 10.45.0.0/16, got ",
    ),
    "smaller than a block": (
        '"kind": "ipv4", "ranges": ["10.45.0.0/25"], "block_bits": 8',
        "[0]: pool p: ranges: expected prefixes of at most 24 bits, as a block has 8 of 32, got '10.45.0.0/",
    ),
    "bits of a block": (
        '"bits": 10, "block_bits": 10',
        "[0]: pool p: block_bits: expected 1..16 and below bits, got 10",
    ),
    "excluded outside": (
        '"kind": "ipv4", "ranges": ["10.45.0.0/16"], "excluded": ["10.46.0.1"]',
        "[0]: pool p: excluded: expected addresses and prefixes within one of the ranges, got '10.46.0.1'",
    ),
    "no slots": ('"slots": 0', "[0].slots: Input should be greater than or equal to 1, found 0"),
    "space twice": (
        '"spaces": [{"name": "a"}, {"name": "a"}]',
        "[0]: pool p: spaces: expected each name once, got ['a', 'a']",
    ),
    "space's name": ('"spaces": [{"name": "A"}]', "[0]: name: expected [a-z0-9][a-z0-9_-]{0,31}"),
    "space's field": (
        '"spaces": [{"name": "a", "bits": 65}]',
        "[0]: space a: bits: expected 10..64, got 65",
    ),
    "field beside spaces": (
        '"spaces": [{"name": "a"}], "kind": "ipv4"',
        "[0]: pool p: kind: expected none of it beside spaces; each space has its own, got 'ipv4'",
    ),
    "no such field": (
        '"spaces": [{"name": "a", "quarantine_ms": 5}]',
        f"[0].spaces[0].quarantine_ms: no such field; the fields are {FIELDS}\n",
    ),
}
MISTAKES = {
    "pool definition": ({"DRSM_POOLS": '[{"name": "amfid", "bits": 4}]'}, "bits: expected 10..64, got 4"),
    "pool name": ({"DRSM_POOLS": '[{"name": "drsm_x"}]'}, "name: expected"),
    "not of NATS": ({"DRSM_NATS_URL": "http://u:secret@nats:4222"}, "expected URLs such as nats://host:4222"),
    "unknown field": ({"DRSM_POOLS": '[{"name": "amfid", "bit": 24}]'}, "DRSM_POOLS[0].bit"),
    "two pools of one name": ({"DRSM_POOLS": '[{"name": "a"}, {"name": "a"}]'}, "each name once"),
    "nothing to issue": (
        {
            "DRSM_POOLS": '[{"name": "a", "kind": "ipv4", "ranges": ["10.7.0.0/24"], "excluded": ["10.7.0.0/24"]}]'  # noqa: E501
        },
        "pool a: expected a chunk with an id that may be issued",
    ),
    "no pool": ({"DRSM_POOLS": "[]"}, "expected at least one pool, for example"),
    "revision": (
        {"DRSM_POOLS": f'[{{"name": "a", "revision": {2**63}}}]'},
        "DRSM_POOLS[0].revision: Input should",
    ),
    "quarantine": (
        {"DRSM_POOLS": f'[{{"name": "a", "quarantine_ms": {2**63}}}]'},
        "DRSM_POOLS[0].quarantine_ms: Input should",
    ),
    "database": ({"DRSM_MONGO_DATABASE": "a/b"}, "DRSM_MONGO_DATABASE: String should match pattern"),
    "database of a pool": (
        {"DRSM_POOLS": '[{"name": "a", "database": "a b"}]'},
        "DRSM_POOLS[0].database: String should match pattern",
    ),
    "no JSON": ({"DRSM_POOLS": "amfid"}, "DRSM_POOLS: expected JSON"),
    "L": ({"DRSM_LIVENESS_TTL": "1"}, "expected L >= 5 x 0.5 s, found 1.0 s"),
    "A above L": ({"DRSM_ALLOCATION_TTL": "2"}, "expected A > L (3.0 s), found 2.0 s"),
    "T": ({"DRSM_LEADER_TTL": "0.5"}, "expected T >= 1.0 s, found 0.5 s"),
    "W above A": ({"DRSM_ALLOCATION_TTL": "5"}, "expected W <= A (5.0 s), found 10.0 s"),
    "not a number": ({"DRSM_LIVENESS_TTL": "fast"}, "DRSM_LIVENESS_TTL: Input should be a valid number"),
    "prefix": ({"DRSM_SUBJECT_PREFIX": "a b"}, "subject prefix"),
    "no such file": ({"DRSM_CONFIG": "nowhere.toml"}, "expected a TOML file"),
    "NATS URL": ({"DRSM_NATS_URL": "nats://127.0.0.1:notaport"}, "DRSM_NATS_URL"),
    "MongoDB URL": ({"DRSM_MONGO_URL": "postgres://127.0.0.1/"}, "Expected a MongoDB URL like"),
}


@pytest.mark.parametrize(("changed", "message"), MISTAKES.values(), ids=MISTAKES.keys())
async def test_a_mistake_in_the_settings_is_one_message_that_names_it(
    domain: Domain, changed: dict[str, str], message: str
) -> None:
    """Exit code 2, one line, and in it the setting, what was expected and what was found."""
    assert message in await refused(domain, **changed)


@pytest.mark.parametrize(("fields", "message"), BAD_POOLS.values(), ids=BAD_POOLS.keys())
async def test_a_pool_that_cannot_be_is_one_message_that_names_field_and_rule(
    domain: Domain, fields: str, message: str
) -> None:
    """Exit code 2, one line; docs/settings.md has all the rules."""
    said = await refused(domain, DRSM_POOLS=f'[{{"name": "p", {fields}}}]')
    assert f"{said}\n".startswith(f"drsm-agent: DRSM_POOLS{message}")


async def test_a_standalone_mongod_is_refused_with_what_to_do(domain: Domain, stack: Stack) -> None:
    """It has no change streams: the original went on silently and never saw a crash."""
    mongod = await start_standalone(stack.scratch)
    try:
        said = await refused(domain, DRSM_MONGO_URL=mongod.url)
    finally:
        await mongod.stop()
    assert "no replica set" in said
    assert "rs.initiate()" in said


async def test_an_agent_that_starts_before_mongodb_waits_for_it_and_says_so(unused_tcp_port: int) -> None:
    """In any order: alive but not ready, with the reason and never the password, until MongoDB is there."""
    async with Scratch() as scratch:
        nats = await start_nats_server(scratch)
        port = free_port()
        domain = Domain(f"mongodb://127.0.0.1:{port}/?replicaSet=rs0", nats.url, "drsm", "drsm")
        url = f"http://127.0.0.1:{unused_tcp_port}"
        async with (
            agent_process(domain, DRSM_HTTP_PORT=str(unused_tcp_port)) as process,
            aiohttp.ClientSession() as http,
        ):
            waiting = await answer_of(http, f"{url}/readyz", "127.0.0.1")
            assert waiting.startswith("MongoDB is not there yet")
            assert f"127.0.0.1:{port}" in waiting
            assert await answer_of(http, f"{url}/livez", "alive")
            assert await answer_of(http, f"{url}/metrics", "drsm_stream_staleness_seconds +Inf")
            await start_replica_set(scratch, port=port)
            assert await answer_of(http, f"{url}/readyz", "ready\n") == "ready\n"
            process.send_signal(signal.SIGTERM)
            _, errors = await within(process.communicate())
        assert process.returncode == EXIT_OK
        assert "waiting_for_mongodb" in errors.decode()


async def answer_of(http: aiohttp.ClientSession, url: str, expected: str) -> str:
    """The first answer that has this text in it."""
    async with asyncio.timeout(SEEN_SECONDS):
        while True:
            with suppress(aiohttp.ClientError):
                async with http.get(url) as answer:
                    if expected in (text := await answer.text()):
                        return text
            await asyncio.sleep(0.05)


async def test_no_password_is_logged_while_mongodb_is_not_there(domain: Domain) -> None:
    """It stands in the URL that the agent tries."""
    url = "mongodb://user:hunter2@127.0.0.1:1/?replicaSet=rs0"
    async with agent_process(domain, DRSM_MONGO_URL=url) as process:
        assert process.stderr is not None
        while b"waiting_for_mongodb" not in (said := await within(process.stderr.readline())):
            assert said
        assert b"127.0.0.1:1" in said
        process.kill()
        assert b"hunter2" not in said + (await process.communicate())[1]


async def test_other_definitions_than_the_stored_ones_are_refused_showing_both(domain: Domain) -> None:
    """Two agents that disagree about a number space would break every promise to the pods."""
    async with domain.agent():
        pass
    said = await refused(domain, DRSM_POOLS='[{"name": "amfid", "bits": 32}]')
    assert "revision" in said
    assert "24" in said
    assert "32" in said
    said = await refused(domain, DRSM_LIVENESS_TTL="4")
    assert "3000" in said
    assert "4000" in said


async def test_another_subject_prefix_on_the_same_database_is_refused(domain: Domain) -> None:
    """Such an agent would take over the lead, and answer on subjects where nobody asks."""
    async with domain.agent():
        assert "subject_prefix" in await refused(domain, DRSM_SUBJECT_PREFIX=f"{domain.prefix}x")


async def test_a_higher_revision_changes_what_is_stored(domain: Domain) -> None:
    """A pool may grow; the change is deliberate because its revision is."""
    async with domain.agent():
        pass
    async with domain.agent(pools=[{"name": "amfid", "bits": 32, "revision": 2}]):
        pass
    assert "revision" in await refused(domain)


async def test_sigterm_ends_the_agent_cleanly_and_gives_up_the_lead(domain: Domain) -> None:
    """Exit code 0, no warnings, and the next agent leads at once instead of after `T`."""
    term = 3 * SEEN_SECONDS
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        agent_process(domain, DRSM_LEADER_TTL=str(term)) as process,
    ):
        await asking.seen(lambda: asking.events)
        process.send_signal(signal.SIGTERM)
        _, errors = await within(process.communicate())
        assert process.returncode == EXIT_OK, errors.decode()
        assert "lead_given_up" in errors.decode()
        assert "Traceback" not in errors.decode()
        async with domain.agent(leader_ttl=term):
            pass


@pytest.mark.parametrize(
    ("ranges", "fits"),
    [
        ([("", ["10.45.0.0/16"]), ("", ["10.46.0.0/16"])], True),
        ([("", ["10.45.0.0/16"]), ("", ["10.45.7.0/24"])], False),
        ([("", ["10.45.7.0/24"]), ("", ["10.44.0.0/24", "10.45.0.0/16"])], False),
        ([("", ["10.45.0.0/16"]), ("", ["10.45.0.0/16"])], False),
        ([("", ["10.0.0.0/8"]), ("", ["10.1.0.0/16"]), ("b", ["10.2.0.0/16"]), ("", ["10.9.0.0/16"])], False),
        ([("internet", ["10.45.0.0/16"]), ("ims", ["10.45.7.0/24"])], True),
        ([("ims", ["10.45.0.0/16"]), ("ims", ["10.45.7.0/24"])], False),
    ],
)
def test_pools_of_one_network_with_an_address_in_common_are_refused(
    ranges: list[tuple[str, list[str]]], fits: bool
) -> None:
    """Each would issue it. Networks that do not meet, such as two DNNs, may use the same ones."""
    pools: list[Any] = [
        {"name": f"ue-{n}", "kind": "ipv4", "address_domain": of, "ranges": given}
        for n, (of, given) in enumerate(ranges)
    ]
    if fits:
        assert len(settings.load(pools=pools).definitions) == len(pools)
        return
    with pytest.raises(Misconfigured, match=r"found 10\.\S+ of ue-\d and 10\.\S+ of ue-\d.*address_domain"):
        settings.load(pools=pools)


def test_spaces_of_one_pool_with_an_address_in_common_are_refused() -> None:
    """Of IPv6 as of IPv4; a prefix for a subscriber and an address within it are the same addresses."""
    spaces: Any = [
        {"name": "pd", "kind": "ipv6", "ranges": ["2001:db8::/48"], "prefix": 64},
        {"name": "ue", "kind": "ipv6", "ranges": ["2001:db8:0:7::/64"]},
    ]
    with pytest.raises(Misconfigured, match=r"2001:db8::/48 of ue and 2001:db8:0:7::/64 of ue"):
        settings.load(pools=[{"name": "ue", "spaces": spaces}])


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
async def test_health_is_served_over_http(domain: Domain, unused_tcp_port: int, address: str) -> None:
    """Alive, ready and measured; 503 is for what is not ready. By either family of addresses: a probe uses
    the pod's own."""
    async with domain.agent(http_port=unused_tcp_port) as agent, aiohttp.ClientSession() as http:
        url = f"http://{address}:{agent.http_port}"
        for path, expected in (("livez", "alive"), ("readyz", "ready"), ("metrics", "drsm_leader 1.0")):
            async with http.get(f"{url}/{path}") as answer:
                assert answer.status == 200
                assert expected in await answer.text()


async def test_where_ipv6_is_turned_off_health_is_served_over_ipv4(
    domain: Domain, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel of such a node says."""
    loop = type(asyncio.get_running_loop())
    listen = loop.create_server

    async def without_ipv6(itself: Any, factory: Any, host: str | None, *args: Any, **options: Any) -> Any:
        if host is None:
            raise OSError(errno.EADDRNOTAVAIL, "cannot assign requested address")
        return await listen(itself, factory, host, *args, **options)

    monkeypatch.setattr(loop, "create_server", without_ipv6)
    async with domain.agent(http_port=unused_tcp_port) as agent, aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{agent.http_port}/livez") as answer:
            assert answer.status == 200


def test_settings_can_come_from_a_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says what the environment does not; the environment wins."""
    config = tmp_path / "drsm.toml"
    config.write_text('liveness_ttl = 5.0\nhttp_port = 9999\n[[pools]]\nname = "fseid"\nbits = 40\n')
    monkeypatch.setenv("DRSM_CONFIG", str(config))
    monkeypatch.setenv("DRSM_HTTP_PORT", "8088")
    loaded = settings.load()
    assert (loaded.liveness_ttl, loaded.http_port) == (5.0, 8088)
    assert loaded.definitions["fseid"].bits == 40


async def test_ids_above_what_mongodb_can_count_can_be_reserved(domain: Domain) -> None:
    """Its integers are signed; ids of 64 bits are not. What is stored is then the same for the next agent."""
    pool = {"name": "amfid", "bits": 64, "reserved": [[2**63, 2**64 - 1]]}
    for changes in ({}, {}, {"revision": 2, "reserved": [[2**63 + 1, 2**64 - 1]]}):
        async with domain.agent(pools=[pool | changes]):
            pass


async def test_a_start_says_how_many_pods_each_pool_can_serve(domain: Domain) -> None:
    """And warns of one that has hardly a chunk."""
    pools = [
        {"name": "small", "kind": "ipv4", "ranges": ["10.45.0.0/24"], "block_bits": 8},
        {"name": "wide", "kind": "ipv4", "ranges": ["10.46.0.0/16"]},
    ]
    process = await start_agent(domain, DRSM_POOLS=json.dumps(pools), DRSM_LOG_FORMAT="json")
    assert process.stderr is not None
    said: list[dict[str, Any]] = []
    while not any(line["event"] == "pool" and line["pool"] == "wide" for line in said):
        line = await within(process.stderr.readline())
        said += [json.loads(line)] if line.startswith(b"{") else []
    process.terminate()
    await within(process.communicate())
    sizes = {line["pool"]: line["pods_at_most"] for line in said if line["event"] == "pool"}
    assert sizes == {"small": 1, "wide": 256}
    assert [line["pool"] for line in said if line["event"] == "small_pool"] == ["small"]
