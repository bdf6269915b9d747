"""What must hold for any bytes: a message, or a DecodeError that says why not, and nothing else."""

import dataclasses
import itertools
import re
from typing import Any

from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.codec import DecodeError

EVENTS: tuple[type[Any], ...] = tuple(m.EVENT_KINDS.values())
KINDS = [kind for kind in vars(m).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
"""All requests as the agent reads them; all answers, pages and events as the SDK does; and their parts."""


def check(data: bytes) -> None:
    """Read it as everything that it could be. What is read can be written, and is read again as the same."""
    try:
        body = codec.decode(data)
    except DecodeError:
        return
    as_json = codec.is_json(data)
    read = [message for kind in KINDS if (message := _read(kind, body, as_json=as_json)) is not None]
    for message, form in itertools.product(read, {False, as_json}):
        written = codec.encode(codec.to_map(message), as_json=form)
        again = codec.unpack(type(message), written)
        assert again == message, f"{again!r} was {message!r}"
    for head in [message for message in read if isinstance(message, m.EventHead)]:
        for event in [message for message in read if isinstance(message, EVENTS)]:
            said = m.summary(head, event)
            assert said.isascii(), said
            assert said.isprintable(), said


def _read(kind: type[Any], body: dict[str, Any], *, as_json: bool) -> Any:
    try:
        return codec.from_map(kind, body, text_integers=as_json)
    except DecodeError as error:
        said = str(error)
    assert len(said) < 1000, "an error is a few lines, whatever a stranger sent"
    return None


def traits(data: bytes) -> set[str]:
    """How `data` is read: as which messages, and why not as the others. Found values are left out."""
    try:
        body = codec.decode(data)
    except DecodeError as error:
        return {str(error)}
    found = set()
    for kind in KINDS:
        try:
            codec.from_map(kind, body, text_integers=codec.is_json(data))
            found.add(kind.__name__)
        except DecodeError as error:
            found.add(re.sub(r"[0-9.]+", "", str(error).split("found")[0]))
    return found
