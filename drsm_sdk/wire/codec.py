"""Messages to bytes and back: msgpack maps with text keys, or JSON for people with `nats req`.

A message is a frozen dataclass; its field annotations are the schema. Unknown keys are ignored, so
fields can be added; integers are unsigned 64-bit. JSON writes integers above 2**53 as text, and reads
text where a number belongs.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import msgpack

REQUEST_BYTES_MAX = 64 * 1024
"""A request is a few ids; 64 KiB is 1,500 chunks with their grants. More is refused unread."""

SMALL = 512
"""Bytes of a body that is read at once: nearly every event and request. What its headers can claim grows with
the square of its size, and is less than a megabyte here."""

U64_MAX = 2**64 - 1
JSON_INTEGER_MAX = 2**53  # the largest integer that every JSON reader keeps exact

M = TypeVar("M")
Reader = Callable[[str, Any], Any]


class DecodeError(ValueError):
    """The bytes are not the message that was expected; the text names the field and the rule."""


def is_json(data: bytes) -> bool:
    """Whether a body is JSON. `{` is 0x7b, in msgpack the integer 123, which no message starts with."""
    return data[:1] == b"{"


def encode(body: Mapping[str, Any], *, as_json: bool = False) -> bytes:
    """A map of plain values as msgpack, or as JSON."""
    if as_json:
        return json.dumps(json_safe(body), separators=(",", ":")).encode()
    return typing.cast("bytes", msgpack.packb(body))


def decode(data: bytes) -> dict[str, Any]:
    """The map in `data`. Raises DecodeError for anything else; an empty body is an empty map."""
    if not data:
        return {}
    try:
        body = _loads(data) if is_json(data) else _unpacked(data)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise DecodeError(f"expected a msgpack or JSON map, found neither ({type(error).__name__})") from None
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise DecodeError(f"expected a map with text keys, found {type(body).__name__}")
    return body


def _unpacked(data: bytes) -> Any:
    """A large body is skipped over first, which takes no memory: msgpack makes room for every entry that a
    header claims; 60 KB of nested ones claim half a gigabyte, and take 0.1 s, before the end is missed."""
    if len(data) > SMALL:
        skimmed = msgpack.Unpacker(max_buffer_size=len(data), read_size=len(data))
        skimmed.feed(data)
        skimmed.skip()
    return msgpack.unpackb(data, strict_map_key=True)


def _loads(data: bytes) -> Any:
    body = json.loads(data.decode())  # of bytes it would also take UTF-16 and UTF-32
    json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is text that nothing can write
    return body


def to_map(message: Any) -> dict[str, Any]:
    """The plain map of a message: dataclasses become maps, tuples lists."""
    return {name: _plain(getattr(message, name)) for name in _field_names(message.__class__)}


def from_map(kind: type[M], body: Mapping[str, Any], *, text_integers: bool = False) -> M:
    """A message of `kind` out of a decoded map. Raises DecodeError that names the first bad field."""
    return typing.cast("M", _message_reader(typing.cast("Any", kind), text_integers)("", body))


def unpack(kind: type[M], data: bytes) -> M:
    """`decode` and `from_map` in one step."""
    return from_map(kind, decode(data), text_integers=is_json(data))


def _plain(value: Any) -> Any:
    if value.__class__ is int or value.__class__ is str:  # nearly all: a snapshot is 100,000 numbers
        return value
    if dataclasses.is_dataclass(value):
        return to_map(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def json_safe(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > JSON_INTEGER_MAX:
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


# Readers are built once per message type, so that reading an event costs no look at annotations.


@cache
def _message_reader(kind: Any, text_integers: bool) -> Reader:
    hints = typing.get_type_hints(kind)
    readers = {
        field.name: (_reader(hints[field.name], text_integers), _has_default(field))
        for field in dataclasses.fields(kind)
    }

    def read(path: str, body: Any) -> Any:
        if not isinstance(body, dict):
            raise DecodeError(f"{path or 'body'}: expected a map, found {_name(body)}")
        values = {}
        for name, (reader, optional) in readers.items():
            where = f"{path}.{name}" if path else name
            if name in body:
                values[name] = reader(where, body[name])
            elif not optional:
                raise DecodeError(f"{where}: missing")
        try:
            return kind(**values)
        except ValueError as error:  # a message's own rule (__post_init__)
            raise DecodeError(f"{path + ': ' if path else ''}{error}") from None

    return read


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _reader(hint: Any, text_integers: bool) -> Reader:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return _read_text_integer if text_integers else _read_integer
    if hint in (str, bool):
        return _read_exactly(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_either(args, text_integers)
    if origin is tuple and args[-1] is not Ellipsis:
        return _read_row([_reader(arg, text_integers) for arg in args])
    if origin in (list, tuple):
        return _read_list(_reader(args[0], text_integers))
    if origin is dict:
        return _read_dict(_reader(args[1], text_integers))
    return _message_reader(hint, text_integers)


_EXPECTED = {int: "an integer from 0 to 2**64-1", str: "text", types.NoneType: "nil"}


def _read_integer(path: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= U64_MAX:
        raise DecodeError(f"{path}: expected {_EXPECTED[int]}, found {_name(value)}")
    return value


def _read_text_integer(path: str, value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(U64_MAX)):
        value = int(value)
    return _read_integer(path, value)


def _read_exactly(kind: type) -> Reader:
    def read(path: str, value: Any) -> Any:
        if type(value) is not kind:
            raise DecodeError(f"{path}: expected {kind.__name__}, found {_name(value)}")
        return value

    return read


def _read_either(alternatives: tuple[Any, ...], text_integers: bool) -> Reader:
    nullable = types.NoneType in alternatives
    readers = [_reader(kind, text_integers) for kind in alternatives if kind is not types.NoneType]
    expected = " or ".join(_EXPECTED.get(kind, "a map") for kind in alternatives)

    def read(path: str, value: Any) -> Any:
        if value is None and nullable:
            return None
        if len(readers) == 1:
            return readers[0](path, value)
        for reader in readers:
            try:
                return reader(path, value)
            except DecodeError:
                continue
        raise DecodeError(f"{path}: expected {expected}, found {_name(value)}")

    return read


def _read_row(readers: list[Reader]) -> Reader:
    def read(path: str, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise DecodeError(f"{path}: expected a list of {len(readers)}, found {_name(value)}")
        return tuple(
            reader(f"{path}[{i}]", item) for i, (reader, item) in enumerate(zip(readers, value, strict=True))
        )

    return read


def _read_list(reader: Reader) -> Reader:
    def read(path: str, value: Any) -> Any:
        if not isinstance(value, list):
            raise DecodeError(f"{path}: expected a list, found {_name(value)}")
        where = f"{path}[]"
        return tuple([reader(where, item) for item in value])

    return read


def _read_dict(reader: Reader) -> Reader:
    def read(path: str, value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise DecodeError(f"{path}: expected a map with text keys, found {_name(value)}")
        return {key: reader(f"{path}.{ascii(key)[1:-1][:40]}", item) for key, item in value.items()}

    return read


def _name(value: Any) -> str:
    """How an error names what it found: never long, whatever a stranger sent."""
    shown = repr(value) if isinstance(value, int | float | bool | None) else ""
    return f"{type(value).__name__} {shown[:24]}".rstrip()
