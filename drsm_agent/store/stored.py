"""What all agents of a domain must agree on, kept in the database: settings and pool definitions.

Two agents with different leases or id spaces would break every promise to the pods, so the first one
stores what it was configured with, and others start only with the same (or a higher `revision`).
"""

from collections.abc import Iterable, Mapping

from drsm_agent.alone import see_nobody_lead
from drsm_agent.core.documents import Document, read_chunk
from drsm_agent.core.settings import POOL_PREFIX, changed_pool, present, reconcile
from drsm_agent.core.writes import SETTINGS, Insert, Update, first_position, first_stamp
from drsm_agent.errors import Misconfigured, StoreUnavailable
from drsm_agent.ports import Store
from drsm_sdk.wire import codec
from drsm_sdk.wire.definition import Definition

ATTEMPTS = 5  # each one lost means that another agent stored something in between

SINGLETONS = (first_position(), first_stamp())


async def ensure_stored(store: Store, configured: Iterable[Document]) -> None:
    """Make the database hold `configured` (`_id` is `settings` or `pool:<name>`) and the documents that
    are there from the start. Raises Misconfigured, showing both, where it holds something else."""
    await ensure_singletons(store)
    wanted = list(configured)
    for _ in range(ATTEMPTS):
        stored = await store.read(SETTINGS)
        writes = _differences(stored, wanted, await _in_the_way(store, stored, wanted))
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


def check_current(stored: Iterable[Document], definitions: Mapping[str, Definition]) -> None:
    """Raise Misconfigured where a pool was since changed in a way that moves chunks. Nobody led then, as far
    as was seen; who stood by unseen, cut off from NATS, must not lead with the old definition now."""
    known = {document["_id"]: document for document in stored}
    for pool in definitions.values():
        document = known.get(f"{POOL_PREFIX}{pool.name}")
        if document is None or document["revision"] <= pool.revision:
            continue
        if not _definition(document).grows_from(pool):
            raise Misconfigured(
                f"{document['_id']}: expected revision {pool.revision} in {SETTINGS}, found "
                f"{document['revision']}, which moves chunks: configure what is stored, and start again"
            )


async def _in_the_way(
    store: Store, stored: Iterable[Document], configured: Iterable[Document]
) -> dict[str, list[str]]:
    """Of each pool that changes, the owned chunks that would lie elsewhere, or nowhere. Where nothing is in
    the way, but free chunks move, all agents must have been stopped: the old leader would go on granting
    those."""
    known = {document["_id"]: document for document in stored}
    found: dict[str, list[str]] = {}
    for document in configured:
        before = known.get(document["_id"])
        if before is None or not changed_pool(before, document):
            continue
        old, new = _definition(before), _definition(document)
        database = before.get("database", "") if before.get("database") != document.get("database") else ""
        if new.grows_from(old) and not database:
            continue
        moved = await _moved(store, old, new, database)
        if not moved and document["revision"] > before["revision"]:
            await see_nobody_lead(store)
            moved = await _moved(store, old, new, database)  # who led until now may have granted some
        found[document["_id"]] = moved
    return found


async def _moved(store: Store, old: Definition, new: Definition, database: str) -> list[str]:
    """`database` is the one that the pool shall leave, empty if it stays."""
    if database:
        return [f"chunks in database {database}"] if await store.has_chunks(old.name, database) else []
    owned = [chunk for document in await store.read(old.name) if (chunk := read_chunk(document))]
    moved = sorted((chunk.n, chunk.pod) for chunk in owned if not new.keeps(old, chunk.n))
    return [f"chunk {n} of {pod}" for n, pod in moved]


def _definition(document: Document) -> Definition:
    """Raises Misconfigured for what an agent of another version has stored."""
    try:
        return codec.from_map(Definition, present(document), text_integers=True)
    except codec.DecodeError as error:
        raise Misconfigured(
            f"{document['_id']}: expected a definition in {SETTINGS}, found: {error}"
        ) from None


def _same_pool(stored: Document | None, configured: Document) -> bool:
    """Whether a pool is defined as it was, whatever fields another version writes or leaves out."""
    if stored is None or not changed_pool(stored, configured):
        return False
    same_place = stored.get("database") == configured.get("database")
    return same_place and _definition(stored) == _definition(configured)


def _differences(
    stored: Iterable[Document], configured: Iterable[Document], in_the_way: Mapping[str, list[str]]
) -> list[Insert | Update]:
    """The writes that are still needed; one message with everything that forbids them."""
    known = {document["_id"]: document for document in stored}
    writes: list[Insert | Update] = []
    refusals = []
    for document in configured:
        if _same_pool(known.get(document["_id"]), document):
            continue
        try:
            write = reconcile(known.get(document["_id"]), document, in_the_way.get(document["_id"], ()))
        except ValueError as refusal:
            refusals.append(str(refusal))
        else:
            writes += [write] if write else []
    if refusals:
        raise Misconfigured("\n".join(refusals))
    return writes
