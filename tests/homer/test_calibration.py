"""The calibration bias: what is measured, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from homer import HomerConfig, HomerModel
from homer.bias import BiasInfo, load_bias, save_bias, warn_uncalibrated
from homer.bias_plot import plot_bias
from homer.calibration import cut_chunks, measure_bias
from homer.calibration_run import CalibrationRun, run_calibration
from homer.errors import BiasError, ConfigError, ModelError, PromptError
from homer.load_options import LoadOptions
from homer.shape import UNCALIBRATED
from homer.stack import LayerStack


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def scores_by_hand(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(layers, tokens): written out from the plain model's hidden states."""
    with torch.no_grad():
        hidden = model.model(ids[None], output_hidden_states=True).hidden_states
        positions = torch.arange(len(ids))[None]
        cos, sin = model.model.rotary_emb(hidden[0], positions)
        rows = []
        for layer, states in zip(model.model.layers, hidden, strict=False):
            normed = layer.input_layernorm(states)
            query = layer.self_attn.q_proj(normed).view(1, len(ids), 4, 8).transpose(1, 2)
            key = layer.self_attn.k_proj(normed).view(1, len(ids), 2, 8).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            key = key.repeat_interleave(2, dim=1)
            logits = (query[0, :, -1:] * key[0]).sum(-1) / 8**0.5
            rows.append(logits.amax(0))
    return torch.stack(rows)


def test_the_bias_is_the_mean_score_at_each_distance(model: LlamaForCausalLM) -> None:
    chunks = [torch.randint(0, 90, (40,)) for _ in range(5)]
    prefix = torch.tensor([1, 2, 3])
    by_hand = torch.stack([scores_by_hand(model, torch.cat((prefix, chunk))) for chunk in chunks])
    bias = measure_bias(LayerStack(model), chunks, prefix)
    assert bias.shape == (3, 40)
    torch.testing.assert_close(bias, by_hand.mean(0)[:, 3:].flip(1), atol=1e-5, rtol=1e-5)


def test_chunks_are_spread_over_the_text_and_do_not_repeat_it() -> None:
    text = torch.arange(1000)
    chunks = cut_chunks(text, 100, 7)
    assert [len(chunk) for chunk in chunks] == [100] * 7
    assert (int(chunks[0][0]), int(chunks[-1][-1])) == (0, 999)
    assert len(cut_chunks(text[:250], 100, 50)) == 4
    assert len(cut_chunks(text[:100], 100, 50)) == 1
    with pytest.raises(PromptError, match="99 tokens, but one calibration chunk takes 100"):
        cut_chunks(text[:99], 100, 50)


def test_chunks_of_several_lengths_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(PromptError, match=r"not of \[4, 5\]"):
        measure_bias(LayerStack(model), [torch.arange(4), torch.arange(5)])


@pytest.fixture
def run(model: LlamaForCausalLM, tmp_path: Path) -> CalibrationRun:
    model.save_pretrained(tmp_path / "model")
    return CalibrationRun(
        model=str(tmp_path / "model"),
        chunks=[torch.randint(0, 90, (40,)).tolist() for _ in range(7)],
        prefix_ids=[1, 2],
        state_file=tmp_path / "state",
        load=LoadOptions(device="cpu"),
    )


class StoppedError(Exception):
    pass


def stop_at(number: int) -> Callable[[int], None]:
    def on_chunk(done: int) -> None:
        if done == number:
            raise StoppedError

    return on_chunk


def test_a_stopped_run_goes_on_and_gives_the_bias_of_one_that_was_not(
    run: CalibrationRun, model: LlamaForCausalLM
) -> None:
    chunks = [torch.tensor(chunk) for chunk in run.chunks]
    whole = measure_bias(LayerStack(model), chunks, torch.tensor(run.prefix_ids))
    seen: list[int] = []
    assert torch.equal(run_calibration(run, seen.append), whole)
    assert seen == list(range(8))
    run.state_file.unlink()
    with pytest.raises(StoppedError):
        run_calibration(run, stop_at(3))
    seen.clear()
    assert torch.equal(run_calibration(run, seen.append), whole)
    assert seen == [3, 4, 5, 6, 7]


def test_what_another_run_left_is_refused(run: CalibrationRun) -> None:
    with pytest.raises(StoppedError):
        run_calibration(run, stop_at(2))
    config = Path(run.model, "config.json")
    others = [
        dataclasses.replace(run, chunks=[*run.chunks[1:], run.chunks[0]]),
        dataclasses.replace(run, prefix_ids=[]),
        dataclasses.replace(run, load=LoadOptions(device="cpu", dtype="bfloat16")),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="start over with --fresh"):
            run_calibration(other, lambda done: None)
    before = config.read_text(encoding="utf-8")
    config.write_text(before.replace("10000.0", "20000.0"), encoding="utf-8")
    with pytest.raises(ConfigError, match="other text, model, settings"):
        run_calibration(run, lambda done: None)
    config.write_text(before, encoding="utf-8")
    run.state_file.write_bytes(run.state_file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="start over with --fresh"):
        run_calibration(run, lambda done: None)


def test_a_model_that_cannot_be_loaded_fails_in_a_process_as_here(run: CalibrationRun) -> None:
    Path(run.model, "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="is no safetensors file"):
        run_calibration(dataclasses.replace(run, workers=2), lambda done: None)


def test_a_bias_that_is_none_is_said_to_be_so(tmp_path: Path) -> None:
    file = tmp_path / "bias.safetensors"
    bias = {"bias": torch.zeros(2, 8)}
    for tensors, metadata in (
        ({"other": torch.zeros(2, 8)}, None),
        ({"bias": torch.zeros(8)}, None),
        (bias, {"homer": "{"}),
        (bias, {"homer": '{"layers": 2}'}),
    ):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(BiasError, match="make it with `homer calibrate`"):
            load_bias(file)


def test_a_bias_is_drawn_layer_by_layer(tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_bias(tmp_path / "bias.svg", torch.rand(3, 64), "Calibration bias of tiny")
    drawn = (tmp_path / "bias.svg").read_text(encoding="utf-8")
    for text in ("Calibration bias of tiny", "distance to the last token", "layer"):
        assert text in drawn
    with pytest.raises(ConfigError, match="cannot draw"):
        plot_bias(tmp_path / "bias.docx", torch.rand(3, 64), "")


def test_running_uncalibrated_warns_once(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=1)
    warn_uncalibrated.cache_clear()
    HomerModel(model, config, torch.zeros(3, 64))
    HomerModel(model, config.replace(score="softmax_mean"))
    assert not caplog.records
    HomerModel(model, config)
    HomerModel(model, config)
    assert [record.message for record in caplog.records] == [UNCALIBRATED]


def test_a_written_bias_is_read_back_and_fits_its_model_only(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = tmp_path / "bias.safetensors"
    bias = measure_bias(LayerStack(model), [torch.randint(0, 90, (64,))])
    save_bias(file, bias, BiasInfo("tiny", 3, 32, 64, 1))
    assert torch.equal(load_bias(file, num_layers=3, hidden_size=32), bias)
    with pytest.raises(BiasError, match=r"measured on tiny \(3 layers\); this model has 8 layers"):
        load_bias(file, num_layers=8)
    with pytest.raises(BiasError, match=r"hidden size 32.*this model's hidden size is 64"):
        load_bias(file, num_layers=3, hidden_size=64)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other tensors"])
def test_an_unreadable_bias_file_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "bias.safetensors"
    if damage != "missing":
        save_file({"bias" if damage == "truncated" else "weight": torch.zeros(3, 64)}, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BiasError, match=r"not a readable bias file.*homer calibrate"):
        load_bias(file)


def test_a_bias_too_short_for_the_plan_is_refused(model: LlamaForCausalLM) -> None:
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=1)
    homer = HomerModel(model, config, torch.zeros(3, 20))
    ids = torch.randint(0, 90, (200,))
    with pytest.raises(BiasError, match="reaches distance 19, but chunks of this plan reach"):
        homer.compress(ids[:2], ids, ids[:3])
    with pytest.raises(BiasError, match=r"shape \(2, 64\).*3 layers"):
        HomerModel(model, config, torch.zeros(2, 64))
