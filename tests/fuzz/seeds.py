"""What the search begins with: an example of every message, and what earlier searches have found."""

import json
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
GOLDEN = Path(__file__).parents[1] / "wire" / "golden.json"


def golden() -> list[bytes]:
    """Every message of the protocol, as msgpack and as JSON."""
    examples = json.loads(GOLDEN.read_text()).values()
    return [data for e in examples for data in (bytes.fromhex(e["msgpack"]), e["json"].encode())]


def found() -> dict[str, bytes]:
    """The corpus, by the names of its files."""
    return {file.name: file.read_bytes() for file in sorted(CORPUS.iterdir())}
