"""`python -m tests.fuzz --seconds 60`: bytes that reach every line of the decoding, guided by coverage.

What reaches something new is written to `.fuzz`, where the next run goes on from; `--keep` then copies to the
corpus what that does not have. A failure ends it, with the bytes in a file `crash-...`: put that file into
`tests/fuzz/corpus` and mend the fault.
"""

import argparse
import dataclasses
import hashlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing; the extra `dev` has it on Linux on x86-64, with Python 3.11 to 3.14")

with atheris.instrument_imports(include=["drsm_sdk.wire"]):
    from drsm_sdk.wire import codec
    from tests.fuzz.target import KINDS, check, traits

from tests.fuzz.seeds import CORPUS, found, golden

FOUND = Path(".fuzz")
LENGTH_MAX = 2048
"""Bytes of an input. Sizes have bounds of their own, with tests of their own."""
KEPT_MAX = 256
"""Bytes of an input that is kept."""


NAMES = sorted({field.name for kind in KINDS for field in dataclasses.fields(kind)})
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 255, 2**53, 2**53 + 1, 2**64 - 1, 2**64, 1.5, "", "a", "amf-1", "amfid", "1"),
    *("0" * 16, "\N{GRINNING FACE}", "\ud800", "\x00", b"", [], {}),
)


def mutated(data: bytes, size: int, seed: int) -> bytes:
    """Half of the time another value under a name of the protocol, which chance alone would hardly find."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        try:
            body = codec.decode(data)
            for _ in range(chance.randint(1, 4)):
                body[chance.choice(NAMES)] = value(chance, 3)
            return codec.encode(body, as_json=codec.is_json(data))[:size]
        except (TypeError, ValueError, OverflowError):
            pass
    return bytes(atheris.Mutate(data, size))


def value(chance: random.Random, depth: int) -> Any:
    kind = chance.random() if depth else 0.0
    if kind < 0.5:
        return chance.choice(VALUES)
    if kind < 0.75:
        return [value(chance, depth - 1) for _ in range(chance.randint(0, 4))]
    return {chance.choice(NAMES): value(chance, depth - 1) for _ in range(chance.randint(0, 6))}


def keep() -> None:
    """Copy to the corpus, the shortest first, what is read in a way that nothing there is."""
    seen = {trait for data in (*golden(), *found().values()) for trait in traits(data)}
    for data in sorted((file.read_bytes() for file in FOUND.iterdir()), key=lambda data: (len(data), data)):
        if len(data) <= KEPT_MAX and (new := traits(data) - seen):
            seen |= new
            (CORPUS / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="no search: copy to the corpus what is new to it")
    arguments = parser.parse_args()
    FOUND.mkdir(exist_ok=True)
    if arguments.keep:
        keep()
        return
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder, "seeds")
        seeds.mkdir()
        for number, data in enumerate(golden()):
            Path(seeds, str(number)).write_bytes(data)
        if arguments.keep:
            options = ["-merge=1", f"-max_len={KEPT_MAX}", str(CORPUS), str(FOUND), str(seeds)]
        else:
            options = [f"-max_total_time={arguments.seconds}", "-timeout=5", f"-max_len={LENGTH_MAX}"]
            options += [str(FOUND), str(CORPUS), str(seeds)]
        atheris.Setup([sys.argv[0], *options], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
