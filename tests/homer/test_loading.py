"""Loading: in part, with adapters; and checkpoints that are not what they should be."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import shutil
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from transformers.utils.logging import enable_progress_bar

from homer import HomerConfig, HomerModel
from homer.attention import NodePass
from homer.checkpoint import FileWatch
from homer.doctor import examine_model
from homer.encode import TreeEncoder
from homer.errors import CheckpointError, ConfigError, ModelError
from homer.load_options import LoadOptions, read_token
from homer.loading import load_model
from homer.stack import LayerStack
from tests.homer.families.zoo import model_dir, prompt, save_adapter
from tests.hub_cache import MODEL_ID, fill_hub_cache, use_hub_cache

CONFIG = HomerConfig(max_chunk_len=48, target_len=32, warmup_layers=2)
PARTS = prompt(3, 300, 5)


def answers(model: Any) -> tuple[list[int], torch.Tensor]:
    """The surviving context indices, and the logits behind the question."""
    context = HomerModel(model, CONFIG).compress(*PARTS)
    return context.context_indices.tolist(), context.logits


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files, which a test may damage."""
    folder = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama3"))
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt-neox", "mixtral", "deepseek-v3"])
def test_the_lowest_layers_alone_give_the_same_leaves(name: str) -> None:
    whole = LayerStack(load_model(model_dir(name), dtype="float32"))
    lower = LayerStack(load_model(model_dir(name), dtype="float32", lower_layers=3))
    assert (lower.num_layers, lower.loaded_layers) == (whole.num_layers, 3)
    assert lower.windows == whole.windows
    plan = HomerModel(whole.model, CONFIG).plan(3, 300, 5)
    (leaf, *_) = plan.leaves
    states = [
        TreeEncoder(stack, plan, PARTS[0], PARTS[2]).run_subtree(
            leaf.id, PARTS[1][: leaf.context_end]
        )
        for stack in (whole, lower)
    ]
    assert leaf.layer_end <= 3
    assert torch.equal(states[0].hidden, states[1].hidden)
    assert torch.equal(states[0].context_indices, states[1].context_indices)
    for one, other in zip(states[0].shards, states[1].shards, strict=True):
        assert all(map(torch.equal, one.keys, other.keys))
    held = sum(p.numel() for p in lower.model.parameters())
    assert held < 0.7 * sum(p.numel() for p in whole.model.parameters())
    with pytest.raises(ModelError, match="only 3 of 8 layers are loaded"):
        lower.logits(states[1].hidden)


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that also sees: its decoder is one part of several."""
    folder = tmp_path_factory.mktemp("composite")
    text = AutoConfig.from_pretrained(model_dir("gemma3")).to_dict()
    eye = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    tokens: Any = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
    config = Gemma3Config(text_config=text, vision_config=eye, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    decoder = AutoModelForCausalLM.from_pretrained(model_dir("gemma3"))
    model.get_decoder().load_state_dict(decoder.get_decoder().state_dict())
    model.save_pretrained(folder)
    return folder


def test_a_model_that_also_sees_answers_as_its_decoder_alone(composite: Path) -> None:
    assert examine_model(composite).supported
    alone = answers(load_model(model_dir("gemma3"), dtype="float32"))
    together = answers(load_model(composite, dtype="float32"))
    assert together[0] == alone[0]
    assert torch.equal(together[1], alone[1])


def test_of_a_model_that_also_sees_leaves_load_the_lowest_layers_alone(composite: Path) -> None:
    lower = load_model(composite, dtype="float32", lower_layers=3)
    alone = load_model(model_dir("gemma3"), dtype="float32", lower_layers=3)
    pairs = zip(lower.named_parameters(), alone.named_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    stack = LayerStack(lower)
    assert (stack.num_layers, stack.loaded_layers) == (8, 3)


def test_more_layers_than_there_are_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="the model has 8; use less"):
        load_model(model_dir("llama3"), lower_layers=8)


def test_progress_is_told_by_shards(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="homer"):
        load_model(sharded)
    shards = len(list(sharded.glob("*.safetensors")))
    told = [r.getMessage() for r in caplog.records if "loading: shard" in r.getMessage()]
    assert told[-1] == f"loading: shard {shards} of {shards}"
    assert "MiB of weights" in caplog.records[-1].getMessage()


def test_on_a_terminal_a_bar_shows_the_shards(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable_progress_bar()
    screen, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with open(terminal, "w") as stderr:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", stderr)
        load_model(sharded)
        monkeypatch.undo()
    # Until there is nothing more; the other end is closed.
    shown = b""
    with suppress(OSError):
        while part := os.read(screen, 1 << 16):
            shown += part
    os.close(screen)
    shards = len(list(sharded.glob("*.safetensors")))
    assert f"shard {shards} of {shards}" in shown.decode()
    assert "Loading weights: 100%" in shown.decode()


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the .* {gone.name}"):
        load_model(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated.* download it again"):
        load_model(sharded)


def test_what_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pointer"
    shutil.copytree(model_dir("llama3"), folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"is no safetensors file .*git LFS"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
        load_model(folder)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model_dir("llama3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="other sizes than its config"):
        load_model(folder)
    # transformers would fill in random numbers.
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of LlamaForCausalLM"):
        load_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.4.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*layers\.4\.mlp\.up_proj"):
        load_model(folder)


def say(**settings: Any) -> Callable[[Path], object]:
    """Write into a model's config."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def in_the_older_format(damage: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        weights = folder / "pytorch_model.bin"
        torch.save(load_file(folder / "model.safetensors"), weights)
        (folder / "model.safetensors").unlink()
        weights.write_bytes(damage(weights.read_bytes()))

    return change


def with_an_index_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{")


ROPE = {"rope_theta": 10000.0}
GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (in_the_older_format(lambda whole: whole[:-100]), "damaged or not complete"),
        (in_the_older_format(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "git LFS"),
        (in_the_older_format(lambda _: b""), "holds no weights"),
        (with_an_index_that_is_none, "cannot be used: Expecting property name"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "x.gguf"), "not complete"),
        (say(num_hidden_layers="ten"), "expected int, got str"),
        (say(num_hidden_layers=0), "says 0 layers"),
        (say(hidden_act="squash"), "names 'squash', which transformers .* does not know"),
        (say(rope_parameters={"rope_type": "spiral", **ROPE}), "names 'spiral'"),
        (say(rope_parameters={"rope_type": "yarn", **ROPE}), "Missing required keys"),
        (say(model_type="unheard"), "does not recognize this architecture"),
        (write("config.json", b'{"model_type": "lla'), r"config\.json is not valid JSON"),
        (write("config.json", b"[]"), r"config\.json holds list"),
        (write(GENERATION, b'{"eos_token_id": [1,'), r"generation_config\.json is not valid JSON"),
        (write(GENERATION, b'{"eos_token_id": ["</s>"]}'), "write a token id, or a list of"),
    ],
)
def test_whatever_is_wrong_with_the_files_waits_for_others(
    change: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    """Workers wait where it is a `CheckpointError`; any other they end with, to be restarted."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir("llama3"), folder)
    change(folder)
    with pytest.raises(CheckpointError, match=problem):
        load_model(folder, device="cpu")


def test_weights_in_the_older_format_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir("llama3"), folder)
    in_the_older_format(lambda whole: whole)(folder)
    plain = load_model(model_dir("llama3")).state_dict()
    assert all(map(torch.equal, load_model(folder).state_dict().values(), plain.values()))


def test_the_doctor_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir("llama3"), folder)
    assert examine_model(folder).supported
    for file in ("bias.safetensors", "generation_config.json", "config.json"):
        whole = (folder / file).read_bytes() if (folder / file).exists() else None
        (folder / file).write_bytes(b"{")
        report = examine_model(folder)
        assert not report.supported
        assert file in str(report.reason)
        (folder / file).unlink() if whole is None else (folder / file).write_bytes(whole)


def test_a_device_that_is_not_there_is_a_mistake() -> None:
    number = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"torch finds {number} GPUs here"):
        load_model(model_dir("llama3"), device=f"cuda:{number}")
    with pytest.raises(ConfigError, match="use auto, cpu or cuda:N"):
        load_model(model_dir("llama3"), device="gpu")


def test_other_files_are_noticed_wherever_a_model_adapter_or_bias_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homer.checkpoint.POLL_SECONDS", 0.01)
    snapshot = fill_hub_cache(use_hub_cache(tmp_path, monkeypatch), model_dir("llama3"))
    adapter, bias = tmp_path / "adapter", tmp_path / "bias.safetensors"
    adapter.mkdir()

    async def notices(change: Callable[[], object]) -> bool:
        watch = FileWatch(MODEL_ID, adapter, bias)
        changed = asyncio.create_task(watch.changed())
        before, _ = await asyncio.wait({changed}, timeout=0.1)
        change()
        await asyncio.wait_for(changed, 30)
        return not before

    for change in (
        lambda: (snapshot / "model.safetensors").write_bytes(b"mended"),
        lambda: (adapter / "adapter_config.json").write_text("{}"),
        lambda: bias.write_bytes(b"new"),
        bias.unlink,
    ):
        assert asyncio.run(notices(change))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes the model's answers."""
    return save_adapter("llama3", tmp_path_factory.mktemp("adapter"))


def test_an_active_adapter_answers_as_one_that_is_merged(adapter: Path) -> None:
    load = LoadOptions(device="cpu", adapter=str(adapter))
    active = answers(load_model(model_dir("llama3"), load))
    merged = answers(load_model(model_dir("llama3"), load, merge_adapter=True))
    plain = answers(load_model(model_dir("llama3")))
    assert active[0] == merged[0]
    torch.testing.assert_close(active[1], merged[1], atol=1e-4, rtol=1e-4)
    assert (active[1] - plain[1]).abs().max() > 0.1


def test_an_adapter_reaches_the_lowest_layers_alone(adapter: Path) -> None:
    for merge in (False, True):
        load = LoadOptions(device="cpu", adapter=str(adapter), merge_adapter=merge)
        whole, lower = (
            LayerStack(load_model(model_dir("llama3"), load, lower_layers=layers))
            for layers in (None, 3)
        )
        ids = torch.arange(20)
        hidden = []
        for stack in (whole, lower):
            run = NodePass(span=20)
            hidden.append(stack.run(stack.embed(ids), ids, range(3), run))
        assert torch.equal(*hidden)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be used with Gemma2ForCausalLM"):
        load_model(model_dir("gemma2"), adapter=str(adapter))
    with pytest.raises(CheckpointError, match="cannot be used with"):
        load_model(model_dir("llama3"), adapter=str(tmp_path))


def test_eager_attention_answers_as_sdpa() -> None:
    eager = answers(load_model(model_dir("llama3"), attention="eager"))
    assert eager[0] == answers(load_model(model_dir("llama3"), attention="sdpa"))[0]


def test_the_token_is_told_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("hf_secret\n")
    load = LoadOptions(token=read_token(file), revision="v2")
    assert "hf_secret" not in repr(load)
    assert load.hub == {"token": "hf_secret", "revision": "v2"}
    assert pickle.loads(pickle.dumps(load)) == load
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert read_token(None) == "hf_other"
    with pytest.raises(ConfigError, match="cannot read the token file"):
        read_token(tmp_path / "none")
