"""May an agent start with these settings and pool definitions, given the ones that are stored?

They change only with a higher `revision`, so that an agent left behind with an old configuration is
noticed instead of working against the others, and a pool only in ways that leave every owned chunk where
it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from drsm_agent.core.documents import Document, merge
from drsm_agent.core.writes import SETTINGS, Insert, Update

POOL_PREFIX = "pool:"
NAMED_MAX = 10
"""Chunks that a refusal names."""
FORMER = "former_liveness_ms"


def reconcile(
    stored: Document | None, configured: Document, in_the_way: Sequence[str] = ()
) -> Insert | Update | None:
    """The write that makes `stored` what is `configured`; ValueError, with both, when that may not be.
    `in_the_way` names owned chunks that would not stay where they are."""
    if stored is None:
        return Insert(SETTINGS, configured)
    old, new = present(stored), present(configured)
    if old == new:
        return None
    faults = list(_faults(old, new, in_the_way))
    if faults:
        raise ValueError(_refusal(old, new, faults))
    gone = dict.fromkeys(old.keys() - new.keys())  # a field set to None counts as absent
    guard = {"_id": old["_id"], "revision": old["revision"]}
    return Update(SETTINGS, guard, set={**gone, **configured, **_former(old)})


def former_liveness(documents: Iterable[Document]) -> float:
    """The longer of the stored `L` and the one before the last change of it, in seconds: pods may count on
    either (rule R3), whatever this agent was started with."""
    durations = [int(document.get(name) or 0) for document in documents for name in (FORMER, "liveness_ms")]
    return max(durations, default=0) / 1000


def pools_of(documents: Iterable[Document]) -> set[str]:
    """All pools that were ever defined, on the list or not."""
    keys = (str(document["_id"]) for document in documents)
    return {key.removeprefix(POOL_PREFIX) for key in keys if key.startswith(POOL_PREFIX)}


def _former(old: Document) -> Document:
    return {FORMER: old["liveness_ms"]} if "liveness_ms" in old else {}


def changed_pool(stored: Document | None, configured: Document) -> bool:
    """Whether a pool's definition changes."""
    is_pool = str(configured["_id"]).startswith(POOL_PREFIX)
    return is_pool and stored is not None and present(stored) != present(configured)


def _faults(old: Document, new: Document, in_the_way: Sequence[str]) -> Iterator[str]:
    if new["revision"] <= old["revision"]:
        yield f"a change needs a revision above {old['revision']}: raise {_revision_of(str(old['_id']))}"
    if in_the_way:
        more = len(in_the_way) - NAMED_MAX
        named = ", ".join(in_the_way[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
        yield f"these would not stay where they are: {named}; have them given back first"


def _revision_of(what: str) -> str:
    """What an operator raises."""
    if what.startswith(POOL_PREFIX):
        return f"`revision` of pool {what.removeprefix(POOL_PREFIX)} in DRSM_POOLS"
    return "DRSM_SETTINGS_REVISION"


def _refusal(old: Document, new: Document, faults: list[str]) -> str:
    what = str(old["_id"])
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return (
        f"{what}: {'; '.join(faults)}. Stored: {_some(old, names)}; configured: {_some(new, names)}. "
        "Or configure what is stored"
    )


def _some(document: Document, names: list[str]) -> dict[str, Any]:
    return {name: document.get(name) for name in names}


def present(document: Document) -> Document:
    """The fields that are not None, tuples as lists: as a database gives them back."""
    fields = merge(document, {})
    return {name: value for name, value in fields.items() if value is not None and name != FORMER}
