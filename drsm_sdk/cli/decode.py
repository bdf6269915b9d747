"""One message of the protocol as text: the filter behind `nats sub 'drsm.>' --translate 'drsm decode'`."""

import json
import math
from typing import Any

from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import printable

BODY_MAX = 64 * 1024 * 1024
"""The largest max_payload that a NATS server can be given."""
NAME_MAX = 40
"""No name of a field is as long; a stranger's shall not widen every line."""


def as_text(data: bytes) -> str:
    """A body's fields, one per line, values as JSON. Raises DecodeError for what is no message."""
    if not data:
        return "(empty)"
    fields = {printable(name)[:NAME_MAX]: value for name, value in plain_fields(data).items()}
    width = max(map(len, fields), default=0)
    return "\n".join(f"{name:{width}} {json.dumps(value)}" for name, value in fields.items()) or "{}"


def as_json(data: bytes) -> str:
    """The same as one line of JSON, integers above 2**53 as text. Raises DecodeError."""
    return codec.encode(plain_fields(data), as_json=True).decode()


def plain_fields(data: bytes) -> dict[str, Any]:
    """A body's fields with values that JSON has. Raises DecodeError."""
    try:
        fields: dict[str, Any] = _plain(codec.decode(data))
        json.dumps(fields)
    except RecursionError:
        raise codec.DecodeError("expected a message, found one that is nested without end") from None
    return fields


def _plain(value: Any) -> Any:
    """What msgpack can hold and JSON cannot: only strangers send it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
