"""`homer bench` from the command line: tables, files, and answers kept between runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from homer.errors import ConfigError
from tests.homer.bench.demo_llama import save_demo_llama

COMMANDS = "speed memory transport passkey multikey scaling overhead wire worker-memory all".split()
COMMANDS += ["costs", "simulate"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_demo_llama(folder)
    return folder


def test_every_measurement_has_a_command() -> None:
    text = CliRunner().invoke(app, ["bench", "--help"]).output
    for command in COMMANDS:
        assert command in text


def test_passkey_prints_a_table_and_goes_on_from_its_file(model_dir: Path, tmp_path: Path) -> None:
    command = ["bench", "passkey", "--model", str(model_dir), "--lengths", "0.75x,2x"]
    command += ["--methods", "homer,plain", "--variant", "wide:fan_in=4", "--plain-max-length"]
    command += ["1x", "--out", str(tmp_path), "--jobs", "1", "--samples"]
    first = CliRunner().invoke(app, [*command, "1"], catch_exceptions=False)
    for part in ("right answers", "homer", "plain", "wide", "not run", "n 1", "torch"):
        assert part in first.output
    lines = (tmp_path / "passkey.jsonl").read_text().splitlines()
    assert len(lines) == 5
    CliRunner().invoke(app, [*command, "2"], catch_exceptions=False)
    after = (tmp_path / "passkey.jsonl").read_text().splitlines()
    assert after[:5] == lines
    assert len(after) == 10
    saved = json.loads((tmp_path / "passkey.json").read_text())
    assert {cell["samples"] for cell in saved["results"]["cells"]} == {2}
    assert saved["machine"]["cores"] >= 1
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    CliRunner().invoke(app, [*command, "1", "--fresh"], catch_exceptions=False)
    assert len((tmp_path / "passkey.jsonl").read_text().splitlines()) == 5


def test_a_mistake_is_our_own_error(model_dir: Path, tmp_path: Path) -> None:
    command = ["bench", "multikey", "--model", str(model_dir), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--lengths", "far"])
    assert isinstance(result.exception, ConfigError)
