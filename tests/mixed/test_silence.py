"""Go pods from which nothing is heard: what is said of them, and when their keepalive goes."""

from datetime import UTC, datetime, timedelta

import pytest

from drsm_sdk.wire import messages as m
from tests.mixed.fleet import GO_SEEN_SECONDS, PATIENT, QUICK, TEST_SECONDS, Fleet, expect, owner_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)
OVERDUE_SECONDS = 90.0
"""After the end of a keepalive; MongoDB's TTL monitor looks each minute, if nobody has changed that."""


async def test_a_silent_go_pod_is_down_but_its_keepalive_is_left_to_the_ttl_monitor(fleet: Fleet) -> None:
    """Its clock may be ahead, so that it expires later than others would. Were it deleted early, its peers
    would claim, and when it goes on it would claim its own chunks and issue their ids again 83 minutes
    later."""
    await fleet.agent(**QUICK)
    demux, asking, record = await fleet.demux(), await fleet.requester(), await fleet.record()
    await fleet.go("amf-2")
    go = await fleet.go("amf-1")
    (id_,) = await go.allocate(1)
    await fleet.renewed(go)
    go.pause()
    await fleet.change("amf-1", expireAt=datetime.now(UTC) + timedelta(hours=1))
    down = await asking.seen(lambda: asking.of(m.PodDown), GO_SEEN_SECONDS)
    assert [(one.pod.name, one.reason) for one in down] == [("amf-1", "silent")]
    assert owner_of(demux, id_).state == "down"
    await record.renewed("amf-2", 1)
    assert record.deletes("amf-1") == []
    go.go_on()
    await expect("a live Go pod", lambda: owner_of(demux, id_).state == "live")
    await record.renewed("amf-1", 1)
    assert (record.deletes("amf-1"), record.claims(), go.asked) == ([], {}, [])


async def test_where_mongodb_does_not_delete_keepalives_the_agent_does_when_they_are_overdue(
    fleet: Fleet,
) -> None:
    """Else no Go pod would ever claim from another. Not before, as a Go pod that only stood still claims
    its own chunks when its keepalive goes."""
    await fleet.collection.create_index("expireAt", name="expireAt", expireAfterSeconds=3600)
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    await fleet.go("amf-1")
    dying = await fleet.go("amf-2")
    await dying.allocate(10)
    await fleet.renewed(dying)
    await dying.kill()
    ended = datetime.now(UTC) - timedelta(seconds=OVERDUE_SECONDS - 30)
    await fleet.change("amf-2", expireAt=ended)
    (gone,) = await record.seen("a delete", lambda: record.deletes("amf-2"), GO_SEEN_SECONDS)
    assert (gone.at.replace(tzinfo=UTC) - ended).total_seconds() >= OVERDUE_SECONDS
    await fleet.until("all at the other Go pod", lambda owners: set(owners.values()) == {"amf-1"})
