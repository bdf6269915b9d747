"""One simulated world: a database, a NATS server, agents, pods and demuxes, and what befalls them.

Everything follows from the seed. The agents are `service.Agent`, the pods `drsm_sdk.Drsm`, the demuxes
`drsm_sdk.Demux`: the code that runs in production, on virtual time.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from drsm_agent import ports, settings
from drsm_agent.core.documents import DEAD, Chunk, read_chunk, session_key
from drsm_agent.core.restore import read_restored
from drsm_agent.core.table import SESSIONS
from drsm_agent.core.writes import SETTINGS
from drsm_agent.errors import AgentError, Misconfigured, StoreUnavailable, leaf
from drsm_agent.restored import announce_restored
from drsm_agent.service import Agent, stored_settings
from drsm_agent.store.stored import ensure_stored
from drsm_sdk import (
    AgentUnavailable,
    Demux,
    Drsm,
    NotAllocated,
    NotOwner,
    Pod,
    PoolEmpty,
    PoolExhausted,
    SessionLost,
    ambient,
    demand,
)
from drsm_sdk import changes as change
from drsm_sdk.pool import Pool
from drsm_sdk.rpc import Refused, Rpc
from drsm_sdk.session import Life
from drsm_sdk.wire import messages as wire
from drsm_sdk.wire.space import Item
from drsm_sdk.wire.subjects import Subjects
from tests.simulation.database import Database, View
from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.network import AgentBus, Network, PodTransport, Weather
from tests.simulation.observer import Issue, Observer
from tests.simulation.pools import ADDRESSES, INTEGERS, POOL, SPACES, Id, Places, settings_of

LIVENESS, ALLOCATION, LEADER = 2.5, 8.0, 1.0
USAGE_LAG = 1.0
RATE = 0.005
"""`r`: how far one machine's clock may be off."""
STORM_SECONDS = 40.0
PEACE_SECONDS = 2.0
"""First everybody gets to work."""
UNHURRIED = 1.0
"""Seconds of an application's pauses, at least, once the storm is over."""
LOOK_SECONDS = 0.5
"""How often pods are looked at: much more often than a lease that was wrongly extended ends."""
HEALING_SECONDS = 14.0 + ALLOCATION * 1.02 + USAGE_LAG + 15.0
"""The longest freeze, then the longest hold, then what a scan and a claim take."""
HEALED_LOOK_SECONDS = 0.5
WAIT_MOST = 2.5
"""An allocation waits two seconds at most."""
COUNT_SECONDS = 2.0
"""Before a pod that was stopped just now is declared dead, all that is free must have been granted."""


class AgentChance(ports.Chance):
    """The agent's chance, from the seed."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def token(self) -> str:
        return f"{self._source.getrandbits(64):016x}"

    def below(self, n: int) -> int:
        return self._source.randrange(n)

    def jitter(self, seconds: float) -> float:
        return seconds * self._source.uniform(0.9, 1.1)


FAULTS = (
    "kill_pod",
    "freeze_pod",
    "cut_pod",
    "close_pod",
    "kill_agent",
    "freeze_agent",
    "cut_agent",
    "cut_agent_from_database",
    "elect",
    "restart_nats",
    "kill_demux",
    "freeze_demux",
    "cut_demux",
)


@dataclass(frozen=True, slots=True)
class Application:
    """How pods use their pool: they take up to so many ids at once, `lets_go` is the probability that they
    then give all back at once, and `pauses` are the seconds between, on average."""

    pauses: tuple[float, ...] = (0.05, 0.2, 1.0)
    at_once: int = 4
    lets_go: float = 0.05


@dataclass(frozen=True, slots=True)
class BesideGo:
    """Go DRSM pods on the same collection (`mixed.MixedWorld`); times are those of `go_pod.scaled`."""

    pods: tuple[int, ...] = (1, 2, 3)
    hold: float = 20.0
    """Seconds for which nothing is issued from a Go pod's chunk that an SDK pod has claimed."""
    freezes: tuple[float, ...] = (0.3, 2.0, 5.0, 9.0, 12.0)
    cuts: tuple[float, ...] = (0.5, 2.0, 5.0, 9.0, 12.0)
    """For how many seconds a Go pod is stopped, or cut off the database."""
    away: tuple[float, ...] = (0.1, 1.0, 2.0, 4.0, 9.0)
    """Seconds between the end of a Go pod and the start of its successor."""
    migrations: tuple[float, float] = (0.1, 9.0)
    """Seconds between the end of a pod and the start of one of the other kind."""
    monitors: tuple[float, ...] = (1.0, 4.0, 15.0)
    """Seconds between two rounds of the TTL monitor."""
    wrong: tuple[float, ...] = (0.0, 0.0, -1.5, 1.5)
    """By how many seconds a Go pod's wall clock may be wrong."""
    scans: bool = False
    """Whether Go pods have a callback, and issue from chunks that they have claimed and scanned."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a seed may bring. None: the seed chooses."""

    name: str = "any"
    faults: Mapping[str, float] | None = None
    weather: Weather | None = None
    doubt: float | None = None
    doubtful: str = ""
    fates: tuple[str, ...] = ("done", "lost", "late")
    lag: float | None = None
    stops: float | None = None
    paces: tuple[float, ...] = (1.0, 3.0, 6.0)
    """Seconds from one fault to the next, on average."""
    rate: float = RATE
    clocks: float | None = None
    """How wrong a clock may be when that is more than `rate`, which the leases are made for."""
    extreme: bool = False
    """Every clock as wrong as it may be."""
    cuts: tuple[float, ...] = (0.5, 2.0, 3.0, 4.0, 7.0, 12.0)
    """For how many seconds somebody is cut off NATS."""
    pods: tuple[int, ...] = (3,)
    agents: tuple[int, ...] = (2,)
    demuxes: int = 1
    storms: tuple[float, ...] = (STORM_SECONDS,)
    """How long the storm lasts, in seconds."""
    freezes: tuple[float, ...] = (0.3, 2.0, 4.0, 9.0, 14.0)
    """For how many seconds a pod or a demux is stopped."""
    usage_lag: float = USAGE_LAG
    allocations: tuple[float, ...] = (ALLOCATION,)
    """The allocation leases that a change of settings chooses from; the first is the one at the start."""
    livenesses: tuple[float, ...] = (LIVENESS,)
    leaders: tuple[float, ...] = (LEADER,)
    restores: bool = False
    """The database is restored from a backup, once."""
    lost: tuple[float, float] = (1.0, 15.0)
    """So many seconds of it are lost then."""
    kinds: tuple[str, ...] = (INTEGERS,)
    """Of pools."""
    block_bits: tuple[int, ...] = (4, 5, 6)
    """Of ids of 10 bits: 64, 32 or 16 chunks are plenty, or hardly enough."""
    quarantines: tuple[float, ...] = (0.0,)
    """Seconds that a released id rests."""
    application: Application = Application()
    idle: float = 3.0
    """Seconds that a chunk stays empty before it goes back: in the storm's minute it shall happen often."""
    ahead: float = demand.AHEAD
    """Seconds that a pod's stock should last."""
    go: BesideGo | None = None


ANY = Profile(
    kinds=(INTEGERS, ADDRESSES, SPACES),
    quarantines=(0.0, 0.0, 2.0),
    pods=(2, 2, 3),
    agents=(1, 2, 3),
    paces=(0.5, 1.0, 2.0),
    storms=(4.0, 5.0, 6.0, 8.0, 12.0),
    allocations=(3.5,),
    freezes=(0.3, 2.0, 4.0),
    cuts=(0.5, 2.0, 3.0, 4.0, 7.0),
    application=Application(pauses=(0.1, 0.3, 1.0)),
)
"""Small worlds and short storms, so that there can be many; those of the other profiles are long."""


@dataclass(eq=False)
class Machine:
    """A process of the world and the clock it reads."""

    name: str
    node: Node
    rate: float
    offset: float
    loop: VirtualLoop
    chance: random.Random
    freezes: tuple[float, ...]
    stops: float = 0.0
    """Probability that the process is stopped right when it reads the clock, for one of so many seconds."""

    def clock(self) -> float:
        if self.stops and self.chance.random() < self.stops and not self.node.stopped:
            self.loop.stop_within(self.node, self.chance.choice(self.freezes))
        return self.now()

    def now(self) -> float:
        return self.offset + self.loop.time() * self.rate


@dataclass(eq=False)
class Context:
    """What the application's database keeps of one id in use: a scan sees it from `visible` on."""

    visible: float
    issue: Issue


@dataclass(eq=False)
class PodActor:
    """An application: it allocates, keeps contexts in the application's database, releases."""

    machine: Machine
    drsm: Drsm
    transport: PodTransport
    mine: dict[Id, Context] = field(default_factory=dict)
    at_work: bool = False
    """It has joined its pool."""
    closing: bool = False
    left: bool = False
    waiting_since: float | None = None


@dataclass(eq=False)
class AgentActor:
    machine: Machine
    bus: AgentBus
    view: View
    settings: settings.Settings
    """What it was started with: after a change, those of an agent left behind are refused."""
    task: "asyncio.Task[None] | None" = None


@dataclass(eq=False)
class DemuxActor:
    machine: Machine
    demux: Demux
    transport: PodTransport


class World:
    """`await World(seed).live()` raises Violation when something did not hold."""

    def __init__(self, loop: VirtualLoop, seed: int, profile: Profile = ANY) -> None:
        self.loop, self.seed, self.profile = loop, seed, profile
        self.chance = random.Random(seed)
        block_bits = self.chance.choice(profile.block_bits)
        of_pool = random.Random(f"{seed} pool")
        self._place = settings_of(of_pool.choice(profile.kinds), block_bits)
        self._quarantine = of_pool.choice(profile.quarantines)
        self.settings = self._settings(
            profile.livenesses[0], profile.allocations[0], profile.leaders[0], profile.usage_lag, revision=1
        )
        environment = Node(loop, "world")
        self.node = environment
        self.network = Network(environment, self.chance, profile.weather or self._weather())
        self.database = Database([POOL], environment, self.chance)
        self.database.doubt = self._chosen(profile.doubt, 0.0, 0.0, 0.02, 0.1)
        self.database.doubtful, self.database.fates = profile.doubtful, profile.fates
        self.database.lag = self._chosen(profile.lag, 0.0, 0.0, 0.01, 0.05)
        self.definition = self.settings.definitions[POOL]
        self.places = Places(self.definition)
        self.observer = self._observer()
        self.observer.quarantine = self._quarantine * (1 - 2 * profile.rate)
        self.observer.liveness_left = self._liveness_left
        self.observer.may_issue, self.observer.holds = self._may_issue, self._holds
        if profile.clocks is not None:
            # R1 rests on `r` as G1 does: what breaks it here is just what an alarm must tell. All else holds,
            # also R5: two leaders at once last for less than the full `L` that the later one gives everybody.
            self.observer.waived = frozenset({"G1", "R1"})
        self.database.changed = self.observer.changed
        self.network.heard = self.observer.heard
        self.contexts: dict[Id, Context] = {}
        """What the application's database has, by id."""
        self.pods: list[PodActor] = []
        self.agents: list[AgentActor] = []
        self.demuxes: list[DemuxActor] = []
        size = random.Random(f"{seed} size")
        self._storm_seconds = size.choice(profile.storms)
        self.numbers = (size.choice(profile.pods), size.choice(profile.agents), profile.demuxes)
        self.faults: Counter[str] = Counter()
        """What has befallen it."""
        self.failure: BaseException | None = None
        self.calm = False
        self._failed = asyncio.Event()
        self._buried: list[Node] = []
        self._alarms = 0
        self._restoring = False
        self._restore: asyncio.Task[None] | None = None
        self.stops = self._chosen(profile.stops, 0.0, 0.0, 1e-3, 3e-3)

    def _chosen(self, given: float | None, *choices: float) -> float:
        return given if given is not None else self.chance.choice(choices)

    def _settings(
        self, liveness: float, allocation: float, leader: float, usage_lag: float, *, revision: int
    ) -> settings.Settings:
        return settings.load(
            nats_url="nats://simulated:4222",
            mongo_url="mongodb://simulated/?replicaSet=rs0",
            mongo_database="simulated",
            subject_prefix="drsm",
            pools=[self._pool(usage_lag, revision)],
            liveness_ttl=liveness,
            allocation_ttl=allocation,
            leader_ttl=leader,
            settings_revision=revision,
            http_port=0,
            agent_id="agent",
            **self._more_settings(),
        )

    def _more_settings(self) -> dict[str, Any]:
        return {}

    def _observer(self) -> Observer:
        return Observer(self.database, Subjects("drsm"), self.loop.time, self.places)

    def _view(self, node: Node) -> View:
        return View(self.database, node)

    def _pool(self, usage_lag: float, revision: int) -> dict[str, Any]:
        """The definition of the pool that everybody uses."""
        return self._place | {
            "name": POOL,
            "usage_lag_ms": round(usage_lag * 1000),
            "quarantine_ms": round(self._quarantine * 1000),
            "revision": revision,
        }

    def _weather(self) -> Weather:
        chance = self.chance
        if chance.random() < 0.3:
            return Weather()
        return Weather(
            typical=chance.choice([0.001, 0.01, 0.05]),
            slow=chance.choice([0.5, 2.0, 6.0]),
            slowness=chance.choice([0.0, 0.0005, 0.003]),
            loss=chance.choice([0.0, 0.0, 0.02, 0.1]),
            doubling=chance.choice([0.0, 0.05]),
            reordering=chance.choice([0.0, 0.05]),
        )

    # --- life --------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Storm, then calm, then judgement."""
        self.loop.set_exception_handler(self._on_exception)
        pods, agents, demuxes = self.numbers
        for i in range(agents):
            self.start_agent(f"agent-{i}")
        for i in range(pods):
            self.start_pod(f"amf-{i}")
        for i in range(demuxes):
            self.start_demux(f"demux-{i}")
        self.node.start(self._guard(self._watch_pods()))
        storm = self.node.start(self._guard(self._storm()))
        if self.profile.restores:
            self._restore = self.node.start(self._guard(self._lose_time()))
        await self._until_failed(self._storm_seconds)
        storm.cancel()
        self._calm_down()
        await self._until_healed(self._healing_seconds())
        await self._until_demuxes_agree()
        self._judge()
        await self._count_the_free()

    def _healing_seconds(self) -> float:
        longer = max(self.profile.allocations) - ALLOCATION
        slower = 1 + 2 * (self.profile.clocks or 0.0)
        return HEALING_SECONDS * slower + self.profile.usage_lag + max(longer, 0.0)

    @property
    def alarms(self) -> int:
        """How often a pod found that its lease was not kept."""
        return self._alarms + sum(pod.drsm.alarms for pod in self.pods)

    async def end(self) -> None:
        """Let everything go, quietly."""
        nodes = [*self._buried, *(machine.node for machine in self._machines())]
        self.network.heard = lambda packet: None
        self.database.changed = lambda change: None
        for connection in list(self.network.connections):
            connection.close()
        await self.node.bury()
        self.node.kill()  # else its storm would go on, and stop in the middle who is about to end
        for node in nodes:
            await node.bury()

    async def _until_failed(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._failed.wait()
        except TimeoutError:
            return
        if self.failure is not None:
            raise self.failure

    def fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self._failed.set()

    def _on_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException):
            self.fail(error)

    def _liveness_left(self, incarnation: int) -> float:
        for pod in self.pods:
            life = pod.drsm._session.life
            if life is not None and life.incarnation == incarnation:
                return life.leases.liveness_until - pod.machine.now()
        return 0.0

    def _may_issue(self, owner: tuple[str, int]) -> bool:
        return any(
            (life := pod.drsm._session.life) is not None
            and (pod.machine.name, life.incarnation) == owner
            and not pod.machine.node.dead
            and pod.machine.now() < life.leases.allocation_until
            for pod in self.pods
        )

    def _holds(self, owner: tuple[str, int], n: int, grant: str) -> bool:
        for pod in self.pods:
            life, member = pod.drsm._session.life, pod.drsm._session.members.get(POOL)
            if life is not None and member is not None and (pod.machine.name, life.incarnation) == owner:
                return any(held == n and grant in {"", by} for held, by, _ in member.holdings())
        return False

    async def _watch_pods(self) -> None:
        """What leases promise, and what may be issued at this moment, whether or not somebody asks for it."""
        while True:
            for pod in self.pods:
                life, now = pod.drsm._session.life, pod.machine.now()
                if life is None:
                    continue
                self.observer.counts_on(life.incarnation, life.leases.liveness_until - now)
                member = pod.drsm._session.members.get(POOL)
                if isinstance(member, Pool) and now < life.leases.issue_until:
                    free = (
                        (space, id_)
                        for chunk in member._stock
                        for space, block in zip(self.places.names, chunk.blocks, strict=True)
                        for id_ in block.free
                    )
                    self.observer.may_hand_out((pod.machine.name, life.incarnation), free)
            await asyncio.sleep(LOOK_SECONDS)

    # --- actors ------------------------------------------------------------------------------------

    def _machines(self) -> list[Machine]:
        pods, agents = [pod.machine for pod in self.pods], [agent.machine for agent in self.agents]
        return [*pods, *agents, *(demux.machine for demux in self.demuxes)]

    def _machine(self, name: str) -> Machine:
        node = Node(self.loop, name)
        wrong = self.profile.rate if self.profile.clocks is None else self.profile.clocks
        slow, fast = 1 - wrong, 1 + wrong
        rates = [slow, fast] if self.profile.extreme else [1.0, slow, fast, self.chance.uniform(slow, fast)]
        rate = self.chance.choice(rates)
        chance = random.Random(self.chance.getrandbits(64))
        offset, freezes = self.chance.uniform(0, 1e6), self.profile.freezes
        return Machine(name, node, rate, offset, self.loop, chance, freezes, self.stops)

    def start_agent(self, name: str) -> None:
        machine = self._machine(name)
        bus, view = AgentBus(self.network, machine.node), self._view(machine.node)
        actor = AgentActor(machine, bus, view, self.settings)
        self.agents.append(actor)
        actor.task = machine.node.start(self._guard(self._agent(actor)))

    async def _agent(self, actor: AgentActor) -> None:
        machine, chance = actor.machine, AgentChance(random.Random(self.chance.getrandbits(64)))
        while not machine.node.over:
            while not actor.bus.connected:
                await asyncio.sleep(0.2)
            try:
                await ensure_stored(actor.view, stored_settings(actor.settings))
                agent = Agent(
                    actor.settings,
                    actor.view,
                    actor.bus,
                    clock=machine.clock,
                    wall_clock=lambda: 1.7e9 + self.loop.time(),
                    chance=chance,
                )
                agent.name = f"{machine.name}-{chance.token()[:4]}"
                actor.bus.speaks = self._speaks(machine, agent)
                await agent.run()
            except BaseExceptionGroup as group:
                if not isinstance(leaf(group), AgentError):
                    raise
                self.observer.note(machine.name, f"ends: {leaf(group)}")
            except StoreUnavailable:
                pass
            except Misconfigured:
                self.observer.note(machine.name, "is refused, and gets the new settings")
                actor.settings = self.settings
            await asyncio.sleep(chance.jitter(0.5))

    def _speaks(self, machine: Machine, agent: Agent) -> Callable[[str], None]:
        def speaks(subject: str) -> None:
            leads = agent.leader._election.held(machine.now())
            self.observer.spoke(machine.name, subject, leads=leads)

        return speaks

    def start_pod(self, name: str) -> None:
        machine = self._machine(name)
        transport = PodTransport(self.network, machine.node)
        actor = PodActor(machine, self._drsm(machine, transport), transport)
        self.pods.append(actor)
        self.observer.note(name, "starts")
        machine.node.start(self._guard(self._pod(actor)))

    async def _pod(self, actor: PodActor) -> None:
        """The application. It starts again when the agent was not there."""
        while not (actor.closing or actor.machine.node.over):
            try:
                async with actor.drsm as drsm:
                    pool = await drsm.join(POOL, in_use=self._in_use, timeout=10.0)
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._hear(actor, pool))
                        actor.at_work = True
                        await self._work(actor, drsm, pool)
                        raise _Left
            except* _Left:
                actor.left = True
                self.observer.note(actor.machine.name, "has left")
            except* AgentUnavailable:
                actor.at_work = False
                actor.transport = PodTransport(self.network, actor.machine.node)
                actor.drsm = self._drsm(actor.machine, actor.transport)
            if not actor.left:
                await asyncio.sleep(0.5)

    def _identity(self, name: str) -> Pod:
        return Pod(name, "10.0.0.1", "i")

    def _drsm(self, machine: Machine, transport: PodTransport) -> Drsm:
        drsm = Drsm.connect(
            "nats://simulated",
            self._identity(machine.name),
            transport=transport,
            clock=machine.clock,
            chance=ambient.Chance(random.Random(self.chance.getrandbits(64))),
        )
        session = drsm._session
        end = session.end

        def ends(life: Life, reason: str) -> None:
            """By an event, which comes in no task: by an answer it may be over before that is written."""
            if life is session.life and asyncio.current_task() is None:
                self.observer.told_its_end(life.incarnation, reason)
            end(life, reason)

        session.end = ends  # type: ignore[method-assign]
        return drsm

    async def _work(self, actor: PodActor, drsm: Drsm, pool: Any) -> None:
        chance = random.Random(self.chance.getrandbits(64))
        application = self.profile.application
        pause = chance.choice(application.pauses)
        while not actor.closing:
            for _ in range(chance.randint(0, application.at_once)):
                await self._allocate(actor, drsm, pool, chance)
            for id_ in [id_ for id_ in actor.mine if chance.random() < 0.3]:
                self._release(actor, pool, id_)
            if chance.random() < application.lets_go:  # everything at once, so that chunks become empty
                for id_ in list(actor.mine):
                    self._release(actor, pool, id_)
            await asyncio.sleep(chance.expovariate(1 / (max(pause, UNHURRIED) if self.calm else pause)))

    async def _allocate(self, actor: PodActor, drsm: Drsm, pool: Any, chance: random.Random) -> None:
        actor.waiting_since = self.loop.time()
        try:
            ids = await self._drawn(pool, chance)
        except (PoolEmpty, PoolExhausted, AgentUnavailable, SessionLost):
            return
        finally:
            actor.waiting_since = None
        if actor.machine.node.dead:
            return  # killed while it was stopped: nobody has got the id
        life = drsm._session.life
        if life is None:
            self.observer.broken("G1", f"{actor.machine.name} issued {ids} without a session")
            return
        left = life.leases.allocation_until - actor.machine.now()
        if len({self.places.chunk_of(id_) for id_ in ids}) > 1:
            self.observer.broken("10", f"{ids} were drawn together and are not of one chunk")
        visible = self.loop.time() + chance.uniform(0, self.profile.usage_lag * 0.9)
        for id_ in ids:
            owner = (actor.machine.name, life.incarnation)
            grant = pool.grant(self.places.item(id_), space=id_[0])
            issue = self.observer.issue(id_, owner, grant, left)
            actor.mine[id_] = self.contexts[id_] = Context(visible, issue)

    async def _drawn(self, pool: Any, chance: random.Random) -> list[Id]:
        """An id; of a pool of several spaces mostly one of each."""
        at_once, places = chance.random() < 0.8, self.places
        if len(places.names) == 1:
            item = pool.allocate_nowait() if at_once else await pool.allocate(timeout=2.0)
            return [places.id(POOL, item)]
        if chance.random() < 0.2:
            space = chance.choice(places.names)
            return [places.id(space, pool.allocate_nowait(space=space))]
        drawn = pool.allocate_set_nowait() if at_once else await pool.allocate_set(timeout=2.0)
        return [places.id(space, item) for space, item in drawn.items()]

    def _release(self, actor: PodActor, pool: Any, id_: Id) -> None:
        context = actor.mine.pop(id_)
        space, item = id_[0], self.places.item(id_)
        try:
            if not pool.valid(item, space=space):
                return  # somebody else serves it now
            if self.contexts.get(id_, context) is not context:
                return  # its former owner, not knowing of the claim yet, let go of it and issued it again
            pool.release(item, space=space)
        except (NotOwner, NotAllocated):
            return
        self.contexts.pop(id_, None)
        self.observer.release(id_, context.issue)

    async def _hear(self, actor: PodActor, pool: Any) -> None:
        async for news in pool.changes():
            match news:
                case change.SessionLost() | change.Lost():
                    for space, spans in news.ids.items():
                        for first, last in spans:
                            for id_ in self.places.between(space, first, last):
                                actor.mine.pop(id_, None)
                case change.Gained(_, chunks, True) | change.Scanned(_, chunks):
                    numbers = chunks if isinstance(chunks, tuple) else (chunks,)
                    for n in numbers:  # its sessions are ours to serve, from now on
                        actor.mine |= {id_: self.contexts[id_] for id_ in self._visible(n)}

    async def _in_use(self, first: Item, last: Item, space: str = POOL) -> list[Item]:
        """The application's scan: what is visible when it is asked, told a little later."""
        n = self.places.chunk_of(self.places.id(space, first))
        found = [self.places.item(id_) for id_ in self._visible(n) if id_[0] == space]
        assert all(first <= item <= last for item in found)
        await asyncio.sleep(self.chance.uniform(0, 0.5))
        return found

    def _visible(self, n: int) -> list[Id]:
        """What the application's database shows of a chunk."""
        now = self.loop.time()
        return [
            id_
            for id_, context in self.contexts.items()
            if context.visible <= now and self.places.chunk_of(id_) == n
        ]

    def start_demux(self, name: str) -> None:
        machine = self._machine(name)
        transport = PodTransport(self.network, machine.node)
        demux = Demux.connect(
            "nats://simulated",
            POOL,
            transport=transport,
            clock=machine.clock,
            chance=ambient.Chance(random.Random(self.chance.getrandbits(64))),
            timeout=60.0,
        )
        actor = DemuxActor(machine, demux, transport)
        self.demuxes.append(actor)
        machine.node.start(self._guard(self._demux(actor)))

    async def _demux(self, actor: DemuxActor) -> None:
        async with actor.demux as demux:
            mirror = demux._mirror
            async for _ in demux.events():
                table = (len(mirror), mirror.checksum)
                self.observer.demux_holds(actor.machine.name, mirror.history, mirror.version, table)

    async def _guard(self, work: Awaitable[None]) -> None:
        """Whatever ends an actor by itself ends the world."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.fail(leaf(error) if isinstance(error, BaseExceptionGroup) else error)

    # --- what befalls them ---------------------------------------------------------------------------

    async def _storm(self) -> None:
        chance = self.chance
        pace = chance.choice(self.profile.paces)
        weights = self.profile.faults or {fault: chance.choice([0, 1, 2, 6]) for fault in FAULTS}
        if not any(weights.values()):
            weights = {"kill_pod": 1}
        self.network.calm = True
        await asyncio.sleep(PEACE_SECONDS)
        self.network.calm = False
        while True:
            (fault,) = chance.choices(list(weights), list(weights.values()))
            self.faults[fault] += 1
            getattr(self, f"_{fault}")()
            await asyncio.sleep(chance.expovariate(1 / pace))

    def _pick(self, actors: list[Any]) -> Any:
        alive = [actor for actor in actors if not actor.machine.node.stopped]
        return self.chance.choice(alive) if alive else None

    def _kill_pod(self) -> None:
        if actor := self._pick([pod for pod in self.pods if not pod.left]):
            self.observer.note(actor.machine.name, "is killed")
            self._bury(actor, self.pods)
            self.node.later(self.chance.choice([0.1, 1.0, 3.0]), self._start_pod_again, actor.machine.name)

    def _start_pod_again(self, name: str) -> None:
        if all(pod.machine.name != name for pod in self.pods):
            self.start_pod(name)

    def _bury(self, actor: Any, actors: list[Any]) -> None:
        if isinstance(actor, PodActor):
            self._alarms += actor.drsm.alarms
        actor.machine.node.kill()
        connection = actor.bus.connection if isinstance(actor, AgentActor) else actor.transport.connection
        connection.close()
        self._buried.append(actor.machine.node)
        actors.remove(actor)

    def _close_pod(self) -> None:
        if actor := self._pick([pod for pod in self.pods if not pod.closing]):
            self.observer.note(actor.machine.name, "leaves")
            actor.closing = True
            self.node.later(self.chance.uniform(1.0, 4.0), self._replace_pod, actor)

    def _replace_pod(self, actor: PodActor) -> None:
        if actor in self.pods:
            self._bury(actor, self.pods)
            self.start_pod(actor.machine.name)

    def _freeze_pod(self) -> None:
        self._freeze(self._pick(self.pods), self.chance.choice(self.profile.freezes))

    def _freeze_agent(self) -> None:
        self._freeze(self._pick(self.agents), self.chance.choice([0.3, 0.8, 1.2, 3.0, 8.0]))

    def _freeze(self, actor: Any, seconds: float) -> None:
        if actor:
            self.observer.note(actor.machine.name, f"is frozen for {seconds:g} s")
            actor.machine.node.freeze()
            self.node.later(seconds, self._thaw, actor)

    def _thaw(self, actor: Any) -> None:
        self.observer.note(actor.machine.name, "goes on")
        actor.machine.node.thaw()

    def _cut_pod(self) -> None:
        if actor := self._pick([pod for pod in self.pods if not pod.transport.connection.is_cut]):
            self._cut(actor.machine.name, actor.transport.connection)

    def _kill_demux(self) -> None:
        if actor := self._pick(self.demuxes):
            self.observer.note(actor.machine.name, "is killed")
            self._bury(actor, self.demuxes)
            self.observer.demux_ended(actor.machine.name)
            self.node.later(self.chance.choice([0.1, 1.0, 3.0]), self.start_demux, actor.machine.name)

    def _freeze_demux(self) -> None:
        self._freeze(self._pick(self.demuxes), self.chance.choice(self.profile.freezes))

    def _cut_demux(self) -> None:
        if actor := self._pick(self.demuxes):
            self._cut(actor.machine.name, actor.transport.connection)

    def _cut_agent(self) -> None:
        if actor := self._pick(self.agents):
            self._cut(actor.machine.name, actor.bus.connection)

    def _cut(self, name: str, connection: Any) -> None:
        out, back = self.chance.choice([(True, True), (True, False), (False, True)])
        seconds = self.chance.choice(self.profile.cuts)
        self.observer.note(name, f"is cut off NATS for {seconds:g} s (out {out}, back {back})")
        connection.cut(out=out, back=back, seconds=seconds)

    def _cut_agent_from_database(self) -> None:
        if actor := self._pick(self.agents):
            seconds = self.chance.choice([0.5, 2.0, 5.0, 9.0])
            self.observer.note(actor.machine.name, f"is cut off MongoDB for {seconds:g} s")
            actor.view.cut = True

            def mend() -> None:
                actor.view.cut = False

            self.node.later(seconds, mend)

    def _kill_agent(self) -> None:
        if actor := self._pick(self.agents):
            self.observer.note(actor.machine.name, "is killed")
            self._bury(actor, self.agents)
            self.node.later(self.chance.choice([0.2, 1.0, 3.0]), self._start_agent_again, actor.machine.name)

    def _start_agent_again(self, name: str) -> None:
        if not self._restoring:
            self.start_agent(name)

    async def _lose_time(self) -> None:
        """A backup; some time later all agents are stopped, it is restored and announced, and they start."""
        await asyncio.sleep(self.chance.uniform(5.0, 15.0))
        self.observer.note("mongodb", "is backed up")
        backup = self.database.back_up()
        await asyncio.sleep(self.chance.uniform(*self.profile.lost))
        self.observer.note("world", "stops all agents")
        self._restoring = True
        names = [f"agent-{i}" for i in range(self.numbers[1])]
        for actor in list(self.agents):
            self._bury(actor, self.agents)
        await asyncio.sleep(self.chance.choice([0.1, 2.0, 9.0]))
        self.observer.note("mongodb", "is restored")
        self.faults["restore"] += 1
        self.database.restore(backup)
        self.observer.restored()
        view = View(self.database, self.node)
        while self._restoring:
            try:
                await announce_restored(view, LEADER, round(ALLOCATION * 1000))
                self._restoring = False
            except (StoreUnavailable, Misconfigured) as error:
                self.observer.note("world", f"announces in vain: {error}")
        self.observer.note("world", "has announced the restore")
        for name in names:
            self.start_agent(name)

    def _change_settings(self) -> None:
        """Other durations, a larger `W`, and all agents started again with them, one by one. Those that end
        by themselves meanwhile come back with the old ones."""
        chance, old = self.chance, self.settings
        self.settings = self._settings(
            chance.choice(self.profile.livenesses),
            chance.choice([a for a in self.profile.allocations if a != old.allocation_ttl] or [ALLOCATION]),
            chance.choice(self.profile.leaders),
            self.profile.usage_lag + chance.choice([0.0, 1.0]),
            revision=old.settings_revision + 1,
        )
        new = self.settings
        durations = f"L {new.liveness_ttl:g}, A {new.allocation_ttl:g}, T {new.leader_ttl:g}"
        self.observer.note("world", f"settings of revision {new.settings_revision}: {durations} s")
        delay = 0.0
        for actor in list(self.agents):
            self.node.later(delay, self._roll, actor)
            delay += chance.choice([0.5, 2.0, 4.0])

    def _roll(self, actor: AgentActor) -> None:
        if actor in self.agents and actor.task is not None and not actor.machine.node.stopped:
            self.observer.note(actor.machine.name, "is told to end")
            actor.task.cancel()
            self.node.later(self.chance.choice([0.1, 1.0]), self._roll_on, actor)

    def _roll_on(self, actor: AgentActor) -> None:
        if actor in self.agents:
            self._bury(actor, self.agents)
            self.start_agent(actor.machine.name)

    def _elect(self) -> None:
        seconds = self.chance.choice([0.5, 2.0, 5.0])
        self.observer.note("mongodb", f"elects for {seconds:g} s")
        self.database.elect(seconds)

    def _restart_nats(self) -> None:
        seconds = self.chance.choice([0.1, 1.0, 3.0])
        self.observer.note("nats", f"restarts, down for {seconds:g} s")
        self.network.restart(seconds)

    # --- judgement -----------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        self.observer.note("world", "calms down")
        self.calm = self.network.calm = self.database.calm = True
        self.stops = 0.0
        self.database.available.set()
        for machine in self._machines():
            machine.stops = 0.0
        for agent in self.agents:
            agent.view.cut = False
        for connection in list(self.network.connections):
            connection.mend()

    async def _until_healed(self, most: float) -> None:
        """Until all that the judgement demands has held for a while, at most so many seconds."""
        deadline, quiet_since = self.loop.time() + most, float("inf")
        quiet = max(self.profile.livenesses)  # for so long: a pod that nobody answers is suspect by then
        while (now := self.loop.time()) < deadline and now - quiet_since < quiet:
            healed = not self._unsettled() and not any(True for _ in self._faults())
            quiet_since = min(quiet_since, now) if healed else float("inf")
            await self._until_failed(HEALED_LOOK_SECONDS)

    def _unsettled(self) -> bool:
        """Whether something that the storm has begun is still to come."""
        restored = read_restored(self.database.documents(SETTINGS))
        return (
            len(self.pods) < self.numbers[0]
            or len(self.agents) < self.numbers[1]
            or len(self.demuxes) < self.numbers[2]
            or any(pod.closing or not pod.at_work for pod in self.pods)
            or any(agent.settings is not self.settings for agent in self.agents)
            or any(machine.node.stopped for machine in self._machines())
            or not all(connection.connected for connection in self.network.connections)
            or any(line.busy for one in self.network.connections for line in (one.to_server, one.to_client))
            or self.database.late > 0
            or (self._restore is not None and not self._restore.done())
            or (restored is not None and restored.open)
        )

    async def _until_demuxes_agree(self) -> None:
        """Pods go on working: an event may be under way at any one moment, but not for long."""
        for _ in range(100):
            if all(actor.demux.synced and self._held(actor) == self._truth() for actor in self.demuxes):
                return
            await asyncio.sleep(0.02)

    def _table(self) -> dict[int, Chunk]:
        """Every chunk that the database has."""
        chunks = map(read_chunk, self.database.documents(POOL))
        return {chunk.n: chunk for chunk in chunks if chunk is not None}

    def _truth(self) -> dict[int, tuple[Any, ...]]:
        return {n: chunk.owner.key for n, chunk in self._table().items()}

    def _held(self, actor: DemuxActor) -> dict[int, tuple[Any, ...]]:
        return {n: owner.key for n, owner in actor.demux.chunks().items()}

    def _judge(self) -> None:
        """Once everything has healed: G3, G5, nobody waits."""
        for guarantee, what in self._faults():
            self.observer.broken(guarantee, what)

    def _faults(self) -> Iterator[tuple[str, str]]:
        """What must not be once everything has healed: the guarantee, and what is the matter."""
        for pod in self.pods:
            if not pod.left and pod.drsm.state != "live":
                yield "G6", f"{pod.machine.name} is {pod.drsm.state}"
            if pod.waiting_since is not None and self.loop.time() - pod.waiting_since > WAIT_MOST:
                yield "G6", f"{pod.machine.name} has waited since {pod.waiting_since:.1f}"
        yield from self._faulty_chunks()
        truth = self._truth()
        for actor in self.demuxes:
            held = self._held(actor)
            if held != truth or not actor.demux.synced:
                differs = sorted(set(held.items()) ^ set(truth.items()))
                yield "G5", f"{actor.machine.name} differs from the database: {differs}"

    def _faulty_chunks(self) -> Iterator[tuple[str, str]]:
        documents = self.database.documents(SESSIONS)
        alive = {document["_id"] for document in documents if document["state"] != DEAD}
        for n, chunk in sorted(self._table().items()):
            key = session_key(*chunk.owner.key)
            if key not in alive:
                yield "G3", f"chunk {n} still belongs to {key}, which is dead"
            if chunk.marked:
                yield "G3", f"chunk {n} of {key} is still marked"

    async def _count_the_free(self) -> None:
        """Every chunk is owned or free, none is lost: with all pods stopped, one that takes all that is
        granted gets every chunk that the database does not have."""
        for pod in self.pods:
            pod.machine.node.freeze()
        taker = Taker(self.network, self._machine("taker"))
        self._buried.append(taker.machine.node)
        taker.machine.node.start(self._guard(taker.take_all()))
        await asyncio.sleep(0)
        deadline = self.loop.time() + COUNT_SECONDS
        while missing := self._missing():
            if self.loop.time() >= deadline:
                self.observer.broken("G3", f"nobody owns chunks {missing}, and they are not granted")
            await self._until_failed(0.05)

    def _missing(self) -> list[int]:
        """Chunks that should have been granted by now to one that takes all."""
        return sorted(set(range(self.definition.capacity)) - self._table().keys())


class Taker:
    """A pod that does nothing but take every chunk there is."""

    def __init__(self, network: Network, machine: Machine) -> None:
        self.machine = machine
        self._transport = PodTransport(network, machine.node)
        self._chance = ambient.Chance(machine.chance)
        self._rpc = Rpc(self._transport, machine.clock, self._chance)
        self._subjects = Subjects("drsm")

    async def take_all(self) -> None:
        await self._transport.connect(COUNT_SECONDS)
        pod = wire.PodRef(self.machine.name, "10.0.0.1", "i")
        request = wire.Open(pod, (POOL,), self._chance.token())
        opened = await self._rpc.call(self._subjects.session("open"), request, wire.Opened, COUNT_SECONDS)
        subject = self._subjects.pool(POOL, "acquire")
        while True:
            wanted = wire.Acquire(
                pod.name, opened.body.incarnation, wire.ACQUIRE_COUNT_MAX, self._chance.token()
            )
            try:
                await self._rpc.call(subject, wanted, wire.Acquired, COUNT_SECONDS)
            except Refused as refused:
                if not isinstance(refused.error, PoolExhausted):
                    raise
                await asyncio.sleep(0.1)  # what is given back just now is free in a moment


class _Left(Exception):
    """A pod has left of its own."""
