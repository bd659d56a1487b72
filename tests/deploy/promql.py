"""Which series the alerts, the recorded rules and the dashboard ask Prometheus for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import promql_parser
import yaml

from tests.deploy.kubernetes import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
# What Prometheus adds to every series, or makes by itself.
OF_PROMETHEUS = {"job", "instance"}


@dataclass
class Asked:
    """A selector of series: its metric, the values that labels must have, and labels grouped by."""

    metric: str
    values: dict[str, set[str]] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)

    @property
    def labels(self) -> set[str]:
        return {*self.values, *self.grouped} - OF_PROMETHEUS


def expressions() -> dict[str, str]:
    """All expressions of rules and dashboard, by where they stand."""
    found = {}
    for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            found[rule.get("alert") or rule["record"]] = rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return read


def asked_series(expression: str) -> list[Asked]:
    """Raises `ValueError` where it is no PromQL."""
    # What Grafana puts in the place of its variable.
    return list(_walk(promql_parser.parse(expression.replace("$__rate_interval", "1m")), set()))


def _walk(node: Any, grouped: set[str]) -> Iterator[Asked]:
    match node:
        case promql_parser.VectorSelector():
            values = {m.name: set(m.value.split("|")) for m in node.matchers.matchers}
            yield Asked(node.name or "", values, grouped)
        case promql_parser.MatrixSelector():
            yield from _walk(node.vector_selector, grouped)
        case promql_parser.AggregateExpr():
            yield from _walk(node.expr, set(node.modifier.labels) if node.modifier else set())
        case promql_parser.BinaryExpr():
            yield from _walk(node.lhs, grouped)
            yield from _walk(node.rhs, grouped)
        case promql_parser.Call():
            for argument in node.args:
                yield from _walk(argument, grouped)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            yield from _walk(node.expr, grouped)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise TypeError(f"{type(node).__name__} is not looked into; do so here")
