"""What breaks inside the SDK, or comes broken from outside, is told at once and as a DrsmError."""

import asyncio
from collections.abc import Callable

import pytest

from drsm_sdk import BadRequest, Demux, Drsm, Failed, Pod
from drsm_sdk.ambient import Chance
from drsm_sdk.errors import AgentUnavailable
from drsm_sdk.follow import Follower
from drsm_sdk.rpc import Refused, Rpc
from drsm_sdk.session import RENEW_LONGEST, RENEW_SHORTEST, _period
from drsm_sdk.testing import Domain
from drsm_sdk.testing.bus import Bus, MemoryTransport
from drsm_sdk.transport import Message
from drsm_sdk.wire.messages import ERROR_CODE_HEADER, Empty
from drsm_sdk.wire.subjects import Subjects
from tests.sdk.fake_agent import eventually

POD = Pod("amf-1", "10.0.0.1", "i")


class Broken(MemoryTransport):
    """A transport that breaks its promise to raise nothing but TransportErrors."""

    async def request_many(
        self, subject: str, data: bytes, timeout: float, done: Callable[[Message], bool]
    ) -> None:
        raise RuntimeError("broken")


@pytest.fixture
def transport() -> Broken:
    return Broken(Bus(), "amf-1")


async def test_entering_fails_at_once_when_a_task_of_the_pod_breaks(transport: Broken) -> None:
    """G7: not after the time-out, and not as if the agent were silent."""
    with pytest.raises(Failed) as failed:
        async with asyncio.timeout(5.0), Drsm.connect("nats://x", POD, transport=transport, timeout=60.0):
            pass
    assert isinstance(failed.value.__cause__, RuntimeError)


async def test_entering_fails_at_once_when_a_task_of_the_demux_breaks(transport: Broken) -> None:
    with pytest.raises(Failed):
        async with (
            asyncio.timeout(5.0),
            Demux.connect("nats://x", "amfid", transport=transport, timeout=60.0),
        ):
            pass


async def test_who_waits_to_join_is_told_when_the_pod_leaves() -> None:
    """As an error that a task group does not swallow."""
    async with Domain("amfid") as domain, asyncio.timeout(10.0):
        async with domain.drsm(POD) as drsm:
            domain.cut("amf-1")
            joining = asyncio.create_task(drsm.join("amfid", timeout=60.0))
            await asyncio.sleep(0)  # it has begun to wait
        with pytest.raises(Exception, match="closed"):
            await joining


@pytest.mark.parametrize("code", ["9" * 5000, "", "-1", "٣٣٣", "4e2"])
def test_an_error_code_that_is_none_is_the_agents_fault(code: str) -> None:
    """Python refuses to read an integer of thousands of digits; one answer must not end the pod."""
    rpc = Rpc(MemoryTransport(Bus()), lambda: 0.0, Chance())
    with pytest.raises(Refused) as refused:
        rpc.read(Message("s", b"", {ERROR_CODE_HEADER: code}), Empty)
    assert isinstance(refused.value.error, AgentUnavailable)


def test_a_renewal_period_that_is_nonsense_is_neither_a_busy_loop_nor_for_ever() -> None:
    assert _period(500) == 0.5
    assert _period(0) == RENEW_SHORTEST
    assert _period(2**64 - 1) == RENEW_LONGEST


async def test_a_killed_pod_does_not_come_back_with_its_successors_connection() -> None:
    """The stand-in: `mend` is for the living."""
    async with Domain("amfid") as domain, domain.drsm(POD) as dead:
        domain.kill("amf-1")
        async with domain.drsm(POD) as successor:
            domain.cut("amf-1")
            domain.mend("amf-1")
            await successor.join("amfid")
            assert not dead._transport.connected
            await eventually(lambda: successor.state == "live")


@pytest.mark.parametrize("subject", ["drsm.evt.amfid.sync", "Drsm.Evt.amfid.sync", "DRSM.rpc.pools"])
def test_subjects_of_the_domain_are_known_in_any_case(subject: str) -> None:
    """nats-py tells in lower case which one the server refused."""
    assert Subjects("drsm").ours(subject)
    assert not Subjects("drsm").ours(f"x.{subject}")


async def test_joining_without_async_with_is_a_bad_request_that_says_so() -> None:
    async with Domain("amfid") as domain:
        with pytest.raises(BadRequest, match="async with"):
            await domain.drsm(POD).join("amfid")
    with pytest.raises(RuntimeError, match="async with"):
        Domain("amfid").transport()


def test_doubts_that_lie_far_apart_are_no_lasting_dispute() -> None:
    """One sync that says something else before a partition and one after it prove no forgery."""
    now = [0.0]
    rpc = Rpc(MemoryTransport(Bus()), lambda: now[0], Chance())
    follower = Follower(rpc, Subjects("drsm"), "amfid", clock=lambda: now[0], chance=Chance())
    follower.mirror.loaded = True
    for now[0] in (0.0, 100.0, 102.0):
        follower._dispute()
    assert follower.mirror.loaded
    for second in range(104, 140, 2):
        now[0] = float(second)
        follower._dispute()
    assert not follower.mirror.loaded
