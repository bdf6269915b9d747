"""One leader at a time, whatever the clocks, delays and lost answers; and never none for long."""

import heapq
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from drsm_agent.core.election import Election
from drsm_agent.core.lease import CHECK, RATE, holder_duration
from drsm_agent.core.writes import Insert, LeaderRecord, Update, first_lead, take_lead

T = 3.0
OTHERS = LeaderRecord("agent-2", 7, 3, 3000)


class Database:
    """The one document, with the guards of the writes."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None

    @property
    def record(self) -> LeaderRecord | None:
        if self.document is None:
            return None
        return LeaderRecord(**{name: self.document[name] for name in ("holder", "term", "counter", "ttl_ms")})

    def write(self, write: Insert | Update) -> bool:
        """Whether the guard matched."""
        if isinstance(write, Insert):
            if self.document is not None:
                return False
            self.document = dict(write.document)
            return True
        if self.document is None or any(self.document[name] != value for name, value in write.where.items()):
            return False
        self.document |= write.set
        for name, more in write.inc.items():
            self.document[name] += more
        return True


def winner(agent: str = "agent-1", ttl: float = T, sent: float = 100.0) -> Election:
    """An agent that has just won an empty record."""
    election = Election(agent, ttl)
    taken = election.observed(None, sent)
    assert taken is not None
    election.won(taken, sent)
    return election


# --- Taking over ----------------------------------------------------------------------------------


def test_the_first_agent_takes_term_1_at_once() -> None:
    """There is nobody to wait for."""
    election = Election("agent-1", T)
    assert election.observed(None, 5.0) == first_lead(LeaderRecord("agent-1", 1, 0, 3000))


def test_a_new_term_is_above_all_that_are_known() -> None:
    """Also those that only sessions or pods still name, as after a restored database."""
    assert Election("agent-1", T).observed(None, 5.0, floor=9) == first_lead(
        LeaderRecord("agent-1", 10, 0, 3000)
    )
    released = replace(OTHERS, holder="")
    for floor, term in ((0, 8), (6, 8), (7, 8), (20, 21)):
        wanted = take_lead(released, LeaderRecord("agent-1", term, 0, 3000))
        assert Election("agent-1", T).observed(released, 5.0, floor=floor) == wanted


@pytest.mark.parametrize(
    ("mine", "others_ms", "patience"), [(3.0, 3000, 3.0), (3.0, 9000, 9.0), (5.0, 1000, 5.0)]
)
def test_a_record_is_taken_over_once_unchanged_for_the_larger_ttl(
    mine: float, others_ms: int, patience: float
) -> None:
    """On the observer's own clock, counted from when it first saw it."""
    record = replace(OTHERS, ttl_ms=others_ms)
    election = Election("agent-1", mine)
    assert [election.observed(record, 50.0 + after) for after in (0.0, 1.0, patience - 0.001)] == [None] * 3
    assert election.observed(record, 50.0 + patience) == take_lead(
        record, LeaderRecord("agent-1", 8, 0, round(mine * 1000))
    )


@pytest.mark.parametrize("change", [{"counter": 4}, {"term": 8}, {"holder": "agent-3"}, {"ttl_ms": 3001}])
def test_any_change_of_the_record_starts_the_wait_anew(change: dict[str, Any]) -> None:
    """Somebody lives."""
    election = Election("agent-1", 3.001)
    changed = replace(OTHERS, **change)
    assert [election.observed(OTHERS, 50.0), election.observed(changed, 52.9)] == [None, None]
    assert [election.observed(changed, 55.9), election.observed(changed, 55.902) is None] == [None, False]


def test_a_first_look_is_no_proof_of_death() -> None:
    """However late on the clock it comes."""
    assert Election("agent-1", T).observed(OTHERS, 1e9) is None


def test_a_released_record_is_taken_at_once() -> None:
    """A leader that ends well has stopped before it said so."""
    election = Election("agent-1", T)
    assert election.observed(OTHERS, 50.0) is None
    released = replace(OTHERS, holder="")
    assert election.observed(released, 50.1) == take_lead(released, LeaderRecord("agent-1", 8, 0, 3000))


def test_an_agents_own_old_record_is_waited_for_too() -> None:
    """A restarted agent is not the one that leads; the old process may still run."""
    record = replace(OTHERS, holder="agent-1")
    election = Election("agent-1", T)
    assert [election.observed(record, now) for now in (50.0, 52.999)] == [None, None]
    assert election.observed(record, 53.0) is not None


def test_after_a_lost_lead_the_wait_starts_anew() -> None:
    """What was seen before says nothing about now."""
    election = Election("agent-1", T)
    assert election.observed(OTHERS, 50.0) is None
    election.lost()
    assert (election.seen, election.observed(OTHERS, 60.0), election.seen) == (None, None, OTHERS)


# --- Holding --------------------------------------------------------------------------------------


def test_the_lead_counts_from_before_the_write_was_sent() -> None:
    """For the shortened lease, and not a moment longer."""
    election = winner(sent=100.0)
    end = 100.0 + holder_duration(T)
    assert [election.held(now) for now in (100.0, end - 0.001, end, end + 100)] == [True, True, False, False]


def test_a_renewal_counts_from_before_it_was_sent() -> None:
    """Whenever its answer came; an older one does not shorten the lead."""
    election = winner(sent=100.0)
    election.renewed(101.0)
    election.renewed(100.5)
    end = 101.0 + holder_duration(T)
    assert [election.held(now) for now in (end - 0.001, end)] == [True, False]


def test_a_lapsed_lead_may_be_renewed_while_nobody_took_it() -> None:
    """The guard decides: holder and term are still this agent's."""
    election = winner(sent=100.0)
    assert election.held(110.0) is False
    election.renewed(110.0)
    assert election.held(110.1) is True


def test_a_lost_lead_stays_lost() -> None:
    """A renewal's answer that comes afterwards changes nothing."""
    election = winner(sent=100.0)
    election.lost()
    election.renewed(100.5)
    assert (election.held(100.6), election.mine, election.renewal()) == (False, None, None)


def test_nothing_is_held_before_it_is_won() -> None:
    """An agent that only looks on does not lead."""
    election = Election("agent-1", T)
    election.observed(OTHERS, 50.0)
    election.observed(OTHERS, 60.0)
    assert (election.held(60.0), election.mine, election.renewal()) == (False, None, None)


def test_a_term_has_three_renewals() -> None:
    """T/3; two may get lost."""
    assert Election("agent-1", 3.0).period == 1.0


def test_renewals_are_seen_by_others() -> None:
    """Each one that arrives moves the counter; the agent's own view follows its answers."""
    database, election = Database(), Election("agent-1", T)
    taken = election.observed(database.record, 0.0)
    assert taken is not None
    assert database.write(taken) is True
    assert election.won(taken, 0.0) == database.record
    for sent in (1.0, 2.0):
        renewal = election.renewal()
        assert renewal is not None
        assert database.write(renewal) is True
        election.renewed(sent)
        assert election.mine == database.record
    assert asdict(election.mine or OTHERS) == {"holder": "agent-1", "term": 1, "counter": 2, "ttl_ms": 3000}


def test_a_renewal_after_one_whose_answer_got_lost_is_seen_too() -> None:
    """Else a standby would count from the first one while the holder counts from the second."""
    database, election, standby = Database(), Election("agent-1", T), Election("agent-2", T)
    taken = election.observed(None, 0.0)
    assert taken is not None
    database.write(taken)
    election.won(taken, 0.0)
    for sent, answered in ((1.0, False), (2.0, True)):
        renewal = election.renewal()
        assert renewal is not None
        database.write(renewal)
        if answered:
            election.renewed(sent)
        assert standby.observed(database.record, sent) is None
    assert standby.observed(database.record, 4.999) is None


# --- Two agents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, -1e6, 1e6])
def test_the_earliest_take_over_comes_after_the_latest_effect(offset: float) -> None:
    """The slowest holder, the fastest standby, no time on the way: true time T/(1+r)."""
    leader = winner(sent=0.0)
    standby = Election("agent-2", T)
    assert standby.observed(leader.mine, offset) is None
    early, late = T / (1 + RATE) - 0.001, T / (1 + RATE) + 0.001
    assert standby.observed(leader.mine, offset + early * (1 + RATE)) is None
    assert standby.observed(leader.mine, offset + late * (1 + RATE)) is not None
    assert leader.held((T / (1 + RATE) - CHECK - 0.001) * (1 - RATE)) is True
    assert leader.held((T / (1 + RATE) - CHECK) * (1 - RATE) + 1e-9) is False


class World:
    """Two agents and a database in true time, with messages under way. Each agent has a clock of its own."""

    def __init__(
        self, ttls: tuple[float, float], rates: tuple[float, float], offsets: tuple[float, float]
    ) -> None:
        self.now, self.database = 0.0, Database()
        self.agents = [Election(f"agent-{i}", ttl) for i, ttl in enumerate(ttls)]
        self.rates, self.offsets = rates, offsets
        self.busy = [0.0, 0.0]
        self.began: list[float | None] = [None, None]  # when each began to lead
        self.last = 0  # who began last
        self.terms: list[int] = []
        self._under_way: list[tuple[float, int, Callable[[], object]]] = []
        self._sent = 0

    def clock(self, i: int, at: float) -> float:
        """Agent `i`'s clock at a true time."""
        return self.offsets[i] + self.rates[i] * at

    def advance(self, until: float) -> None:
        """Let everything arrive that was under way."""
        while self._under_way and self._under_way[0][0] <= until:
            self.now, _, arrive = heapq.heappop(self._under_way)
            arrive()
            self.check()
        self.now = until
        self.check()

    def check(self) -> None:
        """When one began to lead, all that another did on its last check had had its effect."""
        for i, agent in enumerate(self.agents):
            if self.began[i] is None and agent.held(self.clock(i, self.now)):
                self.began[i], self.last = self.now, i
        began, before = self.began[self.last], self.began[1 - self.last]
        if began is not None and before is not None:
            checked = self.clock(1 - self.last, max(before, began - CHECK))
            assert not self.agents[1 - self.last].held(checked)

    def step(self, i: int, there: float, back: float, answered: bool, quits: bool) -> None:
        """Agent `i` does what is its turn; what it sends takes `there`, the answer `back`, if it comes."""
        if self.now < self.busy[i]:
            return
        agent, clock = self.agents[i], self.clock(i, self.now)
        if agent.mine is None:
            self._at(there, lambda: self._look(i, there, back, answered))
            self.busy[i] = self.now + 2 * there + 2 * back
            return
        renewal = agent.renewal()
        if quits or not agent.held(clock) or renewal is None:
            released = replace(agent.mine, holder="")
            guard = {"_id": "leader", "holder": agent.agent, "term": agent.mine.term}
            agent.lost()
            self.began[i] = None
            self._at(there, lambda: self._apply(Update("drsm_leader", guard, set=asdict(released))))
            self.busy[i] = self.now + there
            return

        def arrive() -> None:
            if self._apply(renewal) and answered:
                self._at(back, lambda: agent.renewed(clock))

        self._at(there, arrive)
        # an answer that is late, or never comes, is not waited for beyond T; the write may come all the same
        self.busy[i] = self.now + min(there + back, agent.ttl)

    def _look(self, i: int, there: float, back: float, answered: bool) -> None:
        record = self.database.record

        def read() -> None:
            sent = self.clock(i, self.now)
            write = self.agents[i].observed(record, sent)
            if write is not None:
                self._at(there, lambda: self._take(i, write, sent, back if answered else None))

        self._at(back, read)

    def _take(self, i: int, write: Insert | Update, sent: float, back: float | None) -> None:
        if self._apply(write):
            assert self.database.document is not None
            self.terms.append(self.database.document["term"])
            if back is not None:
                self._at(back, lambda: self._won(i, write, sent))

    def _won(self, i: int, write: Insert | Update, sent: float) -> None:
        self.agents[i].won(write, sent)
        self.began[i] = None  # it leads if the answer did not come too late

    def _apply(self, write: Insert | Update) -> bool:
        return self.database.write(write)

    def _at(self, after: float, arrive: Callable[[], object]) -> None:
        self._sent += 1
        heapq.heappush(self._under_way, (self.now + after, self._sent, arrive))


def a_life_of_two(seed: int, ttls: tuple[float, float]) -> World:
    """Some minutes of two agents that mostly work, and at times stall, lose answers, are slow, or end."""
    chance = random.Random(seed)
    rates = chance.choice([(1 - RATE, 1 + RATE), (1 + RATE, 1 - RATE), (1.0, 1.0)])
    world = World(ttls, rates, (chance.uniform(-1e6, 1e6), chance.uniform(-1e6, 1e6)))
    turn = [0.0, 0.0]
    slow, silent = chance.choice([0.0, 0.05, 0.3]), chance.choice([0.0, 0.2, 0.5])

    def delay() -> float:
        return chance.uniform(0, 1.5) if chance.random() < slow else chance.choice([0.0, 0.0, 0.001, 0.05])

    for _ in range(400):
        i = turn.index(min(turn))
        world.advance(turn[i])
        answered, quits = chance.random() >= silent, chance.random() < 0.01
        world.step(i, delay(), delay(), answered=answered, quits=quits)
        leads = world.agents[i].mine is not None
        pause = (
            chance.choice([ttls[i] / 3, ttls[i] / 2]) if leads else chance.choice([0.01, 0.05, ttls[i] / 3])
        )
        stalled = chance.uniform(0, 2 * max(ttls)) if chance.random() < 0.05 else 0.0
        turn[i] = world.now + pause + stalled
    return world


@pytest.mark.parametrize("ttls", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0), (1.0, 1.5)])
def test_two_agents_never_both_lead(ttls: tuple[float, float]) -> None:
    """With clocks apart in offset and rate, slow and lost answers, writes that arrive late, stalls, and
    agents that end; no term has two leaders, and the lead does change hands."""
    terms = 0
    for seed in range(30):
        world = a_life_of_two(seed, ttls)
        assert world.terms == list(range(1, len(world.terms) + 1))
        terms += len(world.terms)
    assert terms > 60


@pytest.mark.parametrize("ttls", [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_a_leader_that_dies_is_followed(ttls: tuple[float, float]) -> None:
    """Within the larger T and one look; and it keeps the lead while it renews."""
    world = World(ttls, (1.0, 1.0), (0.0, 1e6))
    for _ in range(30):  # both alive
        for i in (0, 1):
            world.step(i, 0.001, 0.001, answered=True, quits=False)
        world.advance(world.now + 0.2)
    assert world.terms == [1]
    died = world.now
    while len(world.terms) == 1 and world.now < died + 10:
        world.step(1, 0.001, 0.001, answered=True, quits=False)
        world.advance(world.now + 0.2)
    assert world.terms == [1, 2]
    assert max(ttls) - 0.3 < world.now - died < max(ttls) + 0.5
