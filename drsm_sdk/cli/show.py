"""Answers as tables for a terminal. Pure: what is shown, not where."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from drsm_sdk.pods import Owner
from drsm_sdk.snapshot import Snapshot
from drsm_sdk.wire import codec
from drsm_sdk.wire import messages as m
from drsm_sdk.wire.definition import Definition
from drsm_sdk.wire.messages import printable
from drsm_sdk.wire.space import INTEGER, WIDTH, Space


class Run(NamedTuple):
    """Neighbouring chunks with the same owner and the same mark."""

    pool: str
    first: int
    last: int
    owner: Owner
    marked: bool

    @property
    def orphaned(self) -> bool:
        return self.owner.state == "down"


def pools(answer: m.Pools) -> str:
    rows = []
    for pool in answer.pools:
        definition, used = pool.definition, f"{pool.chunks / max(pool.capacity, 1):.1%}"
        numbers = (pool.chunks, pool.capacity, used, pool.pods, pool.orphans, pool.marked)
        rows.append((definition.name, place(definition), *numbers))
    head = ("pool", "ids", "chunks", "capacity", "used", "pods", "orphans", "marked")
    return f"{_table(head, rows)}\n\nled by {leader(answer.leader)}"


def pool(state: m.PoolState) -> str:
    """One pool: its definition, and how it stands."""
    definition = state.definition
    fields: dict[str, Any] = {
        **_defined(definition),
        "chunks": f"{state.chunks} of {state.capacity} owned",
        "pods": state.pods,
        "orphans": state.orphans,
        "marked": state.marked,
    }
    return _fields(fields)


def place(space: Space) -> str:
    """Where the ids of a pool or space are."""
    if isinstance(space, Definition) and space.spaces:
        return " + ".join(f"{part.name}: {place(part)}" for part in space.spaces)
    if space.kind == INTEGER:
        return f"{space.bits} bits"
    items = "" if space.prefix == WIDTH[space.kind] else f" by /{space.prefix}"
    return ", ".join(space.ranges) + items


def _defined(definition: Definition) -> dict[str, Any]:
    """A definition's fields, as far as they say something; those of its spaces with their names before."""
    fields = {name: value for name, value in codec.to_map(definition).items() if value not in (0, "", [])}
    fields |= {"quarantine_ms": definition.quarantine_ms, "usage_lag_ms": definition.usage_lag_ms}
    for space in fields.pop("spaces", ()):
        said = {name: value for name, value in space.items() if value not in (0, "", [])}
        fields |= {f"{space['name']}.{name}": value for name, value in said.items() if name != "name"}
    return fields | {"ids of a chunk": definition.ids_per_chunk}


def leader(state: m.LeaderState) -> str:
    return f"{printable(state.agent)} (term {state.term}) for {duration(state.since_ms)}"


def pods(answers: Mapping[str, m.Pods]) -> str:
    rows = []
    for pool, answer in answers.items():
        for pod in sorted(answer.pods, key=lambda pod: (pod.pod.name, pod.pod.incarnation)):
            who = (pod.pod.name, pod.pod.incarnation, pod.state, pod.pod.ip or "-", pod.pod.instance or "-")
            rows.append((pool, *who, pod.chunks, pod.marked, *_used(pod.use)))
    who_columns = ("pool", "pod", "incarnation", "state", "ip", "instance")
    return _table(
        (*who_columns, "chunks", "marked", "issued", "released", "free", "oldest", "scanning"), rows
    )


def _used(use: m.Use | None) -> tuple[object, ...]:
    """What a pod says of its stock; a Go pod says nothing."""
    if use is None:
        return ("-",) * 5
    oldest = duration(use.oldest_ms) if use.issued else "-"
    return use.issued, use.released, use.free, oldest, use.scanning


def runs(snapshot: Snapshot) -> Iterator[Run]:
    """The chunks of a pool in ascending order, neighbours that are alike as one."""
    owners = {owner.key: owner for owner in snapshot.owners}
    owned = sorted((n, key) for key, numbers in snapshot.chunks for n in numbers)
    alike = groupby(
        enumerate(owned), lambda at: (at[1][0] - at[0], at[1][1], at[1][0] in snapshot.marked)
    )  # a run of neighbours has one difference between number and place
    for (_, key, marked), group in alike:
        numbers = [n for _, (n, _) in group]
        yield Run(snapshot.definition.name, numbers[0], numbers[-1], owners[key], marked)


def chunks(found: Iterable[Run], definitions: Mapping[str, Definition]) -> str:
    rows = []
    for run in found:
        definition = definitions[run.pool]
        numbers = f"{run.first}" if run.first == run.last else f"{run.first}-{run.last}"
        ids = " + ".join(_between(part, run.first, run.last) for part in definition.parts)
        owner = (run.owner.name, run.owner.incarnation, run.owner.state)
        marked = "marked" if run.marked else ""
        rows.append((run.pool, numbers, run.last - run.first + 1, ids, *owner, marked))
    return _table(("pool", "chunks", "count", "ids", "owner", "incarnation", "state", ""), rows)


def _between(part: Space, first: int, last: int) -> str:
    """The ids of neighbouring chunks, as the first and the last, or as a prefix."""
    if part.kind == INTEGER:
        return f"{part.first_id(first)}-{part.last_id(last)}"
    return "-".join(part.block(n) or "outside" for n in dict.fromkeys((first, last)))


def owner(id_: int | str, answer: m.OwnerAnswer, *, issuable: bool) -> str:
    fields: dict[str, Any] = {"id": id_, "chunk": "none: no id of this pool"}
    if answer.chunk is not None:
        fields |= {"chunk": answer.chunk, "owner": "nobody"}
        never = "never: 0, reserved, excluded, or beyond the slots of its chunk"
        fields |= {} if issuable else {"issued": never}
    if answer.owner is not None:
        who = answer.owner
        fields |= {"owner": who.name, "ip": who.ip or "-", "instance": who.instance or "-"}
        fields |= {"incarnation": who.incarnation, "state": who.state}
        fields |= {"marked": "yes: not scanned yet"} if answer.marked else {}
    return _fields(fields)


def duration(ms: int) -> str:
    """Milliseconds as a person says them, in the two largest units."""
    seconds = ms // 1000
    for unit, size, smaller, part in (
        ("d", 86_400, "h", 3_600),
        ("h", 3_600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell. A pool may have a hundred thousand rows."""
    lines = [[name.upper() for name in head], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _fields(fields: Mapping[str, object]) -> str:
    shown = {
        name: ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else value
        for name, value in fields.items()
    }
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {printable(value) or 'none'}" for name, value in shown.items())
