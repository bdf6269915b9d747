"""Safeguards, each with a way to switch it off: what the simulator must then find.

A patch replaces one function by the same without its safeguard; everything else is as in production.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from drsm_agent import allocations, reaper, sessions
from drsm_agent.core import election, writes
from drsm_agent.core.documents import Document, Session, chunk_key
from drsm_agent.core.numbers import FreeNumbers
from drsm_agent.core.placement import hold_ms
from drsm_agent.core.session import LivenessLeases
from drsm_agent.errors import BusUnavailable
from drsm_agent.lead import Lead
from drsm_agent.leader import Leader
from drsm_agent.reign import Grants
from drsm_agent.relay import Relay
from drsm_agent.restorer import Restorer
from drsm_agent.sessions import Sessions
from drsm_sdk import PoolEmpty
from drsm_sdk import pool as sdk_pool
from drsm_sdk.mirror import Mirror
from drsm_sdk.pool import Pool
from drsm_sdk.rpc import Rpc
from drsm_sdk.stock import Stock
from tests.simulation.profiles import (
    ABSENCES,
    CLOCKS,
    INHERITANCE,
    LAGGING,
    LATE_ANSWERS,
    LATE_CLAIMS,
    LATE_DEATHS,
    LATE_WRITES,
    LEADERS,
    LOSSES,
    NAMESAKES,
    PARTITIONS,
    RECONNECTS,
    RESTING,
    RESTLESS,
    RESTORES,
    RETURNING,
    SCARCE,
    SHRINKING,
    SLOW_TO_SHOW,
    STOPS,
    WAVERING,
)
from tests.simulation.world import ANY, Profile

Patch = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Ablation:
    """One safeguard: where it is written down, and the patches that take it out. `hint` is a seed that showed
    its want once, and is tried first."""

    name: str
    rule: str
    profile: Profile
    patches: tuple[Patch, ...]
    hint: int = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target, attribute, value in self.patches:
                stack.enter_context(patch.object(target, attribute, value))
            yield


# --- The pod ----------------------------------------------------------------------------------------

_once = Rpc.once


async def _counted_from_receipt(self: Rpc, *arguments: Any, **options: Any) -> Any:
    return replace(await _once(self, *arguments, **options), sent=self.clock())


def _without_second_check(self: Pool, **_: Any) -> Any:
    now = self._clock()
    if now >= self._leases.issue_until:
        raise self._session.refusal()
    id_ = self._stock.take(now)
    self._clock()  # read, and not heeded
    supply = self._supply
    if supply is not None and self._stock.free < supply.wanted:
        supply.wake()
    if id_ is None:
        raise PoolEmpty(self.name)
    return id_


_apply = Mirror.apply


def _without_gap_check(self: Mirror, head: Any, body: Any) -> Any:
    return _apply(self, replace(head, prev=min(head.prev, self.version)), body)


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


def _name_only(ref: Any) -> tuple[str, Any]:
    return ref.name, _Any()


# --- The agent --------------------------------------------------------------------------------------


def _whole(lease: float) -> float:
    return lease


def _without_usage_lag(orphan: Any, former: Any, allocation_ms: int, _usage_lag_ms: int) -> int:
    return hold_ms(orphan, former, allocation_ms, 0)


def _only_the_number(chunk: Any) -> Document:
    return {"_id": chunk_key(chunk.n)}


_chunk_guard, _mirror_guard = writes._chunk_guard, writes._mirror_guard


def _without(guard: Document, *names: str) -> Document:
    return {name: value for name, value in guard.items() if name not in names}


def _pod_as_seen(chunk: Any) -> Document:
    return _without(_chunk_guard(chunk), "drsm.incarnation", "drsm.grant")


def _whatever_the_grant(chunk: Any) -> Document:
    return _without(_chunk_guard(chunk), "drsm.grant")


def _mirror_of_the_name(owner: Any) -> Document:
    return _without(_mirror_guard(owner), "drsm.incarnation")


_wanted, _new_session, _numbers = allocations._Wanted, Sessions._new_session, itertools.count()


def _wanted_anew(owner: Any, count: int, _: str) -> Any:
    return _wanted(owner, count, f"another-{next(_numbers)}")


def _opened_anew(self: Sessions, request: Any) -> Session:
    return replace(_new_session(self, request), request_id=f"another-{next(_numbers)}")


_publish_log = Relay.publish_log


async def _taken_for_published(self: Relay, above: Any = None) -> None:
    if above is None:
        await _publish_log(self)
    while entries := list(self._state.log):
        self._settle(entries)
        self._feed.shorten(self._state, entries[-1].index)


async def _at_once(self: Relay) -> None:
    """Nothing is waited for."""


def _no_check(self: Lead) -> None:
    """The lead is never asked for."""


_full_leases = Leader._full_leases


def _no_grace(self: Leader, table: Any) -> Any:
    leases = _full_leases(self, table)
    for key in leases._deadlines:
        leases._deadlines[key] = self._parts.clock()
    return leases


def _death_without_term(pod: str, incarnation: int, reason: str, term: int) -> writes.Update:
    guarded = _end_session(pod, incarnation, reason, term)
    return replace(guarded, where=_without(guarded.where, "term"))


_end_session = writes.end_session


_session = Sessions.session


def _whatever_was_decided(self: Sessions, pod: str, incarnation: int) -> Any:
    with patch.object(LivenessLeases, "ending", lambda *_: ""):
        return _session(self, pod, incarnation)


async def _no_stamp(self: Leader, lead: Lead, relay: Relay) -> None:
    await relay.barrier()


async def _no_barrier(self: Leader, lead: Lead, relay: Relay) -> None:
    await self._parts.store.write([writes.stamp_sessions(lead.term)])


def _renewed_all_the_same(self: LivenessLeases, key: Any, until: float) -> bool:
    self._deadlines[key] = max(until, self._deadlines.get(key, until))
    return True


async def _unconfirmed(self: Relay, send: Any) -> None:
    self._lead.check()
    with contextlib.suppress(BusUnavailable):
        await send()


def _unmarked_when_closed(orphan: Any, former: Any, allocation_ms: int, usage_lag_ms: int) -> int:
    unmarked = replace(orphan, drsm=replace(orphan.drsm, marked=False))
    return hold_ms(unmarked, former, allocation_ms, usage_lag_ms)


_release_closed = Stock._release_closed


def _release_counts_at_once(self: Stock, chunk: Any, id_: int, space: int) -> None:
    chunk.scanning = True
    _release_closed(self, chunk, id_, space)


def _free_at_once(self: Stock, chunk: Any, id_: int, space: int, _now: float) -> None:
    self._make_free(chunk, id_, space)


async def _unrecorded(self: Sessions, session: Session) -> None:
    """What was promised when the session was opened is all that its document keeps."""


def _as_promised_today(orphan: Any, former: Any, allocation_ms: int, usage_lag_ms: int) -> int:
    forgotten = former and replace(former, promised_ms=0)
    return hold_ms(orphan, forgotten, allocation_ms, usage_lag_ms)


def _any_history(self: Mirror, head: Any, body: Any) -> Any:
    return _apply(self, replace(head, history=self.history or head.history), body)


ABLATIONS: tuple[Ablation, ...] = (
    Ablation(
        "a hold forgets what was promised",
        "4",
        SHRINKING,
        ((reaper, "hold_ms", _as_promised_today),),
        hint=0,
    ),
    Ablation(
        "a renewal that promises more does not record it",
        "4",
        WAVERING,
        ((Sessions, "_promise", _unrecorded),),
    ),
    Ablation("a released id does not rest", "10", RESTING, ((Stock, "_rest", _free_at_once),)),
    Ablation(
        "leases go on at once after a restore",
        "G1",
        RETURNING,
        ((Restorer, "may_issue", lambda *_, **__: True),),
        hint=17,
    ),
    Ablation(
        "grants go on at once after a restore",
        "G1",
        RESTORES,
        ((Grants, "allowed", lambda _: True),),
        hint=31,
    ),
    Ablation(
        "a demux does not look at the history", "G5", RESTORES, ((Mirror, "apply", _any_history),), hint=159
    ),
    Ablation(
        "a mark is forgotten when its owner closes",
        "4",
        INHERITANCE,
        ((reaper, "hold_ms", _unmarked_when_closed),),
        hint=0,
    ),
    Ablation(
        "a release during the hold counts",
        "5",
        INHERITANCE,
        ((Stock, "_release_closed", _release_counts_at_once),),
        hint=21,
    ),
    Ablation(
        "leases count from receipt", "R1", LATE_ANSWERS, ((Rpc, "once", _counted_from_receipt),), hint=4
    ),
    Ablation(
        "the holder's durations are not shortened",
        "R1",
        CLOCKS,
        ((sessions, "holder_duration", _whole), (election, "holder_duration", _whole)),
        hint=6,
    ),
    Ablation(
        "no second look at the lease after taking an id",
        "R4",
        STOPS,
        ((Pool, "allocate_nowait", _without_second_check),),
        hint=3,
    ),
    Ablation(
        "a demux does not look for gaps", "G5", LOSSES, ((Mirror, "apply", _without_gap_check),), hint=0
    ),
    Ablation("a leader speaks without a lead", "R2", LEADERS, ((Lead, "check", _no_check),), hint=0),
    Ablation(
        "no grace after a change of leader", "R6", LEADERS, ((Leader, "_full_leases", _no_grace),), hint=10
    ),
    Ablation(
        "a death is written whatever the term",
        "R5",
        LATE_DEATHS,
        ((writes, "end_session", _death_without_term),),
        hint=173,
    ),
    Ablation("no stamp before answering", "R5", LATE_DEATHS, ((Leader, "_stamp", _no_stamp),), hint=4),
    Ablation(
        "answers before the table has passed the stamp",
        "R6",
        LAGGING,
        ((Leader, "_stamp", _no_barrier),),
        hint=0,
    ),
    Ablation(
        "a renewal counts after death was decided",
        "R2",
        LATE_WRITES,
        ((LivenessLeases, "extend", _renewed_all_the_same), (Sessions, "session", _whatever_was_decided)),
        hint=49,
    ),
    Ablation("no hold", "4", PARTITIONS, ((reaper, "hold_ms", lambda *_: 0),), hint=2),
    Ablation("events are not confirmed", "G4", RECONNECTS, ((Relay, "_delivered", _unconfirmed),), hint=8),
    Ablation(
        "a hold without W", "section 4", SLOW_TO_SHOW, ((reaper, "hold_ms", _without_usage_lag),), hint=12
    ),
    Ablation(
        "claims do not look at the owner",
        "G2",
        LATE_CLAIMS,
        ((writes, "_chunk_guard", _only_the_number),),
        hint=2,
    ),
    Ablation(
        "guards look at the pod, not at its incarnation and grant",
        "G2",
        LATE_CLAIMS,
        ((writes, "_chunk_guard", _pod_as_seen),),
        hint=2,
    ),
    Ablation(
        "guards do not look at the grant",
        "G1",
        SCARCE,
        ((writes, "_chunk_guard", _whatever_the_grant),),
        hint=1,
    ),
    Ablation(
        "the guard of a keepalive does not look at the incarnation",
        "death in steps",
        ABSENCES,
        ((writes, "_mirror_guard", _mirror_of_the_name),),
        hint=1,
    ),
    Ablation(
        "a pod takes events of its name for its own",
        "G3",
        NAMESAKES,
        ((sdk_pool, "_key", _name_only),),
        hint=0,
    ),
    Ablation(
        "a repeated acquire is a new one",
        "repeats",
        LOSSES,
        ((allocations, "_Wanted", _wanted_anew),),
        hint=8,
    ),
    Ablation(
        "a repeated open is a new one", "repeats", LOSSES, ((Sessions, "_new_session", _opened_anew),), hint=3
    ),
    Ablation(
        "a new leader publishes nothing of what the old one left",
        "R6",
        LEADERS,
        ((Relay, "publish_log", _taken_for_published),),
        hint=8,
    ),
    Ablation("answers before the event is out", "G4", RESTLESS, ((Relay, "caught_up", _at_once),), hint=4),
    Ablation(
        "a number that was given back is not granted again",
        "G3",
        ANY,
        ((FreeNumbers, "freed", lambda *_: None),),
        hint=5,
    ),
)
