"""Safeguards, each with a way to switch it off: what the simulator must then find.

A patch replaces one function by the same without its safeguard; everything else is as in production.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

from drsm_agent import allocations, reaper, sessions
from drsm_agent.allocations import Allocations
from drsm_agent.core import documents, election, keepalives, writes
from drsm_agent.core.documents import Document, Session, chunk_key
from drsm_agent.core.numbers import FreeNumbers
from drsm_agent.core.placement import hold_ms
from drsm_agent.core.session import LivenessLeases
from drsm_agent.errors import BusUnavailable
from drsm_agent.go_pods import GoPods
from drsm_agent.lead import Lead
from drsm_agent.leader import Leader
from drsm_agent.mirrors import Mirrors
from drsm_agent.reaper import Reaper
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
    CROWDED,
    INHERITANCE,
    LAGGING,
    LAST_ONES,
    LATE_ANSWERS,
    LATE_CLAIMS,
    LATE_DEATHS,
    LATE_DELETES,
    LATE_WRITES,
    LEADERS,
    LOSSES,
    MIGRATION,
    MISSED,
    MIXED,
    NAMESAKES,
    PARTITIONS,
    RECONNECTS,
    RESTING,
    RESTLESS,
    RESTORES,
    RETURNING,
    ROLLBACK,
    SCARCE,
    SHRINKING,
    SLOW_TO_SHOW,
    STANDSTILLS,
    STOPS,
    SURVIVED,
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


def _without_usage_lag(
    orphan: Any, former: Any, allocation_ms: int, _usage_lag_ms: int, go_hold_ms: int = 0
) -> int:
    return hold_ms(orphan, former, allocation_ms, 0, go_hold_ms)


def _only_the_number(chunk: Any) -> Document:
    return {"_id": chunk_key(chunk.n)}


_chunk_guard, _keepalive_guard = writes._chunk_guard, writes._keepalive_guard


def _without(guard: Document, *names: str) -> Document:
    return {name: value for name, value in guard.items() if name not in names}


def _pod_as_seen(chunk: Any) -> Document:
    return _without(_chunk_guard(chunk), "drsm.incarnation", "drsm.grant")


def _whatever_the_grant(chunk: Any) -> Document:
    return _without(_chunk_guard(chunk), "drsm.grant")


def _keepalive_of_the_name(seen: Any) -> Document:
    return _without(_keepalive_guard(seen), "podInstance", "expireAt")


_for_living, _for_dead, _take_over = (
    keepalives.for_living,
    keepalives.for_dead,
    writes.take_over_keepalive,
)


def _left_to_the_go_pod(pool: Any, owner: Any, ends: Any) -> Any:
    seen = pool.keepalives.get(owner.name)
    return None if seen and seen.mirrored is None and not seen.go_down else _for_living(pool, owner, ends)


def _only_while_it_lives(pool: Any, owner: Any, ends: Any) -> Any:
    return None if owner.key in pool.held else _for_dead(pool, owner, ends)


def _only_put_off(pool: str, seen: Any, owner: Any, expire_at: Any) -> writes.Update:
    write = _take_over(pool, seen, owner, expire_at)
    return (
        replace(write, set={"expireAt": expire_at}) if seen.mirrored is None and not seen.go_down else write
    )


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


def _unmarked_when_closed(
    orphan: Any, former: Any, allocation_ms: int, usage_lag_ms: int, go_hold_ms: int = 0
) -> int:
    unmarked = replace(orphan, drsm=replace(orphan.drsm, marked=False))
    return hold_ms(unmarked, former, allocation_ms, usage_lag_ms, go_hold_ms)


_release_closed = Stock._release_closed


def _release_counts_at_once(self: Stock, chunk: Any, id_: int, space: int) -> None:
    chunk.scanning = True
    _release_closed(self, chunk, id_, space)


def _free_at_once(self: Stock, chunk: Any, id_: int, space: int, _now: float) -> None:
    self._make_free(chunk, id_, space)


async def _unrecorded(self: Sessions, session: Session) -> None:
    """What was promised when the session was opened is all that its document keeps."""


def _as_promised_today(
    orphan: Any, former: Any, allocation_ms: int, usage_lag_ms: int, go_hold_ms: int = 0
) -> int:
    forgotten = former and replace(former, promised_ms=0)
    return hold_ms(orphan, forgotten, allocation_ms, usage_lag_ms, go_hold_ms)


def _any_history(self: Mirror, head: Any, body: Any) -> Any:
    return _apply(self, replace(head, history=self.history or head.history), body)


# --- Beside Go pods ---------------------------------------------------------------------------------


def _without_go_hold(
    orphan: Any, former: Any, allocation_ms: int, usage_lag_ms: int, _go_hold_ms: int = 0
) -> int:
    return hold_ms(orphan, former, allocation_ms, usage_lag_ms)


async def _no_mirror_first(self: Mirrors, pool: Any, owners: Any) -> None:
    """Nobody waits for one."""


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _numbers_alone(self: Allocations, pool: Any, count: int) -> list[int]:
    return self._free[pool.name].take(count, pool.chunks)


_ends = Mirrors._ends


def _by_an_earlier_clock(self: Mirrors) -> Any:
    ends = _ends(self)
    return replace(ends, expire_at=ends.expire_at - timedelta(hours=1))


_may_claim = Reaper._may_claim


def _go_pods_that_say_nothing(self: Reaper, pool: Any, former: Any) -> bool:
    return former.is_go or _may_claim(self, pool, former)


BESIDE_GO: tuple[Ablation, ...] = (
    Ablation(
        "a Go namesake's keepalive is not taken over",
        "F1",
        MIGRATION,
        (
            (keepalives, "for_beginning", lambda *_: None),
            (keepalives, "for_living", _left_to_the_go_pod),
            (Mirrors, "may_receive", lambda *_: True),
        ),
        hint=1,
    ),
    Ablation(
        "a Go namesake's keepalive is put off and keeps its instance",
        "F7",
        MIGRATION,
        ((writes, "take_over_keepalive", _only_put_off), (Mirrors, "may_receive", lambda *_: True)),
        hint=0,
    ),
    Ablation(
        "a mirror has the instance of its pod",
        "F7",
        MIXED,
        (
            (documents, "our_instance", lambda owner: owner.instance),
            (writes, "our_instance", lambda owner: owner.instance),
        ),
        hint=6,
    ),
    Ablation(
        "the guard of a keepalive looks at its name alone",
        "F2",
        LATE_DELETES,
        ((writes, "_keepalive_guard", _keepalive_of_the_name),),
        hint=28,
    ),
    Ablation(
        "no keepalive before the first grant",
        "F11",
        MIXED,
        ((Mirrors, "ensure", _no_mirror_first), (Mirrors, "may_receive", lambda *_: True)),
        hint=88,
    ),
    Ablation(
        "grants go on right after a keepalive was deleted",
        "F4",
        MIGRATION,
        ((Mirrors, "_settled", lambda *_: True),),
        hint=33,
    ),
    Ablation(
        "a mirror is deleted though a Go pod's chunk names it",
        "F2",
        ROLLBACK,
        ((keepalives, "go_writes_under", lambda *_: False),),
        hint=4,
    ),
    Ablation(
        "a mirror stays as long as chunks name it",
        "F4",
        LAST_ONES,
        ((Mirrors, "_is_for_go", lambda *_: False),),
        hint=1,
    ),
    Ablation(
        "a dead pod's name is its Go namesake's at once",
        "F4",
        SURVIVED,
        ((keepalives, "for_dead", _only_while_it_lives),),
        hint=11,
    ),
    Ablation("a death is shown once", "F4", MISSED, ((Mirrors, "_shown_again", _nothing),), hint=2),
    Ablation(
        "a chunk forgets the Go pod that it came from",
        "F6",
        STANDSTILLS,
        ((writes, "_came_from", _nothing),),
        hint=2,
    ),
    Ablation(
        "no hold for a Go pod's chunk", "F6", STANDSTILLS, ((reaper, "hold_ms", _without_go_hold),), hint=2
    ),
    Ablation(
        "a Go pod that comes back finds its chunks taken",
        "F6",
        STANDSTILLS,
        ((GoPods, "_move_back", _nothing),),
        hint=24,
    ),
    Ablation(
        "numbers as without Go pods", "F3", CROWDED, ((Allocations, "_numbers", _numbers_alone),), hint=137
    ),
    Ablation(
        "the end of a mirror is by another clock", "F10", MIXED, ((Mirrors, "_ends", _by_an_earlier_clock),)
    ),
    Ablation(
        "a Go pod without a keepalive is dead at once",
        "F5",
        MIXED,
        ((Reaper, "_may_claim", _go_pods_that_say_nothing),),
        hint=11,
    ),
    Ablation(
        "a silent Go pod's keepalive is deleted at once",
        "F14",
        STANDSTILLS,
        ((keepalives, "overdue", lambda *_: True),),
        hint=15,
    ),
)


ABLATIONS: tuple[Ablation, ...] = (
    *BESIDE_GO,
    Ablation(
        "a hold forgets what was promised",
        "4",
        SHRINKING,
        ((reaper, "hold_ms", _as_promised_today),),
        hint=3,
    ),
    Ablation(
        "a renewal that promises more does not record it",
        "4",
        WAVERING,
        ((Sessions, "_promise", _unrecorded),),
        hint=1,
    ),
    Ablation("a released id does not rest", "10", RESTING, ((Stock, "_rest", _free_at_once),)),
    Ablation(
        "leases go on at once after a restore",
        "G1",
        RETURNING,
        ((Restorer, "may_issue", lambda *_, **__: True),),
        hint=6,
    ),
    Ablation(
        "grants go on at once after a restore",
        "G1",
        RESTORES,
        ((Grants, "allowed", lambda _: True),),
        hint=6,
    ),
    Ablation(
        "a demux does not look at the history", "G5", RESTORES, ((Mirror, "apply", _any_history),), hint=601
    ),
    Ablation(
        "a mark is forgotten when its owner closes",
        "4",
        INHERITANCE,
        ((reaper, "hold_ms", _unmarked_when_closed),),
        hint=1,
    ),
    Ablation(
        "a release during the hold counts",
        "5",
        INHERITANCE,
        ((Stock, "_release_closed", _release_counts_at_once),),
        hint=0,
    ),
    Ablation(
        "leases count from receipt", "R1", LATE_ANSWERS, ((Rpc, "once", _counted_from_receipt),), hint=1
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
        "no grace after a change of leader", "R6", LEADERS, ((Leader, "_full_leases", _no_grace),), hint=18
    ),
    Ablation(
        "a death is written whatever the term",
        "R5",
        LATE_DEATHS,
        ((writes, "end_session", _death_without_term),),
        hint=93,
    ),
    Ablation("no stamp before answering", "R5", LATE_DEATHS, ((Leader, "_stamp", _no_stamp),), hint=32),
    Ablation(
        "answers before the table has passed the stamp",
        "R6",
        LAGGING,
        ((Leader, "_stamp", _no_barrier),),
        hint=1,
    ),
    Ablation(
        "a renewal counts after death was decided",
        "R2",
        LATE_WRITES,
        ((LivenessLeases, "extend", _renewed_all_the_same), (Sessions, "session", _whatever_was_decided)),
        hint=63,
    ),
    Ablation("no hold", "4", PARTITIONS, ((reaper, "hold_ms", lambda *_: 0),), hint=2),
    Ablation("events are not confirmed", "G4", RECONNECTS, ((Relay, "_delivered", _unconfirmed),), hint=5),
    Ablation(
        "a hold without W", "section 4", SLOW_TO_SHOW, ((reaper, "hold_ms", _without_usage_lag),), hint=0
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
        hint=0,
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
        ((writes, "_keepalive_guard", _keepalive_of_the_name),),
        hint=12,
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
        hint=10,
    ),
    Ablation(
        "a repeated open is a new one", "repeats", LOSSES, ((Sessions, "_new_session", _opened_anew),), hint=1
    ),
    Ablation(
        "a new leader publishes nothing of what the old one left",
        "R6",
        LEADERS,
        ((Relay, "publish_log", _taken_for_published),),
        hint=1,
    ),
    Ablation("answers before the event is out", "G4", RESTLESS, ((Relay, "caught_up", _at_once),), hint=12),
    Ablation(
        "a number that was given back is not granted again",
        "G3",
        ANY,
        ((FreeNumbers, "freed", lambda *_: None),),
        hint=5,
    ),
)
