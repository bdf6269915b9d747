"""What strangers can send, on every subject: a typed error or silence, nothing changed, the agent healthy,
and the next good request served. Subjects come from the protocol, so that a new verb is tested by itself."""

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from structlog.testing import capture_logs

from drsm_agent import endpoints
from drsm_agent.embedded import Scratch, start_nats_server
from drsm_agent.service import Agent
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.subjects import POOL_VERBS, SESSION_VERBS, Subjects
from tests.harness import (
    POOL,
    SEEN_SECONDS,
    UNHURRIED,
    Domain,
    Failed,
    Requester,
    eventually,
    mongo_client,
    raw,
    renewing,
    requester,
    unreadable,
    within,
)
from tests.integration.test_start import EXIT_OK, agent_process
from tests.wire.test_codec import built
from tests.wire.test_messages import GRANT, REQUESTS

AT_ONCE = 200
HARMLESS = {"pools", "pods", "snapshot", "owner", "session.close"}
"""Requests that change nothing whatever they say: `close` only ends the session that it names."""


def every_request(subjects: Subjects, pool: str = POOL) -> dict[str, str]:
    """Verb -> subject, for every request of the protocol."""
    return (
        {f"session.{verb}": subjects.session(verb) for verb in SESSION_VERBS}
        | {verb: subjects.pool(pool, verb) for verb in POOL_VERBS}
        | {"pools": subjects.pools, "probe": subjects.probe}
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """An agent under attack, and two pods that live through it; the first one owns a chunk."""

    domain: Domain
    agent: Agent
    asking: Requester
    incarnation: int
    other: int
    chunk: tuple[int, str]

    def good(self, verb: str) -> dict[str, Any]:
        """A request that would be served, in the name of the pod: whatever is wrong is wrong in one place."""
        body = codec.to_map(REQUESTS[verb])
        if "incarnation" in body:
            body |= {"pod": "amf-1", "incarnation": self.incarnation}
        if verb in {"release", "scanned"}:
            body["chunks"] = [list(self.chunk)]
        if "pools" in body:
            body["pools"] = [POOL]
        return body

    async def outcome(self, subject: str, data: bytes) -> str:
        """`ok`, the error's name, or `silence`."""
        try:
            reply = await self.asking.client.request(subject, data, timeout=SEEN_SECONDS)
        except (NatsTimeout, NoRespondersError):
            return "silence"
        if m.ERROR_CODE_HEADER not in (reply.headers or {}):
            return "ok"
        failure = codec.unpack(m.Failure, reply.data)
        assert len(reply.data) < 600, failure
        assert (reply.headers or {})[m.ERROR_CODE_HEADER] == str(failure.code)
        return failure.error

    async def outcomes(self, sent: dict[str, tuple[str, bytes]]) -> dict[str, str]:
        """What became of each request; many at once."""
        names = list(sent)
        said: dict[str, str] = {}
        for i in range(0, len(names), AT_ONCE):
            some = names[i : i + AT_ONCE]
            said |= zip(some, await asyncio.gather(*[self.outcome(*sent[n]) for n in some]), strict=True)
        return said

    async def documents(self) -> dict[str, Any]:
        """All that requests could change; not what the agent writes by itself all the time, mirrors too."""
        own = {"drsm_leader", "drsm_stamps", "drsm_position"}
        async with mongo_client(self.domain) as client:
            database = client[self.domain.database]
            names = await database.list_collection_names()
            found = {name: await database[name].find().to_list() for name in names if name not in own}
        return {
            f"{name}/{document['_id']}": {k: v for k, v in document.items() if k != "expireAt"}
            for name, documents in found.items()
            for document in documents
            if document.get("type") != "keepalive"
        }


@asynccontextmanager
async def attacked(domain: Domain) -> AsyncIterator[Stage]:
    """Whatever is done in the block must change no document, and leave the agent ready and serving."""
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**UNHURRIED) as agent:
        pod, other = [(await asking.open(name)).incarnation for name in ("amf-1", "amf-2")]
        (chunk,) = (await asking.acquire("amf-1", pod)).chunks
        async with renewing(asking, ("amf-1", pod), ("amf-2", other)):
            await asking.seen(lambda: len(asking.of(m.PodUp)) == 2)
            stage = Stage(domain, agent, asking, pod, other, chunk)
            before = await stage.documents()
            yield stage
            assert await stage.documents() == before
            assert agent.unready() == []
            assert (await asking.acquire("amf-1", pod, request_id="next")).chunks
            listed = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
            assert (listed.pools[0].chunks, listed.pools[0].pods, listed.leader.term) == (2, 2, 1)


# --- Bodies ---------------------------------------------------------------------------------------


HUGE = b"\xff\xff\xff\xff"
NONSENSE: dict[str, bytes] = {
    "empty": b"",
    "not msgpack": b"\xc1\xc1",
    "a number": b"\x01",
    "nil": b"\xc0",
    "a text": b"\xa3abc",
    "a list": b"\x93\x01\x02\x03",
    "an empty list": b"\x90",
    "a timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "numeric keys": b"\x81\x01\x02",
    "keys of bytes": b"\x81\xc4\x01a\x01",
    "text that is not UTF-8": b"\x81\xa3pod\xa2\xff\xfe",
    "half a surrogate pair": b"\x81\xa3pod\xa3\xed\xa0\x80",
    "a key that is not UTF-8": b"\x81\xa1\xff\x01",
    "a list of 2**32 claimed": b"\xdd" + HUGE,
    "a map of 2**32 claimed": b"\xdf" + HUGE,
    "a text of 2**32 claimed": b"\x81\xa3pod\xdb" + HUGE,
    "bytes of 2**32 claimed": b"\x81\xa3pod\xc6" + HUGE,
    "an extension of 2**32 claimed": b"\x81\xa3pod\xc9" + HUGE,
    "claims in claims": b"\xdd\x00\x00\xff\xff" * 1000 + b"\x01" * 60_000,
    "nested lists": b"\x91" * 10_000 + b"\xc0",
    "nested maps": b"\x81\xa3pod" * 10_000 + b"\xc0",
    "nested JSON lists": b'{"pod":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "nested JSON maps": b'{"pod":' * 10_000 + b"1" + b"}" * 10_000,
    "unended JSON": b'{"pod":' * 8_000,
    "half of JSON": b'{"pod":',
    "JSON of a surrogate": b'{"pod":"\\ud800"}',
    "JSON of NUL bytes": b'{"pod":"\x00"}',
    "JSON in UTF-16": '{"pod":1}'.encode("utf-16-le"),
    "JSON that is not UTF-8": b'{"pod":"\xff"}',
    "JSON and more": b"{}{}",
    "a JSON number of 60,000 digits": b'{"incarnation":' + b"9" * 60_000 + b"}",
    "60 KB of nothing": bytes(60_000),
    "1 MB of nothing": bytes(1_000_000),
    "1 MB of JSON": b'{"pod":"' + b"x" * 1_000_000 + b'"}',
}
LONG = "x" * 50_000
WRONG: list[Any] = [
    None,
    True,
    -1,
    -(2**63),
    2**64 - 1,
    1.5,
    math.nan,
    math.inf,
    b"\x00",
    "x\x00y",
    "x\x7f",
    LONG,
    [],
    {},
    [[[]]],
    {"": {"": []}},
    msgpack.Timestamp(1),
    msgpack.ExtType(5, b"x"),
]
WRONG_IN_JSON: list[Any] = [None, True, -1, 2**64, -(2**63), 2**200, 1.5, math.nan, -math.inf, 1e308]
WRONG_IN_JSON += ["x\x00y", "-1", "1e3", "9" * 5000, LONG, [], {}, [[[]]]]
ACCEPTABLE = {bool: (bool,), int: (), str: (), list: (list,), dict: (dict,), tuple: (list,)}
"""What is not wrong in place of a value: the other bool, and the empty list or map."""


def replaced(body: Any, values: list[Any]) -> Iterator[tuple[str, Any]]:
    """`body` with each part of it, however deep, replaced by each value of another type."""
    parts = body.items() if isinstance(body, dict) else enumerate(body)
    for key, part in parts:
        copy = dict(body) if isinstance(body, dict) else list(body)
        for value in values:
            right = type(part) is int and type(value) is int and 0 <= value < 2**64
            right |= type(part) is type(value) is str and value.isprintable() and len(value) < 10
            if not right and not isinstance(value, ACCEPTABLE[type(part)]):
                copy[key] = value
                yield f"{key}={value!r:.24}", dict(copy) if isinstance(body, dict) else list(copy)
        if isinstance(part, dict | list | tuple):
            for name, inner in replaced(part, values):
                copy[key] = inner
                yield f"{key}.{name}", dict(copy) if isinstance(body, dict) else list(copy)


def wrong(said: dict[str, str], *allowed: str) -> dict[str, str]:
    """The outcomes that should not have been."""
    return {name: outcome for name, outcome in said.items() if outcome not in allowed}


async def test_nonsense_is_refused_on_every_subject(domain: Domain) -> None:
    """Where a request has no fields, any map will do; nonsense is refused there too."""
    async with attacked(domain) as stage:
        for verb, subject in every_request(stage.asking.subjects).items():
            said = await stage.outcomes({name: (subject, data) for name, data in NONSENSE.items()})
            large = {name: outcome for name, outcome in said.items() if name.startswith("1 MB")}
            assert set(large.values()) == {"too_large"}, verb
            fields = bool(codec.to_map(REQUESTS[verb]))
            assert said["empty"] == ("bad_request" if fields else "ok"), verb
            bad = wrong(said, "bad_request", "too_large")
            assert not bad.keys() - {"empty"}, verb


async def test_a_message_that_was_cut_off_or_goes_on_is_refused(domain: Domain) -> None:
    """At each byte; no part of a message is carried out."""
    async with attacked(domain) as stage:
        for verb, subject in every_request(stage.asking.subjects).items():
            for as_json in (False, True):
                whole = codec.encode(stage.good(verb), as_json=as_json)
                parts = {f"{verb} [:{i}]": (subject, whole[:i]) for i in range(1, len(whole))}
                parts |= {f"{verb} + {more!r}": (subject, whole + more) for more in (b"\x00", whole)}
                assert not wrong(await stage.outcomes(parts), "bad_request")


@pytest.mark.parametrize("as_json", [False, True])
async def test_no_field_takes_a_wrong_value(domain: Domain, as_json: bool) -> None:
    """Each part of each request in turn: other types, negative and huge numbers, text that nobody prints."""
    async with attacked(domain) as stage:
        sent: dict[str, tuple[str, bytes]] = {}
        for verb, subject in every_request(stage.asking.subjects).items():
            for name, body in replaced(stage.good(verb), WRONG_IN_JSON if as_json else WRONG):
                data = json.dumps(body).encode() if as_json else msgpack.packb(body)
                sent[f"{verb} {name}"] = subject, data
        assert len(sent) > 500
        said = await stage.outcomes(sent)
        # A name of nobody's is well-formed text in some requests: of an unknown session, or asking for one.
        assert not wrong(said, "bad_request", "session_lost", "ok")
        lost = {name.split("=")[0] for name, outcome in said.items() if outcome == "session_lost"}
        served = {name.split("=")[0] for name, outcome in said.items() if outcome == "ok"}
        assert {name.split()[1] for name in lost} <= {"pod", "incarnation"}
        assert served <= {"session.close pod", "owner space"}


async def test_a_doubled_json_key_counts_once(domain: Domain) -> None:
    """The last one, so that what was checked is what is done."""
    async with attacked(domain) as stage:
        text = codec.encode(stage.good("acquire"), as_json=True)[:-1]
        subject = stage.asking.subjects.pool(POOL, "acquire")
        for doubled in (b',"count":0}', b',"pod":1}', b',"request_id":""}', b',"incarnation":-1}'):
            assert await stage.outcome(subject, text + doubled) == "bad_request"


async def test_a_request_says_what_was_expected(domain: Domain) -> None:
    """Also where there are two right answers."""
    async with domain.served(**UNHURRIED) as asking:
        subject = asking.subjects.pool(POOL, "owner")
        reply = await asking.client.request(subject, b'{"id": -1}', timeout=SEEN_SECONDS)
    said = codec.unpack(m.Failure, reply.data).message
    assert said == "id: expected an integer from 0 to 2**64-1 or text, found int -1"


# --- Names and incarnations -----------------------------------------------------------------------

NAMES = [
    "chunkid-1",
    "a b",
    "amf*",
    "a>",
    "",
    "a\x00b",
    "A",
    "-a",
    "x" * 254,
    "a..b",
    "a:1",
    "ä",
    "a\nb",
    "*",
]
POOLS = ["", "*", ">", "a.b", "a b", "a\x00b", "A", "drsm_sessions", "system.users", "$x", "x" * 33]


async def test_names_that_could_be_other_documents_or_subjects_are_refused(domain: Domain) -> None:
    """A pod must not be able to name a chunk's document, a pool not the agent's own collections."""
    async with attacked(domain) as stage:
        subjects = stage.asking.subjects
        bodies = {f"pod {name!r}": stage.good("session.open") for name in NAMES}
        for name in NAMES:
            bodies[f"pod {name!r}"]["pod"] = {"name": name, "ip": "", "instance": ""}
        bodies |= {f"pool {name!r}": stage.good("session.open") | {"pools": [POOL, name]} for name in POOLS}
        opened = {name: (subjects.session("open"), codec.encode(body)) for name, body in bodies.items()}
        joined = {
            name: (subjects.session("join"), codec.encode(stage.good("session.join") | {"pools": [name]}))
            for name in POOLS
        }
        reported = {
            name: (
                subjects.session("report"),
                codec.encode(stage.good("session.report") | {"chunks": [[name, 1, GRANT, True]]}),
            )
            for name in POOLS
        }
        for sent in (opened, joined, reported):
            assert not wrong(await stage.outcomes(sent), "bad_request")


async def test_pools_that_are_not_there_are_refused(domain: Domain) -> None:
    """On every subject that names one, and in the lists of pools."""
    async with attacked(domain) as stage:
        subjects = every_request(stage.asking.subjects, "nosuch")
        sent = {verb: (subjects[verb], codec.encode(stage.good(verb))) for verb in POOL_VERBS}
        for verb in ("session.open", "session.join"):
            sent[verb] = subjects[verb], codec.encode(stage.good(verb) | {"pools": [POOL, "nosuch"]})
        assert not wrong(await stage.outcomes(sent), "unknown_pool")


async def test_nobody_acts_for_an_incarnation_that_is_not_his(domain: Domain) -> None:
    """Of another pod, of nobody, of a Go pod, and the largest there is."""
    async with attacked(domain) as stage:
        sent: dict[str, tuple[str, bytes]] = {}
        for verb, subject in every_request(stage.asking.subjects).items():
            for pod, incarnation in (
                ("amf-2", stage.incarnation),
                ("amf-1", stage.incarnation + 1),
                ("amf-1", 0),
                ("amf-1", 2**63),
                ("amf-1", 2**64 - 1),
                ("chunkid-0", 0),
                ("*", stage.incarnation),
                ("amf-1\x00", stage.incarnation),
            ):
                body = stage.good(verb)
                if "incarnation" in body:
                    body |= {"pod": pod, "incarnation": incarnation}
                    sent[f"{verb} {pod!r} {incarnation}"] = subject, codec.encode(body)
        said = await stage.outcomes(sent)
        assert {name.split()[0] for name, outcome in said.items() if outcome == "ok"} == {"session.close"}
        reported = {name: said.pop(name) for name in list(said) if name.startswith("session.report")}
        assert not wrong(said, "session_lost", "ok")
        assert not wrong(reported, "session_lost", "bad_request")  # whose names may become a document's


async def test_nobody_gives_back_or_clears_what_is_not_his(domain: Domain) -> None:
    """Another pod's chunk, even by its right grant; numbers that no pool has."""
    async with attacked(domain) as stage:
        asking, (n, grant) = stage.asking, stage.chunk
        others = ((n, GRANT), (2**64 - 1, grant), (2**63, grant), (n + 1, grant))
        for listed in (
            m.ChunkList("amf-1", stage.incarnation, others),
            m.ChunkList("amf-2", stage.other, (stage.chunk, *others)),
        ):
            await asking.ask(asking.subjects.pool(POOL, "release"), listed, m.Released)
            cleared = await asking.ask(asking.subjects.pool(POOL, "scanned"), listed, m.Cleared)
            assert cleared.cleared == ()
        assert (await asking.renew("amf-1", stage.incarnation)).held[POOL][0] == 1


# --- Subjects and reply subjects ------------------------------------------------------------------


def labels(agent: Agent) -> set[tuple[str, ...]]:
    """Every series of the agent's metrics about requests."""
    return {
        (sample.name, *sample.labels.values())
        for metric in agent.metrics.registry.collect()
        for sample in metric.samples
        if sample.name.startswith("drsm_request")
    }


async def test_subjects_that_are_no_request_are_not_answered_and_make_no_metrics(domain: Domain) -> None:
    """Unknown verbs, wildcards, empty and odd tokens; a series for each would fill the memory."""
    async with attacked(domain) as stage:
        await stage.asking.ask(stage.asking.subjects.pools, m.Empty(), m.Pools)
        before, rpc = labels(stage.agent), f"{domain.prefix}.rpc."
        tails = [
            "x",
            "pools.x",
            "session",
            "session.x",
            "session.open.x",
            "session.*",
            "agent.x",
            ">",
            "..",
            "*",
        ]
        tails += [f"pool.{POOL}.{verb}" for verb in ("x", "*", ">", "acquire.more", "ACQUIRE", "snapshot.1")]
        tails += [f"pool.{name}.acquire" for name in ("*", "A", "drsm_sessions", "a\x01b", "ä", "x" * 3000)]
        packets = [f"PUB {rpc}{tail} _INBOX.{i} 2\r\n{{}}\r\n".encode() for i, tail in enumerate(tails)]
        answered: list[str] = []

        async def note(message: Any) -> None:
            answered.append(message.subject)

        await stage.asking.client.subscribe("_INBOX.*", cb=note)
        await stage.asking.client.flush()
        for packet in packets:
            await raw(domain.nats_url, packet)
        await stage.asking.ask(stage.asking.subjects.pools, m.Empty(), m.Pools)
        assert [subject for subject in answered if subject.count(".") == 1] == []
        assert labels(stage.agent) == before


async def test_pools_that_are_not_there_make_no_metrics(domain: Domain) -> None:
    """A thousand names of pools: the same few series, whatever was asked."""
    async with attacked(domain) as stage:
        subjects = stage.asking.subjects
        assert await stage.outcome(subjects.pool("p", "acquire"), b"\x80") == "unknown_pool"
        before = labels(stage.agent)
        sent = {f"p{i}": (subjects.pool(f"p{i}", "acquire"), b"\x80") for i in range(1000)}
        assert not wrong(await stage.outcomes(sent), "unknown_pool")
        assert labels(stage.agent) == before


async def test_requests_that_nobody_waits_for_are_carried_out_or_dropped_in_silence(domain: Domain) -> None:
    """Without a reply subject, good or bad."""
    async with attacked(domain) as stage:
        for subject in every_request(stage.asking.subjects).values():
            for body in (*NONSENSE.values(), b"\x80"):
                await stage.asking.client.publish(subject, body)
        await stage.asking.client.flush()


async def test_the_agent_does_not_speak_where_a_stranger_wants_it_to(domain: Domain) -> None:
    """Reply subjects among its own events and requests are a stranger's attempt to speak in its name; a
    snapshot whose pages ask for snapshots would never end."""
    async with attacked(domain) as stage:
        asking, count = stage.asking, stage.agent.metrics.requests
        inside = [*every_request(asking.subjects).values(), asking.subjects.event(POOL, "sync")]
        seen, served = len(asking.raw), _total(count) - _own(count)
        for subject in every_request(asking.subjects).values():
            for reply in inside:
                for body in (b"\x80", b"\xc1"):
                    await asking.client.publish(subject, body, reply=reply)
        await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
        await asking.seen(lambda: len(asking.raw) > seen)
        heard = [codec.decode(message.data) for message in asking.raw]
        assert all("version" in body and "error" not in body for body in heard)
        assert _total(count) - _own(count) - served <= 2  # the one request for pools, perhaps sent again


def _own(requests: Any) -> float:
    """Renewals of the test's own pods, and the leader's probes: their number follows the clock."""
    return sum(
        float(sample.value)
        for family in requests.collect()
        for sample in family.samples
        if sample.labels.get("verb") in {"session.renew", "probe"}
    )


def _total(metric: Any) -> float:
    """The sum of a metric's series: for requests, how many were answered, or tried to be."""
    return sum(
        float(sample.value)
        for family in metric.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    )


async def test_odd_reply_subjects_do_no_harm(domain: Domain) -> None:
    """Subjects of the system, wildcards, control characters, very long ones, the subject itself."""
    async with attacked(domain) as stage:
        subjects = every_request(stage.asking.subjects)
        replies = [
            "$SYS.REQ.SERVER.PING",
            "$JS.API.STREAM.NAMES",
            "$SRV.PING",
            "*",
            ">",
            "a.>",
            "a..b",
            ".",
            "a.",
        ]
        replies += [domain.prefix, f"{domain.prefix}.evt", "\x01\x7f", "ä", "x" * 3900, "x." * 1000 + "x"]
        await raw(
            domain.nats_url,
            *[
                f"PUB {subject} {reply} {len(body)}\r\n".encode() + body + b"\r\n"
                for subject in subjects.values()
                for reply in replies
                for body in (b"\x80", b"\xc1")
            ],
        )


async def test_messages_that_cannot_be_read_do_not_make_the_agent_deaf(domain: Domain) -> None:
    """A single one ends nats-py's read loop, which then hears nothing until pings time out."""
    async with attacked(domain) as stage:
        for packet in unreadable(stage.asking.subjects.pool(POOL, "owner")).values():
            await raw(domain.nats_url, packet)
            assert await within(stage.outcome(stage.asking.subjects.pools, b"\x80")) == "ok"
        stage.agent.measure()
        assert _total(stage.agent.metrics.bus_reconnects) == 0


LIMITED = """
authorization {
  users = [
    {user: agent, password: secret, permissions: {
      publish: {allow: ["PREFIX.evt.>", "PREFIX.rpc.agent.probe", "_INBOX.>"]}
      subscribe: {allow: ["PREFIX.rpc.>", "_INBOX.>"]}}}
    {user: admin, password: secret}
  ]
}
"""


async def test_reply_subjects_that_the_agent_may_not_use_cost_one_line_and_nothing_else(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server refuses each with another text. That does not mean that events were refused."""
    async with Scratch() as scratch:
        server = await start_nats_server(scratch, config=LIMITED.replace("PREFIX", domain.prefix))
        url = server.url.replace("//", "//admin:secret@")
        limited = Domain(domain.mongo_url, server.url, domain.database, domain.prefix)
        async with (
            limited.agent(**UNHURRIED, nats_user="agent", nats_password="secret") as agent,
            requester(url, domain.prefix) as asking,
        ):
            capsys.readouterr()
            for i in range(1000):
                await asking.client.publish(asking.subjects.pools, b"\x80", reply=f"x.evt.{POOL}.{i}")
            assert (await asking.open("amf-1")).incarnation  # an event was flushed meanwhile
            await eventually(lambda: agent._bus.errors == 1000)
            agent.measure()
            assert _total(agent.metrics.bus_errors) == 1000
            assert agent.unready() == []
            captured = capsys.readouterr()
            said = (captured.out + captured.err).splitlines()
            assert len([line for line in said if "nats_error" in line]) == 1
            # (On a slow machine the server may confirm too late.)
            assert not [line for line in said if "not_confirmed" in line and "ermission" in line]


# --- Whatever else there is -----------------------------------------------------------------------


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Values of a strategy, the same ones in every run."""
    found: list[Any] = []

    @examples(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


async def test_any_message_to_any_subject_gets_a_typed_answer(domain: Domain) -> None:
    """Messages of every kind, whole and with some bytes replaced, on every subject; of pods that are not
    there, so that none of them may change anything."""
    kinds = st.sampled_from(sorted({type(body) for body in REQUESTS.values()} - {m.Open}, key=str))
    whole = st.tuples(kinds.flatmap(built), st.booleans()).map(
        lambda drawn: codec.encode(codec.to_map(drawn[0]), as_json=drawn[1])
    )
    spoilt = st.tuples(whole, st.integers(0, 200), st.binary(max_size=6)).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + len(drawn[2]) :]
    )
    bodies = drawn(st.one_of(whole, spoilt, st.binary(max_size=40)), 200)  # before anything may wait for it
    async with attacked(domain) as stage:
        subjects = every_request(stage.asking.subjects)
        for verb, subject in subjects.items():
            sent = {f"{verb} {body!r}": (subject, body) for body in bodies}
            allowed = {"bad_request", "session_lost", "unknown_pool", "store_unavailable"}
            allowed |= {"ok"} if verb in HARMLESS | {"probe"} else set()
            assert not wrong(await stage.outcomes(sent), *allowed)


async def test_more_requests_at_once_than_the_bound_are_told_to_come_back(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is done for them, and with `retry`; afterwards they are served. The operator is told,
    once for each time that it lasts."""
    turned_away = {"verb": "session.open", "outcome": "overloaded"}
    async with requester(domain.nats_url, domain.prefix) as asking, domain.agent(**UNHURRIED) as agent:
        for before in (0, 2):
            with monkeypatch.context() as bounded, capture_logs() as logs:
                bounded.setattr(endpoints, "IN_FLIGHT_MAX", 0)
                for name in ("amf-1", "amf-2"):
                    with pytest.raises(Failed) as refused:
                        await asking.open(name)
            failure = refused.value.failure
            assert (failure.error, failure.reason, failure.retry) == ("store_unavailable", "overloaded", True)
            counted = agent.metrics.registry.get_sample_value("drsm_requests_total", turned_away)
            assert counted == before + 2
            assert [log["log_level"] for log in logs if log["event"] == "overloaded"] == ["warning"]
            assert (await asking.open(f"amf-{before}")).incarnation


# --- Floods ---------------------------------------------------------------------------------------

FLOOD = 10_000
FLOODS = 4
FLOOD_SECONDS = 60.0
"""A bound against hanging: of one flood, and of the requests that go on meanwhile."""
GROWTH_MAX = 16 * 1024 * 1024
"""What an agent's memory may grow by over further floods of 10,000. One leaked object of 500 bytes for each
bad request would be 20 MB; what is left is the allocator's, whose arenas settle in steps of some MB."""
FLOOD_BYTES_MAX = 64 * 1024 * 1024
"""And by the first: what waits in nats-py's queue is bounded to 32 MiB; as much again for its buffers and
the allocator's arenas."""
LOG_LINES_MAX = 50


def resident(pid: int) -> int:
    """A process's memory in bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def read(stream: asyncio.StreamReader | None) -> AsyncIterator[list[str]]:
    """The lines of a stream as they come, so that its writer never waits."""
    assert stream
    lines: list[str] = []

    async def reading() -> None:
        async for line in stream:
            lines.append(line.decode())  # noqa: PERF401

    task = asyncio.create_task(reading())
    try:
        yield lines
    finally:
        await asyncio.wait([task], timeout=1)  # the process has ended, if all went well
        task.cancel()
        await asyncio.wait([task])


async def flood(asking: Requester) -> None:
    """10,000 bad requests of every kind and size as fast as they can be sent, with answers to some; and
    among them what a stranger says in the agent's name. Returns when the server has them all."""
    subjects = list(every_request(asking.subjects).values())
    subjects += [f"{asking.subjects.prefix}.rpc.x", asking.subjects.pool("nosuch", "acquire")]
    bodies = [data for data in NONSENSE.values() if len(data) < 1000] * 4
    bodies += [bytes(60_000), b"\x93" * 60_000, NONSENSE["claims in claims"], NONSENSE["nested JSON maps"]]
    inbox = asking.client.new_inbox()  # nobody listens there
    for i in range(FLOOD):
        subject = subjects[i % len(subjects)]
        reply = ("", inbox, f"x.evt.y.{i}", asking.subjects.event(POOL, "sync"))[i % 4]
        await asking.client.publish(subject, bodies[i % len(bodies)], reply=reply)
        if i % 10 == 0:
            await asking.client.publish(asking.subjects.event("strangers", "chunk.allocated"), b"\xc1")
    await asking.client.flush(timeout=60)


async def served(asking: Requester) -> None:
    """A good request, asked as clients ask: again when it was dropped or refused as one too many."""
    while True:
        try:
            await asking.ask(asking.subjects.pools, m.Empty(), m.Pools, timeout=1.0)
        except (Failed, NatsTimeout):
            await asyncio.sleep(0.05)
        else:
            return


async def served_meanwhile(asking: Requester, done: asyncio.Event) -> float:
    """Good requests one after another until `done`; the longest time that one took, tries included."""
    longest = 0.0
    clock = asyncio.get_running_loop().time
    while not done.is_set():
        began = clock()
        await served(asking)
        longest = max(longest, clock() - began)
    return longest


@pytest.mark.timeout(300)
async def test_floods_of_bad_requests_leave_nothing_in_the_agent(domain: Domain) -> None:
    """Memory flat, no line in the log for each, good requests served meanwhile, the lead kept, a clean end,
    exit code 0. (`T` is long: a flood takes seconds where many processes share a processor.)"""
    async with (
        requester(domain.nats_url, domain.prefix) as asking,
        requester(domain.nats_url, domain.prefix) as stranger,
        agent_process(domain, DRSM_LEADER_TTL="20") as process,
        read(process.stderr) as lines,
    ):
        await eventually(lambda: any("serving" in line for line in lines))
        pod = (await asking.open("amf-1")).incarnation
        await asking.acquire("amf-1", pod)
        sizes, waited = [resident(process.pid)], []
        for _ in range(1 + FLOODS):
            over = asyncio.Event()
            meanwhile = asyncio.create_task(served_meanwhile(asking, over))
            await flood(stranger)
            await within(served(asking), FLOOD_SECONDS)
            over.set()
            waited.append(await within(meanwhile, FLOOD_SECONDS))
            sizes.append(resident(process.pid))
        listed = await asking.ask(asking.subjects.pools, m.Empty(), m.Pools)
        process.send_signal(signal.SIGTERM)
        await within(process.wait())
        assert process.returncode == EXIT_OK
        assert (listed.pools[0].chunks, listed.leader.term) == (1, 1)
        assert len(lines) < LOG_LINES_MAX, lines[:LOG_LINES_MAX]
        assert sizes[1] - sizes[0] < FLOOD_BYTES_MAX, sizes
        assert sizes[-1] - sizes[1] < GROWTH_MAX, sizes
        assert max(waited) < FLOOD_SECONDS / 2
