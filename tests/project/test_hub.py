"""A model id, from a hub to everything that loads or reads a model, and again without the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.text import PromptTokenizer
from homer.demo import MODEL_DIR
from homer.loading import load_model
from tests.project.command_line import Homer
from tests.project.command_line import homer as homer
from tests.small_hub import small_hub
from workers.__main__ import parse_options
from workers.engine import LoadedModel

MODEL, ADAPTER = "mill/tiny", "mill/lora"


def has_adapter(loaded: LoadedModel) -> bool:
    return any("lora_A" in name for name, _ in loaded.stack.model.named_parameters())


def test_revision_token_and_local_files_reach_all_that_loads_a_model(
    homer: Homer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(MODEL_DIR), lora).save_pretrained(tmp_path / "lora")
    token = tmp_path / "token"
    token.write_text("hf_secret")
    source = ["--model", MODEL, "--revision", "v2", "--hub-token-file", str(token)]
    plan = ["plan", *source, "--context-tokens", "4000", "--json"]
    worker = [*source, "--device", "cpu", "--adapter", ADAPTER]
    with small_hub(tmp_path / "cache", "hf_secret", monkeypatch) as hub:
        # Whoever leaves out the revision or the token finds nothing.
        hub.folders = {(MODEL, "v2"): MODEL_DIR, (ADAPTER, "main"): tmp_path / "lora"}
        assert json.loads(homer(*plan).stdout)["num_layers"] == 10
        assert hub.asked == {(MODEL, "v2", "config.json")}
        options = parse_options(worker)
        loaded = LoadedModel.load(options)
        assert PromptTokenizer.load(MODEL, **options.load.hub) is not None
        assert has_adapter(loaded)
        assert hub.asked >= {
            *((MODEL, "v2", name) for name in ("model.safetensors", "generation_config.json")),
            (MODEL, "v2", "tokenizer.json"),
            *(
                (ADAPTER, "main", f"adapter_{name}")
                for name in ("config.json", "model.safetensors")
            ),
        }
        # It is there, and is asked for nothing more.
        before = hub.requests
        alone = "--local-files-only"
        leaf = [*worker, alone, "--role", "leaf", "--leaf-layers", "4"]
        for arguments in ([*worker, alone], leaf):
            options = parse_options(arguments)
            loaded = LoadedModel.load(options)
            assert has_adapter(loaded)
            assert loaded.stack.loaded_layers == (options.leaf_layers or 10)
        assert PromptTokenizer.load(MODEL, **options.load.hub) is not None
        assert json.loads(homer(*plan, alone).stdout)["num_layers"] == 10
        told = json.loads(homer("doctor", *source, alone, "--json").stdout)
        assert told["model"]["supported"]
        other = homer("doctor", "--model", MODEL, "--revision", "v3", alone, "--json")
        assert other.code == 2
        assert "cannot be fetched" in json.loads(other.stdout)["model"]["reason"]
        assert hub.requests == before
