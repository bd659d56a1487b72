"""What is told from a config alone, what is refused with the reason, and what is held against its
own forward pass.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cluster.cli import app
from homer import HomerConfig, HomerModel
from homer.doctor import examine_model
from homer.errors import ModelError
from homer.plain_config import plain_config
from homer.shape import ModelShape, load_config
from tests.homer.families.zoo import MODELS, load_plain, model_dir, prompt, save_tiny

SETTINGS = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)


def config_only(name: str, folder: Path) -> Path:
    """A folder with a model's config and no weights."""
    shutil.copy(model_dir(name) / "config.json", folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_config_alone_tells_what_a_model_takes(name: str, tmp_path: Path) -> None:
    report = examine_model(config_only(name, tmp_path))
    assert report.supported, report.reason
    assert report.tested
    assert report.shape is not None
    assert report.memory is not None
    hm = HomerModel(load_plain(name), SETTINGS)
    context = hm.compress(*prompt(1, 8, 2))
    assert report.kv_bytes_per_token * context.cache_len == context.nbytes
    parameters = list(hm.model.parameters())
    assert report.parameters == sum(parameter.numel() for parameter in parameters)
    assert report.memory.weight_bytes == sum(parameter.nbytes for parameter in parameters)
    assert report.shape.num_layers == hm.stack.num_layers
    assert sum(report.local_layers.values()) == sum(w is not None for w in hm.stack.windows)
    assert not report.calibrated
    assert any("homer calibrate" in note for note in report.notes)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "settings", "window", "source"),
    [
        ("llama", {}, 4096, "max_position_embeddings"),
        ("llama", rope("dynamic", factor=4.0), 16384, "4,096 scaled by 4 (dynamic)"),
        ("llama", rope("yarn", factor=4.0), 16384, "4,096 scaled by 4 (yarn)"),
        (
            "llama",
            rope("yarn", factor=4.0, original_max_position_embeddings=1024),
            4096,
            "max_position_embeddings, yarn scaling included",
        ),
        (
            "llama",
            rope("linear", factor=4.0),
            4096,
            "max_position_embeddings, linear scaling included",
        ),
        (
            "llama",
            rope("linear", factor=4.0, original_max_position_embeddings=4096),
            16384,
            "4,096 scaled by 4 (linear)",
        ),
        (
            "llama",
            rope("llama3", factor=8.0, original_max_position_embeddings=1024, **LLAMA3),
            8192,
            "1,024 scaled by 8 (llama3)",
        ),
        (
            "phi3",
            {
                **rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
                "original_max_position_embeddings": 1024,
            },
            4096,
            "max_position_embeddings, longrope scaling included",
        ),
        (
            "mistral",
            {"sliding_window": 1024},
            1024,
            "all layers are local; max_position_embeddings is 4,096",
        ),
        ("gemma2", {"sliding_window": 1024}, 4096, "max_position_embeddings"),
    ],
)
def test_settings_are_derived_from_the_scaled_window(
    model_type: str, settings: dict[str, Any], window: int, source: str, tmp_path: Path
) -> None:
    small = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 16,
        "max_position_embeddings": 4096,
    }
    AutoConfig.for_model(model_type, **{**small, **settings}).save_pretrained(tmp_path)
    shape = ModelShape.load(tmp_path)
    assert (shape.window, shape.window_source) == (window, source)
    config = shape.recommended_config()
    assert (config.max_chunk_len, config.target_len) == (window // 2, window // 2)
    assert config.warmup_layers == 6


def test_configs_that_are_read_without_transformers_say_the_same(tmp_path: Path) -> None:
    read = {}
    for name in MODELS:
        (tmp_path / name).mkdir()
        folder = config_only(name, tmp_path / name)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        read[name] = plain_config(values) is not None
        assert ModelShape.load(folder) == ModelShape.of(load_config(folder)), name
    assert {name for name, plain in read.items() if plain} == {"llama2", "qwen3"}
    others: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
    }
    for family, settings in others.items():
        AutoConfig.for_model(family, **settings).save_pretrained(tmp_path / family)
        values = json.loads((tmp_path / family / "config.json").read_text(encoding="utf-8"))
        assert plain_config(values) is not None, family
        assert ModelShape.load(tmp_path / family) == ModelShape.of(load_config(tmp_path / family))


def test_a_window_scaled_at_loading_counts(tmp_path: Path) -> None:
    folder = save_tiny("llama")
    options = rope("dynamic", factor=4.0)
    assert HomerModel.from_pretrained(folder, device="cpu").config.max_chunk_len == 256
    scaled = HomerModel.from_pretrained(folder, device="cpu", **options)
    assert scaled.config.max_chunk_len == 1024


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt2", {}, "no rotary position embeddings"),
        ("mamba", {}, "no rotary position embeddings"),
        ("t5", {}, "encoder-decoder"),
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attend in both directions"),
        ("gemma4_text", {}, "layers that differ in"),
        ("falcon", {"alibi": False}, "has no layers, norm"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_reason(
    model_type: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    report = examine_model(tmp_path)
    assert not report.supported
    assert report.reason is not None
    assert reason in report.reason


def test_a_family_outside_the_matrix_is_held_against_its_own_forward_pass() -> None:
    folder = save_tiny("starcoder2")
    report = examine_model(folder)
    assert report.supported
    assert not report.tested
    assert any("held against its own forward pass" in note for note in report.notes)
    context = HomerModel.from_pretrained(folder, SETTINGS, device="cpu").compress(
        *prompt(3, 150, 5)
    )
    assert context.cache_len == 48


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("nanochat", {}, "differs from its own forward pass"),
        ("diffllama", {}, "does not go through transformers' attention interface"),
    ],
)
def test_a_family_that_does_more_than_is_known_is_refused_when_it_is_loaded(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    folder = save_tiny(model_type, **settings)
    with pytest.raises(ModelError, match=reason):
        HomerModel.from_pretrained(folder, SETTINGS, device="cpu")


def test_an_answer_ends_at_any_end_of_sequence_token_of_the_generation_config() -> None:
    folder = save_tiny("llama", tie_word_embeddings=True)
    hm = HomerModel.from_pretrained(folder, SETTINGS, device="cpu")
    context = hm.compress(*prompt(3, 150, 5))
    answer = hm.generate(context, max_new_tokens=12, ignore_eos=True).tolist()
    ends = [answer[5], answer[8]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    again = HomerModel.from_pretrained(folder, SETTINGS, device="cpu")
    first = min(answer.index(token) for token in ends)
    assert again.generate(context, max_new_tokens=12).tolist() == answer[:first]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_doctor_command_tells_it_all(as_json: bool, tmp_path: Path) -> None:
    folder = config_only("gemma2", tmp_path)
    done = run_doctor("--model", str(folder), *(["--json"] if as_json else []))
    assert done.exit_code == 0, done.output
    if as_json:
        report = json.loads(done.stdout)["model"]
        assert report["supported"]
        assert report["config"]["max_chunk_len"] == 256
        assert report["setting_sources"]["warmup_layers"] == "3/8 of the layers"
        assert report["kv_bytes_per_token"] == 8 * 2 * 2 * 12 * torch.float32.itemsize
    else:
        for text in ("gemma2", "6 of them local: sliding window of 24", "3 of 8", "calibrated"):
            assert text in done.stdout


def test_the_doctor_command_says_why_not(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    done = run_doctor("--model", str(tmp_path))
    assert done.exit_code == 2
    assert "no rotary position embeddings" in " ".join(done.stdout.split())


def run_doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])
