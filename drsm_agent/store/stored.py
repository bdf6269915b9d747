"""What all agents of a domain must agree on, kept in the database: settings and pool definitions.

Two agents with different leases or id spaces would break every promise to the pods, so the first one
stores what it was configured with, and others start only with the same (or a higher `revision`).
"""

from collections.abc import Iterable

from drsm_agent.core.documents import Document
from drsm_agent.core.settings import reconcile
from drsm_agent.core.writes import SETTINGS, Insert, Update, first_position, first_stamp
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.ports import Store

ATTEMPTS = 5  # each one lost means that another agent stored something in between

SINGLETONS = (first_position(), first_stamp())


async def ensure_stored(store: Store, configured: Iterable[Document]) -> None:
    """Make the database hold `configured` (`_id` is `settings` or `pool:<name>`) and the documents that
    are there from the start. Raises Misconfigured, showing both, where it holds something else."""
    await ensure_singletons(store)
    wanted = list(configured)
    for _ in range(ATTEMPTS):
        writes = _differences(await store.read(SETTINGS), wanted)
        if not writes:
            return
        await store.write(writes)
    raise StoreUnavailable(
        f"Other agents changed {SETTINGS} {ATTEMPTS} times meanwhile; start only one revision"
    )


async def ensure_singletons(store: Store) -> None:
    """The documents whose guards need something to match. Harmless where they are there."""
    for singleton in SINGLETONS:
        await store.write([singleton])


def _differences(stored: Iterable[Document], configured: Iterable[Document]) -> list[Insert | Update]:
    """The writes that are still needed; one message with everything that forbids them."""
    known = {document["_id"]: document for document in stored}
    writes: list[Insert | Update] = []
    refusals = []
    for document in configured:
        try:
            write = reconcile(known.get(document["_id"]), document)
        except ValueError as refusal:
            refusals.append(str(refusal))
        else:
            writes += [write] if write else []
    if refusals:
        raise Misconfigured("\n".join(refusals))
    return writes
