"""What the operator's commands show, without servers."""

import contextlib
import json
from itertools import pairwise

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsm_sdk.cli import show
from drsm_sdk.cli.decode import as_json, as_text
from drsm_sdk.pods import Owner
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.codec import DecodeError, encode
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import printable

OWNERS = [Owner("amf-1", "10.0.0.1", "i", 7), Owner("amf-2", "10.0.0.2", "i", 8, "down")]


def snapshot(table: dict[int, tuple[int, bool]]) -> Snapshot:
    """A pool in which each chunk has an owner (by index) and is marked or not."""
    chunks = tuple(
        (owner.key, tuple(n for n, (index, _) in table.items() if index == i))
        for i, owner in enumerate(OWNERS)
    )
    marked = frozenset(n for n, (_, is_marked) in table.items() if is_marked)
    return Snapshot((1, 0), "h", 1, Definition(name="amfid"), tuple(OWNERS), chunks, marked)


@given(st.dictionaries(st.integers(0, 40), st.tuples(st.sampled_from([0, 1]), st.booleans())))
def test_runs_are_the_table_and_neighbours_that_are_alike_share_one(
    table: dict[int, tuple[int, bool]],
) -> None:
    """Nothing is lost, doubled or merged that differs; and no two runs could be one."""
    runs = list(show.runs(snapshot(table)))
    shown = {n: (OWNERS.index(run.owner), run.marked) for run in runs for n in range(run.first, run.last + 1)}
    assert shown == table
    for one, next_one in pairwise(runs):
        assert one.last < next_one.first
        alike = (one.owner, one.marked) == (next_one.owner, next_one.marked)
        assert not (alike and one.last + 1 == next_one.first)


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (0, "0 s"),
        (59_999, "59 s"),
        (60_000, "1 min 0 s"),
        (3_599_000, "59 min 59 s"),
        (7_260_000, "2 h 1 min"),
        (90_000_000, "1 d 1 h"),
    ],
)
def test_a_duration_is_said_in_its_two_largest_units(ms: int, said: str) -> None:
    assert show.duration(ms) == said


def test_names_cannot_command_the_terminal() -> None:
    assert printable("amf\x1b[2J\n\r\x07é") == "amf?[2J????"


def test_a_message_is_decoded_a_field_a_line() -> None:
    said = as_text(encode({"pod": "amf-1", "incarnation": 2**63, "pools": ["a", "b"]})).splitlines()
    assert said == ['pod         "amf-1"', "incarnation 9223372036854775808", 'pools       ["a", "b"]']


def test_decoded_as_json_large_integers_are_text() -> None:
    assert json.loads(as_json(encode({"id": 2**63, "small": 1}))) == {"id": str(2**63), "small": 1}


@pytest.mark.parametrize("data", [b"", b"\x80", b"{}"])
def test_an_empty_message_is_text_too(data: bytes) -> None:
    assert as_text(data) == ("{}" if data else "(empty)")


def test_tables_and_field_names_cannot_command_the_terminal_either() -> None:
    """Go pods may have any name, and anybody can send a message."""
    evil = m.PodState(m.OwnerRef("\x1b[2Jx", "ip\n", "\x07", 0), "live", 1, 0, m.Use())
    assert "\x1b" not in show.pods({"amfid": m.Pods((evil,))})
    assert len(show.pods({"amfid": m.Pods((evil,))}).splitlines()) == 2
    assert as_text(msgpack.packb({"\x1b[2J" + "k" * 1000: 1})) == "?[2J" + "k" * 36 + " 1"


def test_a_message_that_is_nested_without_end_is_a_decode_error() -> None:
    for body in (b"\x81\xa1a" + b"\x91" * 900 + b"\xc0", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"):
        for reading in (as_text, as_json):
            with contextlib.suppress(DecodeError):  # how deep is too deep is Python's to say
                assert reading(body)


def test_json_is_json_whatever_a_stranger_sent() -> None:
    body = msgpack.packb({"a": float("nan"), "b": float("inf"), "c": 1.5})
    said = json.loads(as_json(body), parse_constant=lambda name: f"no JSON: {name}")
    assert said == {"a": "nan", "b": "inf", "c": 1.5}


def test_what_only_strangers_send_is_shown_without_harm() -> None:
    """Bytes, timestamps and other extensions of msgpack, control characters, maps with numbers for keys."""
    body = {
        "raw": b"\x00\xff",
        "when": msgpack.Timestamp(1),
        "evil": "\x1b[2J",
        "nested": {"a": {"b": b"\x01"}},
    }
    said = as_text(msgpack.packb(body))
    assert said.isprintable() or "\x1b" not in said
    assert json.loads(said.splitlines()[0].split(maxsplit=1)[1]) == "00ff"
    assert json.loads(as_json(msgpack.packb(body)))["nested"] == {"a": {"b": "01"}}


@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_a_decode_error(data: bytes) -> None:
    for reading in (as_text, as_json):
        with contextlib.suppress(DecodeError):
            reading(data).encode()


def test_a_chunk_that_the_pool_does_not_have_is_shown_as_outside() -> None:
    """A Go pod numbers chunks as it likes."""
    definition = Definition(name="ue", kind="ipv4", ranges=("10.45.0.0/16",))
    runs = [show.Run("ue", first, last, OWNERS[0], False) for first, last in ((255, 256), (300, 300))]
    lines = show.chunks(runs, {"ue": definition}).splitlines()[1:]
    assert [line.split()[3] for line in lines] == ["10.45.255.0/24-outside", "outside"]
