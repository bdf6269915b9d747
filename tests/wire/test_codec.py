"""Any message survives the way there and back; any other bytes end in one kind of error."""

import dataclasses
import json
import math
import tracemalloc
import types
import typing
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drsm_sdk.wire import messages as m
from drsm_sdk.wire.codec import (
    JSON_INTEGER_MAX,
    U64_MAX,
    DecodeError,
    decode,
    encode,
    from_map,
    is_json,
    to_map,
    unpack,
)
from drsm_sdk.wire.definition import Definition

KINDS: list[type[Any]] = [
    kind for kind in vars(m).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]
ERROR_LENGTH_MAX = 240

# --- Any message of each class, built from its annotations ----------------------------------------

_POOLS = st.from_regex(r"(?!drsm_)[a-z0-9][a-z0-9_-]{0,31}", fullmatch=True)
_PODS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]{1,9}){0,2}", fullmatch=True).filter(
    lambda name: not name.startswith("chunkid-")
)
_GRANTS = st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
_PRINTABLE = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20)
_U64 = st.one_of(st.integers(0, U64_MAX), st.sampled_from([0, 2**53, 2**53 + 1, 2**63, U64_MAX]))


@st.composite
def definitions(draw: st.DrawFn) -> Definition:
    """Any definition that is allowed."""
    bits = draw(st.integers(10, 64))
    block_bits = draw(st.integers(1, min(16, bits - 1)))
    ends = st.integers(0, 2**bits - 1)
    return Definition(
        name=draw(_POOLS),
        bits=bits,
        block_bits=block_bits,
        slots=draw(st.integers(0, 2**block_bits)),
        reserved=tuple((min(pair), max(pair)) for pair in draw(st.lists(st.tuples(ends, ends), max_size=3))),
        usage_lag_ms=draw(_U64),
        quarantine_ms=draw(_U64),
        unscanned=draw(st.sampled_from(["keep", "free"])),
        revision=draw(st.integers(1, U64_MAX)),
    )


_RULES: dict[tuple[type[Any], str], st.SearchStrategy[Any]] = {
    (m.PodRef, "name"): _PODS,
    (m.PodRef, "ip"): _PRINTABLE,
    (m.PodRef, "instance"): _PRINTABLE,
    (m.Open, "pools"): st.lists(_POOLS, max_size=4).map(tuple),
    (m.Open, "request_id"): _PRINTABLE.filter(bool),
    (m.Probe, "nonce"): _PRINTABLE,
    (m.Join, "pools"): st.lists(_POOLS, max_size=4).map(tuple),
    (m.Acquire, "count"): st.integers(1, 256),
    (m.Acquire, "request_id"): _PRINTABLE.filter(bool),
    (m.ChunkList, "chunks"): st.lists(st.tuples(_U64, _GRANTS), max_size=4).map(tuple),
    (m.Report, "pod"): _PODS,
    (m.Report, "ip"): _PRINTABLE,
    (m.Report, "instance"): _PRINTABLE,
    (m.Report, "pools"): st.lists(_POOLS, max_size=4).map(tuple),
    (m.Report, "chunks"): st.lists(st.tuples(_POOLS, _U64, _GRANTS, st.booleans()), max_size=4).map(tuple),
    # text that could be a number is read as one in JSON
    (m.OwnerQuery, "id"): _U64 | st.text(max_size=40).filter(lambda text: not text.isdigit()),
}


@cache
def built(kind: Any) -> st.SearchStrategy[Any]:
    """Any message of `kind`; what its own rules refuse is left out."""
    if kind is Definition:
        return definitions()
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return st.builds(
        kind, **{name: _RULES[kind, name] if (kind, name) in _RULES else _of(hints[name]) for name in names}
    )


def _of(hint: Any) -> st.SearchStrategy[Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    plain = {int: _U64, str: st.text(max_size=20), bool: st.booleans(), types.NoneType: st.none()}
    if hint in plain:
        return typing.cast("st.SearchStrategy[Any]", plain[hint])
    if origin is types.UnionType:
        return st.one_of(*map(_of, args))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(_of, args))
    if origin is dict:
        return st.dictionaries(st.text(max_size=10), _of(args[1]), max_size=3)
    return built(hint)


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), U64_MAX),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
)


def _values(keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        _LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )


_TEXT = st.text(max_size=8)
_VALUES = _values(_TEXT | st.integers(0, 3))
_SENDABLE = _values(_TEXT)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_message_survives_msgpack(kind: Any, data: st.DataObject) -> None:
    """What was encoded is decoded to the same message."""
    message = data.draw(built(kind))
    assert unpack(kind, encode(to_map(message))) == message


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_message_survives_json(kind: Any, data: st.DataObject) -> None:
    """JSON says the same, and no integer in it is above 2**53."""
    message = data.draw(built(kind))
    text = encode(to_map(message), as_json=True)
    assert unpack(kind, text) == message

    def check(number: str) -> int:
        assert int(number) <= JSON_INTEGER_MAX
        return int(number)

    json.loads(text, parse_int=check)


@settings(max_examples=50)
@given(definitions())
def test_a_definition_survives_both(definition: Definition) -> None:
    """Definitions travel in answers and snapshot pages, and are stored as JSON settings."""
    assert unpack(Definition, encode(to_map(definition))) == definition
    assert unpack(Definition, encode(to_map(definition), as_json=True)) == definition


def refusal(read: Callable[[], Any], kind: Any) -> str:
    """How `read` refused what it got: an empty text when it read a `kind`."""
    try:
        assert type(read()) is kind
    except DecodeError as error:
        return str(error)
    return ""


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda data: b"{" + data))
def test_any_bytes_are_a_map_or_a_decode_error(data: bytes) -> None:
    """No other exception leaves the decoder, whatever a stranger sends, and its text is short."""
    said = refusal(lambda: decode(data), dict)
    assert (len(said) < ERROR_LENGTH_MAX, said.isprintable()) == (True, True)


_BYTES = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda data: b"{" + data),
    _VALUES.map(msgpack.packb),
    _SENDABLE.map(lambda value: json.dumps(value, default=repr).encode()),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(
    data=_BYTES
    | _VALUES.map(msgpack.packb)
    | _SENDABLE.map(lambda value: json.dumps(value, default=repr).encode())
)
def test_any_bytes_are_a_message_or_a_decode_error(kind: Any, data: bytes) -> None:
    """Of every kind: bytes at random, any value that msgpack or JSON can say."""
    said = refusal(lambda: unpack(kind, data), kind)
    assert (len(said) < ERROR_LENGTH_MAX, said.isprintable()) == (True, True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(data=st.data(), as_json=st.booleans())
def test_a_message_in_part_is_a_decode_error(kind: Any, data: st.DataObject, as_json: bool) -> None:
    """Cut off anywhere, or with anything after it; also when it has no fields."""
    whole = encode(to_map(data.draw(built(kind))), as_json=as_json)
    part = whole[: data.draw(st.integers(1, len(whole) - 1))] if len(whole) > 1 else b"\x81"
    for broken in (part, whole + b"\x00", whole + whole):
        with pytest.raises(DecodeError):
            unpack(kind, broken)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data(), as_json=st.booleans())
def test_what_was_read_is_written_so_that_it_reads_the_same(
    kind: Any, data: st.DataObject, as_json: bool
) -> None:
    """A message with one part replaced by anything: refused, or understood in one way only."""
    body = to_map(data.draw(built(kind)))
    for name in data.draw(st.sets(st.sampled_from(list(body) or [""]), max_size=1)):
        body[name] = data.draw(_SENDABLE.filter(lambda value: not as_json or _is_json_value(value)))
    try:
        message = unpack(kind, encode(body, as_json=as_json))
    except DecodeError:
        return
    assert unpack(kind, encode(to_map(message), as_json=as_json)) == message


def _is_json_value(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_map_is_a_message_or_a_decode_error(kind: Any, data: st.DataObject) -> None:
    """Wrong values under the right keys give a decode error with a short, printable text, and no other."""
    names = [field.name for field in dataclasses.fields(kind)]
    body = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(names, _VALUES)))
    for text_integers in (False, True):
        said = refusal(partial(from_map, kind, body, text_integers=text_integers), kind)
        assert (len(said) < ERROR_LENGTH_MAX, said.isprintable()) == (True, True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_one_wrong_value_is_a_message_or_a_decode_error(kind: Any, data: st.DataObject) -> None:
    """A message with one part of it, however deep, replaced by anything."""
    body: dict[str, Any] = decode(encode(to_map(data.draw(built(kind)))))
    here: Any = body
    while here:
        key = data.draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        here[key] = data.draw(_VALUES)
        break
    said = refusal(lambda: from_map(kind, body), kind)
    assert (len(said) < ERROR_LENGTH_MAX, said.isprintable()) == (True, True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(data=st.data(), unknown=st.dictionaries(_TEXT.map(lambda key: "+" + key), _SENDABLE, max_size=3))
def test_unknown_keys_are_ignored(kind: Any, data: st.DataObject, unknown: dict[str, Any]) -> None:
    """A later version may add fields; this one reads the message all the same."""
    message = data.draw(built(kind))
    assert unpack(kind, encode(unknown | to_map(message))) == message


def test_unknown_keys_are_ignored_in_nested_maps() -> None:
    """Also in a part of a message."""
    body: dict[str, Any] = {
        "pod": {"name": "a", "ip": "", "instance": "", "zone": 1},
        "pools": [],
        "request_id": "r",
        "x": None,
    }
    assert from_map(m.Open, body) == m.Open(m.PodRef("a", "", ""), (), "r")


# --- Integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, 2**32, 2**53, 2**53 + 1, 2**63, U64_MAX])
def test_integers_of_64_bits_are_read(value: int) -> None:
    """Both limits, and the places where other languages change types."""
    assert unpack(m.Reported, encode({"accepted": value})) == m.Reported(value)
    assert unpack(m.Reported, encode({"accepted": value}, as_json=True)) == m.Reported(value)


@pytest.mark.parametrize(
    "value", [-1, -(2**63), True, False, 0.0, 1.0, math.nan, math.inf, None, "1", "", b"1", [], [1], {}]
)
def test_other_values_are_no_integers(value: Any) -> None:
    """Neither negative ones nor bools, floats, texts or bytes are taken for a number."""
    with pytest.raises(DecodeError, match=r"^accepted: expected an integer from 0 to 2\*\*64-1, found "):
        unpack(m.Reported, encode({"accepted": value}))


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "1" + "0" * 4000, "-1", "1.0", "1e3", "true", "NaN", "null"]
)
def test_other_json_numbers_are_no_integers(text: str) -> None:
    """As literals; huge ones too, and the message stays short."""
    with pytest.raises(DecodeError) as refused:
        unpack(m.Reported, b'{"accepted":' + text.encode() + b"}")
    assert len(str(refused.value)) < 120


def test_a_json_number_of_any_length_is_a_decode_error() -> None:
    """Python refuses to convert more than 4300 digits; that is the sender's fault like any other."""
    with pytest.raises(DecodeError):
        unpack(m.Reported, b'{"accepted":' + b"9" * 60_000 + b"}")


def test_json_integers_above_2_to_the_53_are_text() -> None:
    """2**53 itself is exact in every reader; everything above is text, also in lists and maps."""
    body = {"a": 2**53, "b": 2**53 + 1, "c": [U64_MAX, {"d": U64_MAX}], "e": (2**60,), "f": True}
    assert json.loads(encode(body, as_json=True)) == {
        "a": 2**53,
        "b": str(2**53 + 1),
        "c": [str(U64_MAX), {"d": str(U64_MAX)}],
        "e": [str(2**60)],
        "f": True,
    }


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("7", 7), ("18446744073709551615", U64_MAX), ("007", 7)]
)
def test_text_is_a_number_in_json(text: str, value: int) -> None:
    """Where a number belongs, and only there."""
    assert from_map(m.Reported, {"accepted": text}, text_integers=True) == m.Reported(value)


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", " 1", "1 ", "1_0", "0x1", "1.0", "²", "٣", "18446744073709551616", "9" * 21]
)
def test_other_text_is_no_number_in_json(text: str) -> None:
    """Digits only: nothing that Python's own int() would also take."""
    with pytest.raises(DecodeError, match=r"^accepted: expected an integer"):
        from_map(m.Reported, {"accepted": text}, text_integers=True)


@pytest.mark.parametrize(
    ("id_", "as_json", "read"),
    [
        (5, False, 5),
        ("5", False, "5"),
        ("5", True, 5),
        (2**60, True, 2**60),
        ("10.0.0.7", False, "10.0.0.7"),
        ("10.0.0.7", True, "10.0.0.7"),
    ],
)
def test_an_id_is_a_number_or_an_address(id_: int | str, as_json: bool, read: int | str) -> None:
    """In JSON, where large numbers are text, digits are a number."""
    assert unpack(m.OwnerQuery, encode({"id": id_}, as_json=as_json)) == m.OwnerQuery(read)


@pytest.mark.parametrize("id_", [-1, True, 1.5, None, [1]])
def test_an_id_is_nothing_else(id_: Any) -> None:
    """What fits neither alternative is refused by the field's name."""
    expected = r"^id: expected an integer from 0 to 2\*\*64-1 or text, found "
    with pytest.raises(DecodeError, match=expected):
        unpack(m.OwnerQuery, encode({"id": id_}))


def test_nil_is_read_only_where_it_belongs() -> None:
    """An unmarked chunk has no hold; its number may not be missing."""
    body: dict[str, Any] = {"chunks": [["amfid", 1, "g", None]], "version": {}}
    assert from_map(m.SessionChunks, body) == m.SessionChunks((("amfid", 1, "g", None),), {})
    body["chunks"][0][1] = None
    with pytest.raises(DecodeError, match=r"^chunks\[\]\[1\]: expected an integer"):
        from_map(m.SessionChunks, body)


# --- Bytes that are no message --------------------------------------------------------------------


def test_an_empty_body_is_an_empty_map() -> None:
    """Requests without fields need no body."""
    assert unpack(m.Empty, b"") == m.Empty()


def test_json_is_told_by_its_first_byte() -> None:
    """An empty body, and a map of msgpack, are not JSON."""
    assert [is_json(data) for data in (b"{}", b"{", b"", b"\x80", b" {}", b"[]")] == [True, True] + [
        False
    ] * 4


@pytest.mark.parametrize(
    "data",
    [
        b"\x81",  # a map that ends before its key
        b"\x80\x80",  # two maps
        b"\xc1",  # never used in msgpack
        b"\x01",
        b"\x90",
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\x81\x01\x02",  # a number for a key
        b"\x81\xc4\x01a\x01",  # bytes for a key
        b"\x81\xa1a\xa1\xff",  # text that is not UTF-8
        b"\x81\xa1a\xa3\xed\xa0\x80",  # half a surrogate pair
        b"\x81\xa1a\xc7\x03\xff\x01\x02\x03",  # a timestamp of a wrong length
        b"{",
        b"{}x",
        b'{"a":}',
        b'{"a":"\xff"}',
        b"{\x00",
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b"{1:2}",
    ],
)
def test_broken_bytes_are_a_decode_error(data: bytes) -> None:
    """Cut off, doubled, of another type, with keys that are no text, or with text that nothing can write."""
    with pytest.raises(DecodeError, match=r"^expected a m"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 10_000 + b"\x90",
        b"\x81\xa1a" * 10_000 + b"\x80",
        b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a":' * 10_000,
    ],
)
def test_nesting_without_end_is_a_decode_error(data: bytes) -> None:
    """10,000 levels exhaust no stack."""
    with pytest.raises(DecodeError):
        decode(data)


@pytest.mark.parametrize("depth", [10, 100, 400])
@pytest.mark.parametrize("as_json", [False, True])
def test_deep_values_where_a_number_belongs_are_a_decode_error(depth: int, as_json: bool) -> None:
    """As deep as the parser lets through."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    with pytest.raises(DecodeError, match=r"^accepted: expected an integer from 0 to 2\*\*64-1, found list$"):
        unpack(m.Reported, encode({"accepted": value}, as_json=as_json))


@pytest.mark.parametrize("length", [3_000, 65_536, 1_000_000])
@pytest.mark.parametrize(
    "header", [b"\xdc%b", b"\xdd\0\0%b", b"\x81\xa1a\xdc%b", b"\xde%b\xa1a", b"\x92\xc0\xdc%b"]
)
def test_headers_that_claim_more_than_there_is_cost_neither_memory_nor_time(
    header: bytes, length: int
) -> None:
    """On each of a thousand levels room for as many entries as the message has bytes: half a gigabyte for
    64 KiB, and 0.1 s; the bounds here are far from both sides."""
    claim = header % min(length - 1, 0xFFFF).to_bytes(2, "big")
    nested = claim * min(500, length // len(claim) // 2)
    data = nested + b"\x01" * (length - len(nested))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * length + 100_000


def test_json_is_utf8() -> None:
    """Python's reader would also take other encodings, which no other client would."""
    for encoding in ("utf-16-le", "utf-32-le"):
        with pytest.raises(DecodeError):
            decode('{"a":1}'.encode(encoding))


def test_extension_types_are_no_values() -> None:
    """msgpack's timestamps and extensions are neither numbers nor text."""
    for value in (msgpack.Timestamp(1), msgpack.ExtType(5, b"x")):
        with pytest.raises(DecodeError, match=r"^accepted: "):
            unpack(m.Reported, msgpack.packb({"accepted": value}))


# --- Error texts ----------------------------------------------------------------------------------

LONG = "VERYLONGINPUT" * 500


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (m.Reported, {"accepted": LONG}),
        (m.Joined, {"definitions": [LONG]}),
        (m.Join, {"pod": "a", "incarnation": 1, "pools": [LONG]}),
        (m.PodRef, {"name": LONG, "ip": "", "instance": ""}),
        (m.PodRef, {"name": "a", "ip": LONG, "instance": ""}),
        (m.Acquire, {"pod": "a", "incarnation": 1, "count": 1, "request_id": LONG}),
        (m.ChunkList, {"pod": "a", "incarnation": 1, "chunks": [[1, LONG]]}),
        (m.Report, {"pod": "a", "incarnation": 1, "chunks": [[LONG, 1, LONG, True]]}),
        (m.Renew, {"pod": "a", "incarnation": 1, "held": {LONG: 1}}),
        (m.Renew, {"pod": "a", "incarnation": 1, "use": {LONG: {"free": LONG}}}),
        (Definition, {"name": LONG}),
        (Definition, {"name": "amfid", "kind": LONG}),
        (Definition, {"name": "amfid", "unscanned": LONG}),
        (Definition, {"name": "amfid", "reserved": [[1, 2]] * 1000 + [[2, 1]]}),
    ],
)
def test_an_error_does_not_repeat_what_was_sent(kind: Any, body: dict[str, Any]) -> None:
    """At most the beginning of it; error texts go into headers and logs."""
    with pytest.raises(DecodeError) as refused:
        from_map(kind, body)
    assert len(str(refused.value)) < ERROR_LENGTH_MAX
    assert LONG[:61] not in str(refused.value)


def test_an_error_has_no_control_characters_of_the_sender() -> None:
    """A key with a line break would end a header and begin another."""
    with pytest.raises(DecodeError) as refused:
        from_map(m.Renew, {"pod": "a", "incarnation": 1, "held": {"x\r\nEvil: 1\x00ü'\ud800": 1}})
    assert str(refused.value) == (r"""held.x\r\nEvil: 1\x00\xfc'\ud800: expected a list of 2, found int 1""")


def test_a_field_too_large_for_memory_is_a_decode_error() -> None:
    """A block of 2**60 bits is refused before its size is computed."""
    with pytest.raises(
        DecodeError, match=r"block_bits: expected 1..16 and below bits, got 1152921504606846976"
    ):
        from_map(Definition, {"name": "amfid", "block_bits": 2**60})
