"""`drsm-agent restored`: announce that the database was restored from a backup.

One guarded write. What it sets in motion is the next leader's work (`leader`, `restorer`).
"""

from collections.abc import Sequence

from drsm_agent.alone import see_nobody_lead
from drsm_agent.core import writes
from drsm_agent.core.documents import Document, Session, read_session
from drsm_agent.core.restore import TERMS_AHEAD, Restored, announce, read_restored
from drsm_agent.core.table import SESSIONS, STAMPS
from drsm_agent.errors import Misconfigured
from drsm_agent.ports import Store


async def announce_restored(store: Store, leader_ttl: float, allocation_ms: int) -> Restored:
    """Announce it; takes `T`, to see that no agent leads. `leader_ttl` in seconds.

    Raises Misconfigured while agents run, StoreUnavailable.
    """
    await see_nobody_lead(store, leader_ttl)
    settings = await store.read(writes.SETTINGS)
    sessions = [session for d in await store.read(SESSIONS) if (session := read_session(d))]
    before = read_restored(settings)
    restored = Restored(
        term=await _highest_term(store, sessions, before) + TERMS_AHEAD,
        incarnation=max((session.incarnation for session in sessions), default=0),
        allocation_ms=max(_stored_allocation(settings), allocation_ms, before.allocation_ms if before else 0),
        unsettled=_pools(settings, before),
    )
    if not (await store.write([announce(before, restored)])).changed:
        raise Misconfigured(
            "Expected to be alone, found another announcement just now: look at the agents' log"
        )
    return restored


async def _highest_term(store: Store, sessions: Sequence[Session], before: Restored | None) -> int:
    """Of all that the database knows."""
    terms = [before.term] if before else [0]
    terms += [term for session in sessions for term in (session.term, session.incarnation >> 32)]
    for space in (writes.LEADER, writes.POSITION, STAMPS):
        terms += [int(document.get("term", 0)) for document in await store.read(space)]
    return max(terms)


def _pools(settings: Sequence[Document], before: Restored | None) -> tuple[str, ...]:
    """All that pods may hold chunks of which were taken from them in the time that was lost."""
    listed = {pool for d in settings if d["_id"] == "settings" for pool in d.get("pools", ())}
    return tuple(sorted(listed.union(before.unsettled if before else ())))


def _stored_allocation(settings: Sequence[Document]) -> int:
    return max((int(d.get("allocation_ms", 0)) for d in settings if d["_id"] == "settings"), default=0)
