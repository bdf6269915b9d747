"""A fleet that is replaced pod by pod, while all others issue: under the same names, as in a StatefulSet,
and under others, as in a Deployment.

The next pod is replaced as soon as the last one runs, as Kubernetes does it, and not when all chunks have
moved.
"""

import pytest

from drsm_sdk import Demux
from tests.mixed.fleet import Fleet, expect, looked_at

SAME, OTHER = ["amf-0", "amf-1", "amf-2"], ["new-0", "new-1", "new-2"]
BOTH = pytest.mark.parametrize("names", [SAME, OTHER], ids=["under the same names", "under other names"])
RATE = 50
IDS = 100
MOVED_SECONDS = 90.0


async def issued(fleet: Fleet, name: str) -> None:
    """Wait until a pod has issued some more."""
    so_far = len(fleet.ledger.of(name))
    await expect(f"ids of {name}", lambda: len(fleet.ledger.of(name)) >= so_far + IDS, 60)


async def all_at(fleet: Fleet, demux: Demux, living: set[tuple[str, int | None, str]]) -> None:
    """Wait until each id that was ever issued is routed to one of these."""

    async def routed() -> set[tuple[str, int | None, str]]:
        owners = [demux.owner(id_) for id_ in fleet.ledger.of_each_chunk()]
        return {(owner.name, owner.incarnation, owner.state) if owner else ("", None, "") for owner in owners}

    await looked_at("every id at the new pods", routed, lambda routed: routed <= living, MOVED_SECONDS)
