"""Asking the agent for a pool's whole table: one request, many pages."""

from drsm_sdk.errors import AgentUnavailable
from drsm_sdk.rpc import Refused, Rpc, Unusable
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.transport import Message, TransportError
from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import SnapshotPage
from drsm_sdk.wire.subjects import Subjects


async def snapshot(rpc: Rpc, subjects: Subjects, pool: str, timeout: float) -> Snapshot:
    """One complete snapshot, in one try of at most `timeout` seconds. Raises DrsmError."""
    pages = Pages()
    found: list[Snapshot] = []

    def done(reply: Message) -> bool:
        if not reply.data and not reply.headers:
            return False  # the end of one agent's answer
        try:
            answer = rpc.read(reply, SnapshotPage, pool=pool)
        except Unusable:
            return False  # what cannot be used counts as not received
        if (complete := pages.add(answer.stamp, answer.body)) is not None:
            found.append(complete)
        return bool(found)

    try:
        await rpc.transport.request_many(subjects.pool(pool, "snapshot"), codec.encode({}), timeout, done)
    except TransportError as error:
        raise AgentUnavailable(str(error)) from None
    except Refused as refused:
        raise refused.error from None
    return found[0]
