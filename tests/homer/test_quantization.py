"""Quantized weights: quantized while they are loaded, and before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from homer.errors import ConfigError, ModelError
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.quantization import QUANTIZATIONS, quantization_for
from homer.shape import load_config
from tests.homer.families.zoo import model_dir
from tests.homer.test_loading import answers, say


def assert_about_the_plain_answers(model: Any) -> None:
    plain = answers(load_model(model_dir("llama2"), device="cpu", dtype="float32"))
    quantized = answers(model)
    assert len(set(plain[0]) & set(quantized[0])) / len(plain[0]) > 0.6
    assert not torch.equal(plain[1], quantized[1])
    assert torch.cosine_similarity(plain[1], quantized[1], dim=0) > 0.85


@pytest.mark.parametrize("name", ["bitsandbytes-8bit", "torchao-int8"])
def test_a_quantized_model_answers_about_as_the_plain_one(name: str) -> None:
    pytest.importorskip(name.split("-")[0])
    load = LoadOptions(device="cpu", dtype="float32", quantization=name)
    assert_about_the_plain_answers(load_model(model_dir("llama2"), load))


@pytest.mark.parametrize("name", ["bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_a_checkpoint_that_is_quantized_says_so_itself(name: str, tmp_path: Path) -> None:
    load = LoadOptions(device="cpu", dtype="float32")
    quantized = load_model(model_dir("llama2"), load, quantization=name)
    quantized.save_pretrained(tmp_path)
    again, lower = load_model(tmp_path, load), load_model(tmp_path, load, lower_layers=3)
    kinds = {type(model.base_model.layers[0].mlp.up_proj) for model in (quantized, again, lower)}
    assert [kind.__name__ for kind in kinds] in (["Linear8bitLt"], ["Linear4bit"])
    assert answers(again)[0] == answers(quantized)[0]
    with pytest.raises(ConfigError, match="is quantized already"):
        load_model(tmp_path, load, quantization="fp8")


def test_weights_in_fp8_are_widened_where_there_is_no_gpu(tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(model_dir("llama2"), folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    say(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)
    assert_about_the_plain_answers(load_model(folder, device="cpu", dtype="float32"))


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_every_name_of_a_quantization_becomes_what_transformers_takes(name: str) -> None:
    method = name.split("-")[0]
    if method == "torchao":
        pytest.importorskip("torchao")
    config = quantization_for(load_config(model_dir("llama2")), name)
    assert config.quant_method == method
    if method == "bitsandbytes":
        assert (config.load_in_8bit, config.load_in_4bit) == ("8bit" in name, "4bit" in name)
    if method == "torchao":
        assert type(config.quant_type).__name__ == QUANTIZATIONS[name]["quant_type"]
    assert isinstance(config, QuantizationConfigMixin)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq"])
def test_what_a_quantized_checkpoint_needs_is_named(method: str, tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama3"), tmp_path / "model")
    say(quantization_config={"quant_method": method, "bits": 4})(tmp_path / "model")
    with pytest.raises(ModelError, match=rf"quantized by {method} need the .* pip install"):
        load_model(tmp_path / "model", device="cpu")


def test_quantization_that_cannot_be_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use one of bitsandbytes-8bit"):
        load_model(model_dir("llama3"), quantization="tiny")
    monkeypatch.setattr("homer.quantization.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(
            model_dir("llama3"),
            quantization='{"quant_method": "bitsandbytes", "load_in_4bit": true}',
        )
