"""`homer calibrate` on the demo model: a file beside the model that Homer then finds by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from homer import HomerModel
from homer.bias import find_bias, load_bias
from homer.demo import MODEL_DIR
from homer.demo.tasks import plain_text
from homer.errors import BiasError, HomerError, PromptError
from tests.cluster.conftest import poll
from tests.golden_cases import model_dir

HOMER = [sys.executable, "-c", "from cluster.cli import main; main()"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model without its bias."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "bias.safetensors").unlink()
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(plain_text(3000, lambda words: len(words.split()), seed=5), encoding="utf-8")
    return file


def run(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--json"])
    if result.exception is not None and isinstance(result.exception, HomerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_bias_lands_beside_the_model_and_is_used(model: Path, text: Path) -> None:
    before = HomerModel.from_pretrained(model)
    assert before.bias is None
    told = run("--model", model, "--text", text, "--samples", 6)
    file = find_bias(model)
    assert file is not None
    assert str(file) == told["bias"]
    assert (told["num_layers"], told["samples"], told["model"]) == (
        before.stack.num_layers,
        6,
        "model",
    )
    after = HomerModel.from_pretrained(model)
    assert after.bias is not None
    assert list(after.bias.shape) == told["shape"] == [before.stack.num_layers, told["chunk_len"]]
    assert torch.equal(after.bias, load_bias(file))


def test_the_same_text_gives_the_same_bias(model: Path, text: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        run("--model", model, "--text", text, "--samples", 3, "--chunk-len", 64, "--out", file)
    first, second = (load_bias(file) for file in files)
    assert first.shape[1] == 64
    assert torch.equal(first, second)


def test_two_processes_killed_on_the_way_come_to_what_one_does(
    model: Path, text: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "bias.safetensors"
    state = tmp_path / "bias.safetensors.part"
    lines = tmp_path / "lines.jsonl"
    records = text.read_text(encoding="utf-8").split(". ")
    lines.write_text("".join(json.dumps({"body": r}) + "\n" for r in records), encoding="utf-8")
    sources = ["--text", text, "--text", lines] * 2
    wanted = ["--model", model, *sources, "--field", "body", "--samples", 200, "--chunk-len", 80]
    run(*wanted, "--out", whole)
    command = [*HOMER, "calibrate", *map(str, wanted), "--out", str(out), "--workers", "2"]
    with subprocess.Popen(command) as killed:
        poll(state.exists, "first chunk", seconds=120)
        helpers = [child.pid for child in psutil.Process(killed.pid).children(recursive=True)]
        killed.kill()
    assert helpers
    assert not out.exists()
    poll(lambda: not any(map(psutil.pid_exists, helpers)), "end of its processes", seconds=60)
    result = CliRunner().invoke(app, command[len(HOMER) :])
    assert result.exit_code == 0, result.output
    assert "going on after" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not state.exists()


def test_another_model_refuses_the_bias(model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "bias.safetensors"
    run("--model", model, "--text", text, "--samples", 2, "--out", file)
    with pytest.raises(BiasError, match="measured on model"):
        HomerModel.from_pretrained(model_dir("A"), bias=file)


def test_too_little_text_is_a_mistake_that_says_what_to_change(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The mill was quiet.", encoding="utf-8")
    with pytest.raises(PromptError, match="give more text or a shorter chunk length"):
        run("--model", model, "--text", short)
    with pytest.raises(PromptError, match="no such file"):
        run("--model", model, "--text", tmp_path / "nothing.txt")
