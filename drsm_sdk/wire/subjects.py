"""Every NATS subject of the protocol. Nothing else in the project spells one.

<prefix>.rpc.session.<verb>         requests of pods about their session
<prefix>.rpc.pool.<pool>.<verb>     requests about one pool
<prefix>.rpc.pools                  what pools there are, and who leads
<prefix>.rpc.agent.probe            the leader's request to itself (rule R7)
<prefix>.evt.<pool>.<verb>          events; a verb may have two tokens (`chunk.claimed`)
"""

import re
from dataclasses import dataclass

PREFIX_DEFAULT = "drsm"
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,3}")
_POOL = re.compile(r"(?!drsm_)[a-z0-9][a-z0-9_-]{0,31}")

SESSION_VERBS = ("open", "join", "renew", "report", "chunks", "close")
POOL_VERBS = ("acquire", "release", "scanned", "snapshot", "pods", "owner")


def valid_pool_name(name: str) -> bool:
    """Whether `name` may name a pool: `[a-z0-9][a-z0-9_-]{0,31}`, not beginning with `drsm_`."""
    return _POOL.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the verb as the protocol's table writes it, and the pool it is about."""

    verb: str
    pool: str | None = None


@dataclass(frozen=True, slots=True)
class Subjects:
    """The subjects of one domain, all under `prefix` (one to four NATS tokens)."""

    prefix: str = PREFIX_DEFAULT

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(
                f"subject prefix must be 1 to 4 dot-separated tokens of letters, digits, '_' and '-', "
                f"got {self.prefix!r}"
            )

    @property
    def all_requests(self) -> str:
        """What the leader subscribes to."""
        return f"{self.prefix}.rpc.>"

    @property
    def pools(self) -> str:
        return f"{self.prefix}.rpc.pools"

    @property
    def probe(self) -> str:
        return f"{self.prefix}.rpc.agent.probe"

    def session(self, verb: str) -> str:
        return f"{self.prefix}.rpc.session.{verb}"

    def pool(self, pool: str, verb: str) -> str:
        return f"{self.prefix}.rpc.pool.{_checked(pool)}.{verb}"

    def event(self, pool: str, verb: str) -> str:
        return f"{self.prefix}.evt.{_checked(pool)}.{verb}"

    def events(self, pool: str) -> str:
        """What a consumer of one pool subscribes to."""
        return f"{self.prefix}.evt.{_checked(pool)}.>"

    @property
    def all_events(self) -> str:
        """What an operator subscribes to who watches every pool."""
        return f"{self.prefix}.evt.>"

    def route(self, subject: str) -> Route | None:
        """The request a subject stands for, or None for one that the protocol does not know."""
        head = f"{self.prefix}.rpc."
        match subject.removeprefix(head).split(".") if subject.startswith(head) else []:
            case ["session", verb] if verb in SESSION_VERBS:
                return Route(f"session.{verb}")
            case ["pool", pool, verb] if verb in POOL_VERBS and valid_pool_name(pool):
                return Route(verb, pool)
            case ["pools"]:
                return Route("pools")
            case ["agent", "probe"]:
                return Route("probe")
        return None

    def ours(self, subject: str) -> bool:
        """Whether a subject is one of this domain's: nobody is answered there, and no stranger speaks there
        through the agent."""
        ours = f"{self.prefix}.rpc.", f"{self.prefix}.evt."
        # In whatever case: of what the server refuses it is told in lower case.
        return subject.lower().startswith(tuple(head.lower() for head in ours))

    def event_verb(self, subject: str) -> str:
        """The verb of an event's subject: what follows `<prefix>.evt.<pool>.`."""
        return subject.removeprefix(f"{self.prefix}.evt.").partition(".")[2]


def _checked(pool: str) -> str:
    if not valid_pool_name(pool):
        raise ValueError(
            f"pool name must match [a-z0-9][a-z0-9_-]{{0,31}} and not begin with drsm_, got {pool!r:.60}"
        )
    return pool
