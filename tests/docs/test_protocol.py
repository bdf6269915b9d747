"""The page for clients in other languages has every field of every document that the agent writes."""

import re
from pathlib import Path

import pytest

from drsm_agent import settings
from drsm_agent.core import writes
from drsm_agent.core.documents import Document, Owner, Session
from drsm_agent.core.position import Position
from drsm_agent.core.restore import Restored
from drsm_agent.core.settings import FORMER
from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.service import stored_settings

PAGE = (Path(__file__).parents[2] / "docs/protocol.md").read_text().partition("## MongoDB documents")[2]
OWNER = Owner("amf-1", "10.0.0.7", "nf-1", 1)
SETTINGS = stored_settings(settings.load(pools=[{"name": "amfid"}]))[0]


def _set_by(*written: writes.Insert | writes.Update) -> set[str]:
    fields: set[str] = set()
    for write in written:
        if isinstance(write, writes.Insert):
            fields |= write.document.keys()
        else:
            fields |= write.set.keys() | write.inc.keys() | write.add_to_set.keys()
    return fields - {"_id"}


def _row(collection: str, document: str) -> str:
    """The row of the table of the agent's own collections; only the first of a collection names it."""
    rows = PAGE[PAGE.index(f"| `{collection}`") :]
    return next(line for line in rows.splitlines() if f"| `{document}" in line)


LEAD = writes.LeaderRecord(holder="a", term=1, counter=0, ttl_ms=3000)
SESSION = Session(
    "amf-1", "10.0.0.7", "nf-1", 1, term=1, state="opened", pools=(), request_id="r", promised_ms=1
)
POSITION: Document = Position("t", 1, {"amfid": (1, 0)}).document("0" * 16)
WRITTEN = [
    (SESSIONS, "<pod>", _set_by(writes.open_session(SESSION), writes.end_session("amf-1", 1, "closed", 1))),
    (
        writes.LEADER,
        "leader",
        _set_by(writes.first_lead(LEAD), writes.stand_by(), writes.note_hand_over(LEAD, handed_over=True)),
    ),
    (STAMPS, "stamp", _set_by(writes.first_stamp(), writes.touch_stamp(1, "a"))),
    (writes.POSITION, "position", _set_by(writes.first_position(), writes.save_position(1, POSITION))),
    (writes.SETTINGS, "settings", {*SETTINGS, FORMER} - {"_id"}),
    (writes.SETTINGS, "restored", Restored(1, 1, 1).document.keys() - {"_id"}),
]


@pytest.mark.parametrize(("collection", "document", "fields"), WRITTEN, ids=[row[1] for row in WRITTEN])
def test_every_field_that_the_agent_keeps_is_documented(
    collection: str, document: str, fields: set[str]
) -> None:
    """In the row of its document; a value that is a map may say so in braces."""
    documented = set(re.findall(r"`(\w+)(?:\{[^`]*)?`", _row(collection, document)))
    assert fields - documented == set()


def test_every_field_of_a_pools_documents_is_in_the_examples() -> None:
    """Chunk and keepalive, with the sub-document `drsm`."""
    chunk = writes.allocate("amfid", 3, OWNER, "0" * 16, "r").document
    keepalive = writes.mirror_keepalive("amfid", OWNER, None).document
    fields = {*chunk, *keepalive, *chunk["drsm"], *keepalive["drsm"]}
    assert fields - set(re.findall(r'"(\w+)":', PAGE)) == set()
