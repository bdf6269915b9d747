"""Asking the agent for a pool's whole table: one request, many pages."""

from drsm_sdk.errors import AgentUnavailable
from drsm_sdk.rpc import Refused, Rpc, Unusable
from drsm_sdk.snapshot import Pages, Snapshot
from drsm_sdk.transport import Message, NoAnswer, TransportError
from drsm_sdk.wire import codec
from drsm_sdk.wire.messages import STAMPED_BYTES_MAX, SnapshotEnd, SnapshotPage, Version
from drsm_sdk.wire.subjects import Subjects

CUT_OFF = (
    "expected the pages of a snapshot and its end, found {pages} of them and no end: NATS did not deliver "
    "the rest. If agents and pods are in different NATS accounts, give the export of drsm.rpc.> the response "
    "type stream"
)


async def snapshot(rpc: Rpc, subjects: Subjects, pool: str, timeout: float) -> Snapshot:
    """One complete snapshot, in one try of at most `timeout` seconds. Raises DrsmError. It waits for the end,
    too: a set-up that delivers one answer only works until a table has two pages, and is told at once."""
    pages = Pages()
    found: dict[tuple[str, Version], Snapshot] = {}
    ended: list[Snapshot] = []
    received = 0

    def done(reply: Message) -> bool:
        nonlocal received
        if not rpc.is_answer(reply):
            return False
        try:
            if _is_end(reply):
                end = rpc.read(reply, SnapshotEnd)
                if complete := found.get((end.stamp.agent, end.body.version)):
                    ended.append(complete)
                return bool(ended)
            answer = rpc.read(reply, SnapshotPage, pool=pool)
        except Unusable:
            return False  # what cannot be used counts as not received
        received += 1
        if (complete := pages.add(answer.stamp, answer.body)) is not None:
            found[answer.stamp.agent, complete.version] = complete
        return False

    epoch = rpc.transport.epoch
    try:
        with rpc.naming_strangers():
            await rpc.transport.request_many(subjects.pool(pool, "snapshot"), codec.encode({}), timeout, done)
    except NoAnswer as error:
        cut_off = received and rpc.transport.epoch == epoch
        raise AgentUnavailable(CUT_OFF.format(pages=received) if cut_off else str(error)) from None
    except TransportError as error:
        raise AgentUnavailable(str(error)) from None
    except Refused as refused:
        raise refused.error from None
    return ended[0]


def _is_end(reply: Message) -> bool:
    """Whether it is what follows the last page. (Pages are not read for that; they may be large.)"""
    if len(reply.data) > STAMPED_BYTES_MAX:
        return False
    try:
        return "pages" in codec.decode(reply.data)
    except codec.DecodeError:
        return False
