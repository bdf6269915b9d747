"""What an operator is told to watch is there: each metric, each label, each event of the log."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from drsm_agent.metrics import Metrics

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "docs/settings.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
LEVELS = {"exception": "error"} | {level: level for level in ("warning", "error", "critical")}
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def _rules() -> list[Any]:
    (group,) = YAML(typ="safe").load(ROOT / "deploy/alerts.yaml")["groups"]
    return list(group["rules"])


def _series() -> dict[str, set[str]]:
    """Of each time series that an agent has, its labels."""
    return {
        family.name + suffix: set(_labels(family.name))
        for family in Metrics().registry.collect()
        for suffix in SUFFIXES[family.type]
    }


def _labels(family: str) -> tuple[str, ...]:
    return tuple(Metrics().registry._names_to_collectors[family]._labelnames)  # type: ignore[attr-defined]


def _words(cell: str) -> list[str]:
    """What stands in back quotes."""
    return re.findall(r"`(\w+)`", cell)


def _row(text: str, name: str) -> list[str]:
    """The cells of the one row of a table that has `name` in its first."""
    (found,) = [row for row in _rows(text) if f"`{name}`" in row[0]]
    return found


def _rows(text: str) -> list[list[str]]:
    """The cells of each row of a table that begins with a name."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _logged() -> Iterator[tuple[str, str]]:
    """Level and event of each line above info that the agent can log."""
    for file in sorted((ROOT / "drsm_agent").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("log"), attr=level)) if level in LEVELS:
                    assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}"
                    yield LEVELS[level], str(node.args[0].value)


LOGGED = sorted(set(_logged()))


def test_the_rules_are_what_prometheus_reads() -> None:
    """By the fields of its rule files; a name once."""
    rules = _rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_an_agent_measures(rule: Any) -> None:
    """Of a metric or a label that is not there Prometheus says nothing, and the alert never comes."""
    series = _series()
    asked = re.findall(r"(drsm_\w+)(?:\{(\w+))?", rule["expr"])
    assert asked
    for name, label in asked:
        assert name in series
        assert not label or label in series[name]
    for label in re.findall(r"by \((\w+)\)", rule["expr"]) + re.findall(r"\$labels\.(\w+)", str(rule)):
        assert all(label in series[name] for name, _ in asked)


def test_every_alert_is_explained_and_has_its_remedy() -> None:
    """Three places, one list of names."""
    names = [rule["alert"] for rule in _rules()]
    for page in (SETTINGS, OPERATIONS):
        assert sorted(re.findall(r"^\| `(Drsm\w+)`", page, re.MULTILINE)) == sorted(names)


@pytest.mark.parametrize(("level", "event"), LOGGED, ids=[event for _, event in LOGGED])
def test_every_event_above_info_is_in_the_table(level: str, event: str) -> None:
    """With the level that it has, so that an alert on the level and the table say the same."""
    assert level in _row(SETTINGS, event)[1]


def test_every_event_of_the_table_is_in_the_source() -> None:
    """A renamed event would leave its old name behind."""
    table = SETTINGS.partition("| log event | level | says |")[2].partition("\n\n")[0]
    events = [event for cell in re.findall(r"^\| (`[^|]*)", table, re.MULTILINE) for event in _words(cell)]
    source = "".join(file.read_text() for file in (ROOT / "drsm_agent").rglob("*.py"))
    assert len(events) >= len(LOGGED)
    assert [event for event in events if f'"{event}"' not in source] == []


def test_the_table_of_metrics_is_what_an_agent_measures() -> None:
    """Each by its name and its type, with its labels."""
    documented = {
        (_words(row[0])[0], row[1], *_words(row[2])) for row in _rows(SETTINGS) if row[1] in SUFFIXES
    }
    registry = Metrics().registry
    measured = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type, *_labels(family.name))
        for family in registry.collect()
    }
    assert documented == measured


def test_the_severest_events_are_found_in_the_source() -> None:
    """Else the test above would test nothing."""
    assert {("critical", "database_went_back"), ("error", "internal_error"), ("warning", "put_off")} <= set(
        LOGGED
    )
