"""An in-memory stand-in for NATS, MongoDB and the agent, for applications' own tests.

The application's real `Drsm` and `Demux` run on it, in one process and event loop, with no server:

    async with Domain("amfid") as domain:
        async with domain.drsm(Pod("amf-1", "10.0.0.1", "i")) as drsm, domain.demux("amfid") as demux:
            pool = await drsm.join("amfid")
            assert demux.owner(await pool.allocate()).name == "amf-1"

It passes the same behaviour tests as the real agent (`tests/integration/test_sdk_behaviour.py`). It leaves
out what one process cannot show or an application cannot see:

- It survives nothing and restores nothing: no database, no restored one, no change of history.
- `hold` is a number of its own, by default 0. With one shorter than the allocation lease, a pod that is
  killed or cut off but still used by the test can issue an id that its successor issues too; on the real
  agent the hold is what rules that out.
- Leases are not shortened for clocks that differ: there is one clock. The liveness lease does not grow with
  the number of pods, and that many pods fall silent at once makes it no more careful.
- No Go DRSM pods, no requests in JSON, no `give_back`, no `Nats-Msg-Id`; a snapshot is one page. `*` in a
  subscription means nothing.
"""

from drsm_sdk.testing.bus import MemoryTransport
from drsm_sdk.testing.domain import Domain
from drsm_sdk.wire.definition import Definition

__all__ = ["Definition", "Domain", "MemoryTransport"]
