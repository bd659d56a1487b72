"""Costs of a plan against what a real run does: matrix products counted, tensors weighed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from homer import HomerConfig, HomerModel, MergePlan
from homer.cost import PlanCost, layer_flops
from homer.encode import TreeEncoder
from homer.errors import CheckpointError, ConfigError, ModelError
from homer.plan import NodeId
from homer.report import format_bytes, format_flops, plan_facts, plan_summary, plan_table, plan_tree
from homer.shape import ModelShape, homer_defaults, settings_sources
from homer.state import NodeState
from tests.golden_cases import model_dir
from tests.homer.tiny import random_ids

LENGTHS = (5, 700, 4)
CONFIGS = {
    "refreshed": HomerConfig(max_chunk_len=96, target_len=48, warmup_layers=1),
    "paper": HomerConfig.paper(max_chunk_len=200, target_len=64, warmup_layers=1),
    "one_leaf": HomerConfig(max_chunk_len=1024, target_len=1024, warmup_layers=1),
    "one_leaf_pruned": HomerConfig(max_chunk_len=1024, target_len=100, warmup_layers=1),
    "wide": HomerConfig(max_chunk_len=96, target_len=64, warmup_layers=1, fan_in=4),
}


def make_prompt() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prefix, context, suffix = (random_ids(length, vocab=128) for length in LENGTHS)
    return prefix, context, suffix


def linear_flops(hm: HomerModel) -> int:
    """FLOPs of one run's linear layers, counted by torch; attention is not among them."""
    with FlopCounterMode(display=False) as counter:
        hm.compress(*make_prompt())
    counts = counter.get_flop_counts()["Global"]
    assert all(op in LINEAR_OPS or "attention" in str(op) or "bmm" in str(op) for op in counts)
    return sum(counts.get(op, 0) for op in LINEAR_OPS)


LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["A", "G", "M"])
def test_estimated_flops_are_those_of_a_real_run(name: str, config: HomerConfig) -> None:
    hm = HomerModel.from_pretrained(model_dir(name), config, device="cpu")
    plan = hm.plan(*LENGTHS)
    shape = ModelShape.load(model_dir(name))
    attention = attention_flops(plan, shape)
    assert PlanCost.of(plan, shape).flops == linear_flops(hm) + attention


def attention_flops(plan: MergePlan, shape: ModelShape) -> int:
    """Query-key pairs one by one; each costs two products over `head_dim` in every head."""

    def pairs(tokens: int, past: int) -> int:
        return sum(past + seen for seen in range(1, tokens + 1))

    total = 0
    if plan.height == 0:
        total += pairs(plan.prompt_len, 0) * plan.num_layers
    else:
        total += pairs(plan.prefix_len, 0) * plan.num_layers
        for node in plan.nodes:
            layers = node.layer_end - node.layer_start
            total += pairs(node.context_in + plan.suffix_len, plan.prefix_len) * layers
    if plan.refreshes_suffix:
        total += pairs(plan.suffix_len, plan.prefix_len + plan.root.context_out) * plan.num_layers
    return total * 4 * shape.num_heads * shape.head_dim


@pytest.mark.parametrize("name", ["A", "G", "M"])
def test_kv_bytes_are_what_the_states_weigh(name: str) -> None:
    config = CONFIGS["refreshed"]
    hm = HomerModel.from_pretrained(model_dir(name), config, device="cpu")
    plan = hm.plan(*LENGTHS)
    cost = PlanCost.of(plan, ModelShape.load(model_dir(name)))
    prefix_ids, context_ids, suffix_ids = make_prompt()
    encoder = TreeEncoder(hm.stack, plan, prefix_ids, suffix_ids)
    done: dict[NodeId, NodeState] = {}
    weighed = [0] * (plan.height + 1)
    for node in plan.nodes:
        if node.is_leaf:
            span = context_ids[node.context_start : node.context_end]
            done[node.id] = encoder.run_subtree(node.id, span)
        else:
            done[node.id] = encoder.merge(node.id, [done.pop(child) for child in node.children])
        for shard in done[node.id].shards:
            weighed[node.id.height] += sum(t.nbytes for t in (*shard.keys, *shard.values))
    assert [level.kv_bytes for level in cost.levels] == weighed
    assert cost.cache_bytes == encoder.finish(done[plan.root.id]).nbytes


def test_a_prompt_that_fits_costs_what_full_attention_costs() -> None:
    shape = ModelShape()
    plan = MergePlan.build(1, 1000, 23, shape.num_layers, shape.recommended_config())
    cost = PlanCost.of(plan, shape)
    assert cost.flops == cost.full_flops
    assert cost.cache_bytes == cost.full_cache_bytes == cost.peak_kv_bytes


def test_full_attention_on_llama_2_7b_costs_what_is_known_of_it() -> None:
    """Two FLOPs per parameter and token (embedding left out), half a MiB of KV per token."""
    shape = ModelShape()
    plan = MergePlan.build(1, 65536, 32, shape.num_layers, shape.recommended_config())
    cost = PlanCost.of(plan, shape)
    parameters_in_layers = 6_738_415_616 - 2 * 32000 * 4096 - (2 * 32 + 1) * 4096
    one_token = layer_flops(shape, 1) * shape.num_layers
    assert one_token - 4 * 4096 * shape.num_layers == 2 * parameters_in_layers
    assert cost.full_cache_bytes == plan.prompt_len * 512 * 1024


def test_peak_kv_grows_with_the_logarithm_of_the_length() -> None:
    shape = ModelShape()
    peaks = []
    for context_tokens in (2**14, 2**17, 2**20):
        config = shape.recommended_config(warmup_layers=8)
        plan = MergePlan.build(1, context_tokens, 32, shape.num_layers, config)
        peaks.append(PlanCost.of(plan, shape).peak_kv_bytes)
    assert peaks[0] < peaks[1] < peaks[2] < 3 * peaks[0]


def test_reports_show_every_level_and_every_node() -> None:
    shape = ModelShape.load(model_dir("A"))
    plan = MergePlan.build(*LENGTHS, shape.num_layers, CONFIGS["refreshed"])
    cost = PlanCost.of(plan, shape)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(
            plan_facts(plan, cost, shape, {}), plan_table(plan, cost), plan_tree(plan, shape)
        )
    text = captured.get()
    assert "709 tokens (5 prefix + 700 context + 4 suffix)" in text
    assert text.count("leaf ") == len(plan.leaves)
    assert text.count("->") == len(plan.nodes)
    assert "suffix refresh" in text
    for height in range(1, plan.height):
        assert f"│ merge {height} " in text

    summary = json.loads(json.dumps(plan_summary(plan, cost, ModelShape(), {})))
    assert summary["leaves"] == len(plan.leaves)
    assert summary["kept_tokens"] == 48
    assert [level["nodes"] for level in summary["levels"]] == [
        sum(node.id.height == height for node in plan.nodes) for height in range(plan.height + 1)
    ]


def test_numbers_are_printed_with_their_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536 * 1024)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
    ]
    assert [format_flops(n) for n in (999, 1000, 2.5e12)] == ["999.0", "1.0 k", "2.5 T"]


def test_shape_is_read_from_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir("G") / "config.json").read_bytes())
    shape = ModelShape.load(tmp_path)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads) == (6, 6, 2)
    assert (shape.head_dim, shape.value_bytes) == (16, 4)
    config = homer_defaults(tmp_path)
    assert (config.max_chunk_len, config.target_len, config.warmup_layers) == (2048, 2048, 2)
    (tmp_path / "homer.json").write_text(
        '{"max_chunk_len": 64, "target_len": 60, "warmup_layers": 1}'
    )
    config = homer_defaults(tmp_path, target_len=50, fan_in=None)
    assert (config.max_chunk_len, config.target_len, config.warmup_layers) == (64, 50, 1)


def test_a_homer_json_may_have_some_settings_and_no_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir("G") / "config.json").read_bytes())
    settings = tmp_path / "homer.json"
    settings.write_text('{"max_chunk_len": 100, "plan": "paper"}')
    config = homer_defaults(tmp_path, fan_in=3)
    assert (config.max_chunk_len, config.target_len, config.warmup_layers) == (100, 2048, 2)
    assert (config.plan, config.fan_in) == ("paper", 3)
    sources = settings_sources(tmp_path, warmup_layers=4)
    assert sources == {
        "max_chunk_len": "homer.json",
        "target_len": "half of the window",
        "warmup_layers": "given",
    }
    for wrong, problem in (
        ('{"chunk": 64}', r"unknown settings \['chunk'\]"),
        ('{"target_len": "abc"}', r"homer\.json: target_len is 'abc'; set it to a whole number"),
        ('{"target_len": null}', r"homer\.json: target_len is None"),
        ('{"refresh_suffix": "no"}', r"homer\.json: refresh_suffix is 'no'"),
        ('{"fan_in": 1}', r"homer\.json: fan_in is 1"),
    ):
        settings.write_text(wrong)
        with pytest.raises(ConfigError, match=problem):
            homer_defaults(tmp_path, target_len=64, fan_in=2)


def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelShape.load(tmp_path)
    with pytest.raises(ModelError, match="is no folder, and its config cannot be fetched"):
        ModelShape.load(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"hidden_size": 64')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        ModelShape.load(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_hidden_layers": 2}')
    with pytest.raises(ModelError, match=r"transformers .* cannot read the config"):
        ModelShape.load(tmp_path)
    with pytest.raises(ConfigError, match="num_heads is 0"):
        ModelShape(num_heads=0)
