"""Short runs of faults: every answer is as if nothing had happened. `make chaos` runs long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos import namespaces
from tests.chaos.fleet import REPOSITORY
from tests.chaos.report import from_json, show

SECONDS = 240
SMALL = ("--lengths", "700", "6000", "--workers", "3")


def run_faults(folder: Path, where: str, seed: int, faults: int, *options: str) -> None:
    """Run a part of `python -m tests.chaos`, and look at what became of the answers."""
    result, log = folder / "outcome.json", folder / "log"
    command = [sys.executable, "-m", "tests.chaos", "--where", where, "--seed", str(seed)]
    command += ["--faults", str(faults), "--json", str(result), "--log", str(log), *options]
    if where == "network":
        command = namespaces.inside(command)
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert result.exists(), f"{done.stderr}\n{log.read_text()[-5000:] if log.exists() else ''}"
    outcome = from_json(result.read_text())
    show(outcome, seed, Console(width=120))
    assert len(outcome.injected) >= faults
    assert outcome.right > 0
    assert (outcome.wrong, outcome.lost, outcome.left) == ([], [], []), log.read_text()[-5000:]
    assert done.returncode == 0


@pytest.mark.timeout(SECONDS + 30)
def test_workers_die_hang_and_are_cut_off_and_every_answer_is_right(tmp_path: Path) -> None:
    run_faults(tmp_path, "loopback", 13, 7, *SMALL)


@pytest.mark.timeout(SECONDS + 30)
def test_hosts_of_a_network_fail_and_every_answer_is_right(tmp_path: Path) -> None:
    if why_not := namespaces.missing():
        pytest.skip(why_not)
    run_faults(tmp_path, "network", 14, 5, *SMALL)
