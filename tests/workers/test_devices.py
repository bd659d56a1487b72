"""Layers on two devices, emulated on the CPU: in one process, and across workers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SECONDS = 300.0


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What was computed in memory, over two devices, and by two workers of two devices each."""
    # Emulation changes torch for a whole process.
    command = [sys.executable, "-m", "tests.workers.over_devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    read: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.mark.parametrize("how", ["spread", "across"])
@pytest.mark.parametrize("config", ["default", "paper"])
def test_layers_on_two_devices_answer_as_on_one(
    told: dict[str, Any], config: str, how: str
) -> None:
    expected, got = told[f"{config}/memory"], told[f"{config}/{how}"]
    assert got["kept"] == expected["kept"]
    assert got["tokens"] == expected["tokens"]
    assert got["logits"] == pytest.approx(expected["logits"], abs=1e-4)


def test_rows_of_a_layer_are_on_its_device(told: dict[str, Any]) -> None:
    for name in ("default/spread", "default/across", "paper/spread", "paper/across"):
        assert told[name]["devices"] == ["emulated:0"] * 3 + ["emulated:1"] * 5


def test_what_is_on_the_wrong_device_is_noticed(told: dict[str, Any]) -> None:
    assert "got tensors on emulated:0, emulated:1" in told["misplaced"]
