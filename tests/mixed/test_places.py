"""What an operator has set up so that Go pods and agents do not understand each other, and how he hears of
it."""

from typing import Any

import pytest

from drsm_agent import alarms
from drsm_agent.errors import Misconfigured
from tests.harness import POOL
from tests.mixed.fleet import PATIENT, TEST_SECONDS, Fleet

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def test_an_agent_beside_a_go_fleet_in_another_database_says_which_setting_to_change(
    fleet: Fleet,
) -> None:
    """SD-Core's AMF and SMF each have a database of their own. Beside them an agent that looks into another
    one shows no pods, and its pods would have the same ids as theirs."""
    theirs, pool = f"{fleet.domain.database}x", "elsewhere"  # in no other test: databases of theirs remain
    go = await fleet.go("amf-1", db=theirs, pool=pool)
    await go.allocate(1)
    await fleet.agent(pools=[{"name": pool}])
    line = str(await fleet.told("go_fleet_elsewhere"))
    assert theirs in line
    assert pool in line
    assert "DRSM_MONGO_DATABASE" in line


CANNOT: dict[str, dict[str, Any]] = {
    "numbers from 2^21": {"bits": 40},
    "smaller blocks": {"block_bits": 8, "slots": 200},
    "fewer slots": {"slots": 500},
    "more slots": {"slots": 1024},
    "reserved ids": {"reserved": [[5, 9]]},
    "resting ids": {"quarantine_ms": 60_000},
    "several spaces": {
        "kind": "spaces",
        "spaces": [{"name": "teid", "bits": 24}, {"name": "seid", "bits": 24}],
    },
    "addresses": {"kind": "ipv4", "ranges": ["10.0.0.0/8"]},
}


@pytest.mark.parametrize("definition", CANNOT.values(), ids=CANNOT)
async def test_a_pool_that_go_pods_would_read_otherwise_is_refused_where_they_are(
    fleet: Fleet, definition: dict[str, Any]
) -> None:
    """In their eyes a chunk has a thousand ids of 1024 numbers, always, and each may be issued."""
    go = await fleet.go("amf-1")
    await go.allocate(1)
    with pytest.raises(Misconfigured, match=POOL):
        await fleet.agent(pools=[{"name": POOL} | definition])


async def test_a_pool_that_go_pods_would_read_otherwise_raises_an_alarm_when_they_come_later(
    fleet: Fleet,
) -> None:
    """Nobody can refuse them; so the log names the pool."""
    await fleet.agent(pools=[{"name": POOL, "slots": 500}])
    go = await fleet.go("amf-1")
    await go.allocate(1)
    line = await fleet.told("go_cannot_honour")
    assert POOL in line.values()


async def test_an_index_that_expires_keepalives_at_another_time_raises_an_alarm_at_the_start(
    fleet: Fleet,
) -> None:
    """The Go pods' own attempt to make it is refused, and they take no notice. Then nobody dies in their
    eyes."""
    await fleet.collection.create_index("expireAt", name="expireAt", expireAfterSeconds=3600)
    go = await fleet.go("amf-1")
    await fleet.renewed(go)
    assert (await fleet.collection.index_information())["expireAt"]["expireAfterSeconds"] == 3600
    await fleet.agent(**PATIENT)
    line = await fleet.told("ttl_index_missing")
    assert POOL in line.values()


async def test_a_missing_index_is_noticed_while_the_agent_runs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has dropped it. As long as it was there nothing was said. (It is looked at each minute, and
    here more often.)"""
    monkeypatch.setattr(alarms, "TTL_INTERVAL", 2.0)
    go = await fleet.go("amf-1")
    await fleet.renewed(go)
    await fleet.agent(**PATIENT)
    record = await fleet.record()
    await record.renewed("amf-1", 1)
    assert fleet.lines("ttl_index_missing") == []
    await fleet.collection.drop_index("expireAt")
    await fleet.told("ttl_index_missing")
