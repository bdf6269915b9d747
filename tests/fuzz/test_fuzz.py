"""What the search for bytes that break the decoding has found, once more; `make fuzz` goes on searching."""

import pytest

from tests.fuzz.seeds import found, golden
from tests.fuzz.target import check


@pytest.mark.parametrize("data", [*golden(), *found().values()], ids=lambda data: data[:16].hex())
def test_whatever_was_found_is_read_or_refused_and_nothing_else(data: bytes) -> None:
    """As every message that it could be: what is read can be written, and is read again as the same."""
    check(data)
