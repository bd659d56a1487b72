"""`homer calibrate` on the demo model: a file beside the model that Homer then finds by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
from homer.errors import BiasError, ConfigError, HomerError, ModelError, PromptError
from tests.cluster.conftest import poll
from tests.golden_cases import model_dir
from tests.homer.test_documents import write_pdf
from tests.hub_cache import MODEL_ID, fill_hub_cache, use_hub_cache

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


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_the_bias_lands_beside_the_model_and_is_used(model: Path, text: Path) -> None:
    before = HomerModel.from_pretrained(model)
    assert before.bias is None
    told = run("--model", model, "--text", text, "--samples", 6)
    file = find_bias(model)
    assert file is not None
    # A service that runs as another user has to read it.
    assert file.stat().st_mode & 0o777 == 0o644
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


def test_the_same_text_gives_the_same_bias_also_out_of_a_pdf(
    model: Path, text: Path, tmp_path: Path
) -> None:
    pdf = tmp_path / "text.pdf"
    write_pdf(pdf, text.read_text(encoding="utf-8"))
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for source, file in zip((text, pdf), files, strict=True):
        run("--model", model, "--text", source, "--samples", 3, "--chunk-len", 64, "--out", file)
    first, second = (load_bias(file) for file in files)
    assert first.shape[1] == 64
    assert torch.equal(first, second)


def test_the_bias_of_a_model_id_lies_with_its_files_in_the_hubs_cache(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = use_hub_cache(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="cannot be fetched"):
        run("--model", MODEL_ID, "--text", text)
    snapshots = {name: fill_hub_cache(cache, model, revision=name) for name in ("main", "v2")}
    run("--model", MODEL_ID, "--revision", "v2", "--text", text, "--samples", 2)
    assert find_bias(MODEL_ID, "v2") == snapshots["v2"] / "bias.safetensors"
    assert find_bias(MODEL_ID) is None
    assert HomerModel.from_pretrained(MODEL_ID, revision="v2").bias is not None
    assert HomerModel.from_pretrained(MODEL_ID).bias is None


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homer.calibration_run.run_calibration", lambda *_: pytest.fail("measured"))
    wanted = ["--model", model, "--text", text, "--samples", 2]
    for out, problem in ((tmp_path / "none" / "b", "make it"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=problem):
            run(*wanted, "--out", out)
    for plot, problem in (
        ("bias.docx", r"end its name in one of .*png"),
        ("none/b.png", "make it"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run(*wanted, "--plot", tmp_path / plot)


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
