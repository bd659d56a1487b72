"""Alerts, recorded rules and the dashboard, as Prometheus and Grafana read them.

That the metrics exist is tested on a running service, in `tests/cluster/test_seeing.py`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubernetes import ROOT, tool
from tests.deploy.promql import MONITORING, asked_series, dashboard, expressions


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("promtool"), *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
    )


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_prometheus_takes_its_configuration_and_the_rules(tmp_path: Path) -> None:
    for name in ("prometheus.yaml", "rules.yaml"):
        shutil.copy(MONITORING / name, tmp_path)
    (tmp_path / "token").write_text("0123456789abcdef")
    done = promtool("check", "config", str(tmp_path / "prometheus.yaml"))
    assert done.returncode == 0, done.stderr


def test_alerts_are_raised_where_they_should_be_and_nowhere_else() -> None:
    done = promtool("test", "rules", "rules.test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)", (MONITORING / "rules.test.yaml").read_text()))
    critical = [rule for rule in rules() if rule.get("labels", {}).get("severity") == "critical"]
    assert tested >= {rule["alert"] for rule in critical}


def test_an_alert_that_is_wrong_is_found(tmp_path: Path) -> None:
    for name in ("rules.yaml", "rules.test.yaml"):
        text = (MONITORING / name).read_text()
        (tmp_path / name).write_text(text.replace("== 0", "== 1"))
    done = promtool("test", "rules", str(tmp_path / "rules.test.yaml"))
    assert done.returncode != 0


def test_every_alert_leads_to_a_page_that_is_there() -> None:
    for rule in rules():
        if "alert" in rule:
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            text = (ROOT / page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}
            assert anchor in slugs, rule["alert"]


@pytest.mark.parametrize("place", expressions())
def test_expressions_are_promql_about_something(place: str) -> None:
    assert asked_series(expressions()[place])


def test_panels_lie_side_by_side_and_ask_the_chosen_source() -> None:
    read = dashboard()
    (source, instance) = read["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert instance["name"] == "instance"
    panels = read["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            sources = [panel["datasource"], *(one["datasource"] for one in panel["targets"])]
            assert all(one["uid"] == "${datasource}" for one in sources)


def test_grafana_is_given_the_dashboard_and_prometheus() -> None:
    provisioning = MONITORING / "grafana"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    providers = yaml.safe_load((provisioning / "dashboards" / "homer.yaml").read_text())
    mounted = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text().replace("!reset", ""))
    grafana = mounted["services"]["grafana"]["volumes"]
    (folder,) = (one["options"]["path"] for one in providers["providers"])
    assert f"./monitoring/dashboard.json:{folder}/homer.json:ro" in grafana
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in mounted["services"]
