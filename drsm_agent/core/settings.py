"""May an agent start with these settings and pool definitions, given the ones that are stored?

They change only with a higher `revision`, so that an agent left behind with an old configuration is
noticed instead of working against the others, and a pool only in ways that keep every id that was
issued where it is.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from drsm_agent.core.documents import Document, merge
from drsm_agent.core.writes import SETTINGS, Insert, Update

POOL_PREFIX = "pool:"
FIXED = ("kind", "block_bits", "database")  # they say where an id lies
FORMER = "former_liveness_ms"
GROWING = ("bits", "slots")  # what was issued stays inside


def reconcile(stored: Document | None, configured: Document) -> Insert | Update | None:
    """The write that makes `stored` what is `configured`; ValueError, with both, when that may not be."""
    if stored is None:
        return Insert(SETTINGS, configured)
    old, new = _present(stored), _present(configured)
    if old == new:
        return None
    faults = list(_faults(old, new))
    if faults:
        raise ValueError(_refusal(old, new, faults))
    gone = dict.fromkeys(old.keys() - new.keys())  # a field set to None counts as absent
    guard = {"_id": old["_id"], "revision": old["revision"]}
    return Update(SETTINGS, guard, set={**gone, **configured, **_former(old)})


def former_liveness(documents: Iterable[Document]) -> float:
    """The `L` before the last change of settings, in seconds: pods may still count on it (rule R3)."""
    return max((int(document.get(FORMER) or 0) for document in documents), default=0) / 1000


def _former(old: Document) -> Document:
    return {FORMER: old["liveness_ms"]} if "liveness_ms" in old else {}


def _faults(old: Document, new: Document) -> Iterator[str]:
    if new["revision"] <= old["revision"]:
        yield f"a change needs a revision above {old['revision']}"
    if str(old["_id"]).startswith(POOL_PREFIX):
        yield from (f"{name} cannot change" for name in FIXED if old.get(name) != new.get(name))
        yield from (f"{name} can only grow" for name in GROWING if new.get(name, 0) < old.get(name, 0))


def _refusal(old: Document, new: Document, faults: list[str]) -> str:
    what = str(old["_id"])
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return (
        f"{what}: {'; '.join(faults)}. Stored: {_some(old, names)}; configured: {_some(new, names)}. "
        "Configure what is stored, or a change that is allowed with a higher revision"
    )


def _some(document: Document, names: list[str]) -> dict[str, Any]:
    return {name: document.get(name) for name in names}


def _present(document: Document) -> Document:
    """The fields that are not None, tuples as lists: as a database gives them back."""
    fields = merge(document, {})
    return {name: value for name, value in fields.items() if value is not None and name != FORMER}
