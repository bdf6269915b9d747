"""The stored position: what was published, and whether a table can go on from there."""

from drsm_agent.core.position import Position, Published, read_published
from drsm_agent.core.table import Hashes, Table
from drsm_agent.core.writes import first_position

HASHES = Hashes(ownership=lambda n, name, i: n + i, holding=lambda n, grant, marked: n)
FAR = (2**32 - 1) << 32 | 2**32 - 1
"""The last cluster time that there is, in the year 2106: more than BSON's integers hold."""


def test_a_position_is_read_as_it_was_stored() -> None:
    document = Position("token", FAR, {"amfid": (FAR, 3), "smfid": (7, 0)}).document("0" * 16)
    assert read_published([document]) == Published("0" * 16, FAR, {"amfid": (FAR, 3), "smfid": (7, 0)})
    assert all(not isinstance(value, int) for value in document.values())


def test_nothing_was_published_before_the_first_position_was_saved() -> None:
    assert read_published([]) is None
    assert read_published([first_position().document]) is None


def test_only_a_table_that_began_before_the_position_goes_on_from_it() -> None:
    """What came between the position and the table's begin is in nobody's log."""
    published = Published("0" * 16, 10, {})
    assert published.is_continued_by(Table(["amfid"], 9, HASHES))
    assert published.is_continued_by(Table(["amfid"], 10, HASHES))
    assert not published.is_continued_by(Table(["amfid"], 11, HASHES))


def test_a_pool_that_is_new_since_the_position_goes_on_from_the_beginning() -> None:
    published = Published("0" * 16, 10, {"amfid": (8, 2), "gone": (9, 0)})
    assert published.versions_of(Table(["amfid", "new"], 9, HASHES)) == {"amfid": (8, 2), "new": (0, 0)}
