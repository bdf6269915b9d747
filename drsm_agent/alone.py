"""Is any agent at work? What must not happen beside one asks first."""

import asyncio

from drsm_agent.core import writes
from drsm_agent.errors import Misconfigured
from drsm_agent.ports import Store

LOOKS_PER_LEASE = 3


async def see_nobody_lead(store: Store, leader_ttl: float = 0.0) -> None:
    """Return once it is seen that no agent leads. It takes the leader's `T`, or `leader_ttl` seconds: its
    record changes with each renewal, and a standby takes it over within `T`. Raises Misconfigured while one
    does, StoreUnavailable."""
    first = await _leader(store)
    longest = max(leader_ttl, first.ttl_ms / 1000 if first else 0.0)
    for _ in range(LOOKS_PER_LEASE + 1):
        await asyncio.sleep(longest / LOOKS_PER_LEASE)
        if (now := await _leader(store)) != first:
            holder = now.holder if now and now.holder else "somebody"
            raise Misconfigured(
                f"Expected all agents to be stopped, found that {holder} leads: stop them all, "
                "the standbys too, and run this again"
            )


async def _leader(store: Store) -> writes.LeaderRecord | None:
    return writes.read_leader(await store.read(writes.LEADER))
