"""Worlds in which SDK pods and Go pods use one collection: concurrently, pods that change from one kind to
the other under their names and under others, Go pods that stand still or are cut off, and fleets of which
only Go pods are left.

What is demanded once all has healed is less than where all pods are ours (`_faulty_chunks`): where no SDK pod
lives, a dead one's chunks stay while a Go pod of its name lives, as no keepalive can be deleted then, and Go
pods route what names it to their own. Chunks that came from a Go pod may be marked for as long as it may
live.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from drsm_agent.core.documents import DEAD, GO_INCARNATION, Chunk, session_key
from drsm_agent.core.numbers import KNOWN_SHARE
from drsm_agent.core.table import LIVING, SESSIONS, UNKNOWN, Table
from drsm_agent.core.writes import Delete, Write
from drsm_agent.errors import StoreUnavailable
from drsm_agent.feed import HASHES
from drsm_agent.service import Agent
from drsm_sdk import Pod
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.beside_go import ALIVE, CHUNKS_OF, GoLife, MixedObserver
from tests.simulation.database import Database, Hand, View
from tests.simulation.go_pod import GoPod
from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.observer import Issue
from tests.simulation.pools import POOL, SLOTS, Id
from tests.simulation.world import ANY, BesideGo, Context, DemuxActor, Machine, PodActor, Profile, World

HEALING_SECONDS = 120.0
"""At most, and seldom more than thirty: a hold of a Go pod's chunk, what a Go pod missed and is shown again,
two rounds of the TTL monitor."""
UNHURRIED = 1.0


@dataclass(eq=False)
class GoActor:
    """A Go pod and its application."""

    machine: Machine
    life: GoLife
    mine: dict[Id, tuple[Issue | None, Context | None]] = field(default_factory=dict)

    @property
    def pod(self) -> GoPod:
        return self.life.pod


class Knowing(View):
    """An agent's way to the database. What it knows of Go pods is noted as it decides."""

    def __init__(self, database: Database, node: Node) -> None:
        super().__init__(database, node)
        self.agent: Agent | None = None

    def _hand(self, writes: Sequence[Write]) -> Hand:
        decided, knew = self.node.now(), frozenset[str]()
        state = self.agent.feed.current if self.agent else None
        if state is not None and any(isinstance(w, Delete) and w.space == POOL for w in writes):
            pool = state.table.pools[POOL]
            chunks = {
                f"{CHUNKS_OF}{name}" for name, incarnation in pool.held if incarnation == GO_INCARNATION
            }
            alive = {f"{ALIVE}{name}" for name, incarnation in pool.live if incarnation == GO_INCARNATION}
            knew = frozenset(chunks | alive)
        return Hand(decided=decided, knew=knew)


class MixedWorld(World):
    """SDK pods `amf-..`, Go pods `go-..`, and whoever takes the other's name."""

    observer: MixedObserver

    def __init__(self, loop: VirtualLoop, seed: int, profile: Profile = ANY) -> None:
        self.beside = profile.go or BesideGo()
        super().__init__(loop, seed, profile)
        of_go = random.Random(f"{seed} go")
        self.go: list[GoActor] = []
        self.go_number = of_go.choice(self.beside.pods)
        self._monitor_seconds = of_go.choice(self.beside.monitors)
        self._go_names = 0
        self._instances = 0
        self._over: list[str] = []
        """Instances of Go pods that have ended."""
        self.database.follow_time()

    # --- life ----------------------------------------------------------------------------------------

    async def live(self) -> None:
        for _ in range(self.go_number):
            self.start_go(self._new_name())
        self.node.start(self._guard(self._monitor()))
        await super().live()

    def _healing_seconds(self) -> float:
        return HEALING_SECONDS

    def _observer(self) -> MixedObserver:
        observer = MixedObserver(self.database, Subjects("drsm"), self.loop.time, self.places)
        observer.hold = self.beside.hold
        observer.lead = max(self.profile.allocations) + self.profile.usage_lag
        return observer

    def _more_settings(self) -> dict[str, Any]:
        return {"go_hold": self.beside.hold}

    def _identity(self, name: str) -> Pod:
        return Pod(name, "10.0.0.1", f"i-{name}")

    def _view(self, node: Node) -> View:
        return Knowing(self.database, node)

    def _speaks(self, machine: Machine, agent: Agent) -> Callable[[str], None]:
        for actor in self.agents:
            if actor.machine is machine and isinstance(actor.view, Knowing):
                actor.view.agent = agent
        speaks = super()._speaks(machine, agent)

        def heard(subject: str) -> None:
            mine = agent.leader._election.mine
            self.observer.led_by(mine.term if mine else 0)
            speaks(subject)

        return heard

    def _machines(self) -> list[Machine]:
        return [*super()._machines(), *(actor.machine for actor in self.go)]

    async def _monitor(self) -> None:
        """MongoDB's TTL monitor."""
        await asyncio.sleep(self.chance.uniform(0, self._monitor_seconds))
        while True:
            self.database.expire(POOL)
            await asyncio.sleep(self._monitor_seconds)

    # --- Go pods -------------------------------------------------------------------------------------

    def _new_name(self) -> str:
        self._go_names += 1
        return f"go-{self._go_names}"

    def start_go(self, name: str, *, like_ours: bool = False) -> None:
        """A Go pod's process; `like_ours` with the address and the instance of an SDK pod of the name."""
        machine, chance = self._machine(f"{name}(go)"), random.Random(self.chance.getrandbits(64))
        self._instances += 1
        ip = "10.0.0.1" if like_ours else f"10.0.1.{chance.randint(1, 2)}"
        instance = f"i-{name}" if like_ours else f"g-{self._instances}"
        pod = GoPod(
            self.database,
            machine.node,
            chance,
            (name, ip, instance),
            capacity=self.definition.capacity,
            slots=SLOTS,
            wrong=chance.choice(self.beside.wrong),
            in_use=self._used if self.beside.scans else None,
        )
        actor = GoActor(machine, GoLife(pod, self.loop.time()))
        pod.signed = lambda: self.observer.signed(actor.life)
        pod.crashed = lambda: self._go_ends(actor, "crashes")
        pod.run = lambda work: machine.node.start(self._guard(work))
        self.go.append(actor)
        self.observer.go.append(actor.life)
        self.observer.note(machine.name, f"starts as {instance} at {ip}")
        pod.start()
        machine.node.start(self._guard(self._go_work(actor, chance)))

    def _used(self, n: int, slot: int) -> bool:
        return (POOL, n << self._bits | slot) in self.contexts

    @property
    def _bits(self) -> int:
        return int(self._place["block_bits"])

    async def _go_work(self, actor: GoActor, chance: random.Random) -> None:
        application = self.profile.application
        pause = chance.choice(application.pauses)
        await asyncio.sleep(chance.choice([0.1, 1.0, 2.0]))
        while True:
            for _ in range(chance.randint(0, application.at_once)):
                n, slot = await actor.pod.allocate()
                if actor.machine.node.dead:
                    return
                self._go_issued(actor, (POOL, n << self._bits | slot), chance)
            for id_ in [id_ for id_ in actor.mine if chance.random() < 0.3]:
                self._go_releases(actor, id_)
            await asyncio.sleep(chance.expovariate(1 / (max(pause, UNHURRIED) if self.calm else pause)))

    def _go_issued(self, actor: GoActor, id_: Id, chance: random.Random) -> None:
        issue = self.observer.issue_of_go(actor.life, id_)
        context = None
        if issue is not None:
            visible = self.loop.time() + chance.uniform(0, self.profile.usage_lag * 0.9)
            context = self.contexts[id_] = Context(visible, issue)
        actor.mine[id_] = issue, context

    def _go_releases(self, actor: GoActor, id_: Id) -> None:
        issue, context = actor.mine.pop(id_)
        if context is not None and issue is not None and self.contexts.get(id_) is context:
            del self.contexts[id_]
            self.observer.release(id_, issue)
        actor.pod.release(id_[1] >> self._bits, id_[1] & ((1 << self._bits) - 1))

    # --- what befalls Go pods ------------------------------------------------------------------------

    def _go_ends(self, actor: GoActor, what: str) -> None:
        self._end_go(actor, what)
        self._later_go(actor)

    def _end_go(self, actor: GoActor, what: str) -> None:
        if actor not in self.go:
            return
        self.observer.note(actor.machine.name, what)
        actor.machine.node.kill()
        self._buried.append(actor.machine.node)
        self.go.remove(actor)
        self.observer.go.remove(actor.life)
        self._over.append(actor.pod.instance)

    def _later_go(self, actor: GoActor) -> None:
        """It comes back under its name, or another one comes."""
        name = actor.pod.name if self.chance.random() < 0.7 else self._new_name()
        self.node.later(self.chance.choice(self.beside.away), self._start_go_again, name)

    def _start_go_again(self, name: str, *, like_ours: bool = False) -> None:
        if len(self.go) < self.go_number:
            taken = any(actor.pod.name == name for actor in self.go)
            self.start_go(self._new_name() if taken else name, like_ours=like_ours)

    def _start_pod_again(self, name: str) -> None:
        if len(self.pods) < self.numbers[0]:
            while any(pod.machine.name == name for pod in self.pods):
                name += "-b"
            self.start_pod(name)

    def _kill_go(self) -> None:
        if actor := self._pick(self.go):
            self._go_ends(actor, "is killed")

    def _lose_go(self) -> None:
        """It never comes back."""
        if len(self.go) > 1 and self.go_number > 1 and (actor := self._pick(self.go)):
            self.go_number -= 1
            self._end_go(actor, "is killed for good")

    def _freeze_go(self) -> None:
        self._freeze(self._pick(self.go), self.chance.choice(self.beside.freezes))

    def _cut_go(self) -> None:
        if actor := self._pick([actor for actor in self.go if not actor.pod.cut]):
            seconds = self.chance.choice(self.beside.cuts)
            self.observer.note(actor.machine.name, f"is cut off MongoDB for {seconds:g} s")
            actor.pod.cut_off()
            self.node.later(seconds, actor.pod.mend)

    def _delete_pod(self) -> None:
        """The NRF says that an instance is down: an SDK pod's, which may live, or that of a Go pod that has
        ended, once its keepalive should be gone."""
        caller = self._pick(self.go)
        told = [f"i-{pod.machine.name}" for pod in self.pods] + self._over[-2:]
        living = {actor.pod.instance for actor in self.go}
        if caller and (instances := [instance for instance in told if instance not in living]):
            instance = self.chance.choice(instances)
            self.observer.note(caller.machine.name, f"calls DeletePod({instance})")
            caller.machine.node.start(self._guard(self._told_down(caller.pod, instance)))

    async def _told_down(self, pod: GoPod, instance: str) -> None:
        try:
            await pod.delete_pod(instance)
        except StoreUnavailable:
            return

    def _to_go(self) -> None:
        """An SDK pod ends, and a Go pod of its name starts."""
        if actor := self._pick([pod for pod in self.pods if not pod.closing]):
            self._number_of_pods(-1)
            leaves = self.chance.random() < 0.5
            self.observer.note(
                actor.machine.name, "leaves, for a Go pod" if leaves else "is killed, for a Go pod"
            )
            if leaves:
                actor.closing = True
                self.node.later(self.chance.uniform(0.5, 3.0), self._end_pod, actor)
            else:
                self._bury(actor, self.pods)
            self.go_number += 1
            seconds, like_ours = self.chance.uniform(*self.beside.migrations), self.chance.random() < 0.5
            self.node.later(seconds, self._migrated_to_go, actor, like_ours)

    def _migrated_to_go(self, actor: PodActor, like_ours: bool) -> None:
        self._end_pod(actor)
        self._start_go_again(actor.machine.name, like_ours=like_ours)

    def _end_pod(self, actor: PodActor) -> None:
        if actor in self.pods:
            self._bury(actor, self.pods)

    def _replace_pod(self, actor: PodActor) -> None:
        self._end_pod(actor)
        self._start_pod_again(actor.machine.name)

    def _to_sdk(self) -> None:
        """A Go pod ends, and an SDK pod of its name starts."""
        if self.go_number > 0 and (actor := self._pick(self.go)):
            self.go_number -= 1
            self._end_go(actor, "ends, for an SDK pod")
            self._number_of_pods(1)
            seconds = self.chance.uniform(*self.beside.migrations)
            self.node.later(seconds, self._start_pod_again, actor.pod.name)

    def _beside_namesake(self) -> None:
        """An SDK pod starts under the name of a Go pod that lives."""
        if actor := self._pick(self.go):
            self._number_of_pods(1)
            self._start_pod_again(actor.pod.name)

    def _beside_sdk(self) -> None:
        """A Go pod starts under the name of an SDK pod that lives."""
        taken = {actor.pod.name for actor in self.go}
        if actor := self._pick([pod for pod in self.pods if pod.machine.name not in taken]):
            self.go_number += 1
            self._start_go_again(actor.machine.name)

    def _end_namesake(self) -> None:
        """A Go pod that has an SDK pod's name is killed, and another one hears that its instance is down."""
        names = {pod.machine.name for pod in self.pods}
        actor = self._pick([actor for actor in self.go if actor.pod.name in names])
        if actor and (caller := self._pick([other for other in self.go if other is not actor])):
            self._go_ends(actor, "is killed, of an SDK pod's name")
            caller.machine.node.start(self._guard(self._told_down(caller.pod, actor.pod.instance)))

    def _end_sdk(self) -> None:
        """All SDK pods end for good."""
        self._number_of_pods(-self.numbers[0])
        for actor in list(self.pods):
            self.observer.note(actor.machine.name, "ends for good")
            if self.chance.random() < 0.5:
                self._bury(actor, self.pods)
            else:
                actor.closing = True
                self.node.later(self.chance.uniform(0.5, 3.0), self._end_pod, actor)

    def _number_of_pods(self, more: int) -> None:
        pods, agents, demuxes = self.numbers
        self.numbers = (pods + more, agents, demuxes)

    # --- judgement -----------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        super()._calm_down()
        for actor in self.go:
            actor.pod.mend()

    def _unsettled(self) -> bool:
        sessions = self.database.documents(SESSIONS)
        names = {pod.machine.name for pod in self.pods}
        return (
            super()._unsettled()
            or len(self.go) < self.go_number
            or len(self.pods) > self.numbers[0]
            or any(session["state"] != DEAD and session["pod"] not in names for session in sessions)
        )

    def _faulty_chunks(self) -> Iterator[tuple[str, str]]:
        """Every chunk has an owner: an SDK pod if one lives, else a Go pod, if one lives (G3, F4)."""
        documents = self.database.documents(SESSIONS)
        ours = {document["_id"] for document in documents if document["state"] != DEAD}
        go = {actor.pod.name for actor in self.go}
        if not ours and not go:
            return
        for n, chunk in sorted(self._table().items()):
            key = session_key(*chunk.owner.key)
            if chunk.owner.is_go:
                if chunk.pod not in go:
                    yield "G3", f"chunk {n} still belongs to Go pod {chunk.pod}, which is dead"
            elif key not in ours and (ours or chunk.pod not in go):
                yield "G3", f"chunk {n} still belongs to {key}, which is dead"
            if chunk.marked and not chunk.go_owners and key in ours:
                yield "G3", f"chunk {n} of {key} is still marked"

    def _now(self) -> Table:
        """The table that anybody has who reads all documents at this moment."""
        table = Table([POOL], self.database.end, HASHES)
        table.load(SESSIONS, self.database.documents(SESSIONS))
        table.load(POOL, self.database.documents(POOL))
        return table

    def _truth(self) -> dict[int, tuple[Any, ...]]:
        """With the owner's state and its address, which are functions of the documents (G5, F5, F13)."""
        pool = self._now().pools[POOL]

        def shown(chunk: Chunk) -> tuple[Any, ...]:
            owner = pool.shown(chunk.owner)
            return *owner.key, owner.ip, pool.state(owner)

        return {n: shown(chunk) for n, chunk in pool.chunks.items()}

    def _held(self, actor: DemuxActor) -> dict[int, tuple[Any, ...]]:
        return {n: (*owner.key, owner.ip, owner.state) for n, owner in actor.demux.chunks().items()}

    async def _count_the_free(self) -> None:
        """Go pods stand still then, too: else they take some."""
        if any(state in {LIVING, UNKNOWN} for *_, state in self._truth().values()) or self.pods:
            for actor in self.go:
                actor.machine.node.freeze()
            await super()._count_the_free()

    def _missing(self) -> list[int]:
        """Only so many numbers are granted as Go pods may know."""
        missing = super()._missing()
        most = int(KNOWN_SHARE * self.definition.capacity)
        return missing[: max(0, most - len(self._table()))]
