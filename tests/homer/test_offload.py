"""Leaves in batches, and weights that lie outside of the device that computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from homer import HomerConfig, HomerModel, MergePlan
from homer.bench.offload import count_moved
from homer.context import CompressedContext
from homer.devices import offloaded_parts, weights_held
from homer.encode import NodeReport, TreeEncoder
from homer.errors import ConfigError
from homer.footprint import Footprint
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.order import node_batches
from homer.plan import NodeId
from homer.stack import LayerStack
from tests.homer.families.zoo import load_plain, model_dir
from tests.homer.tiny import random_ids, tiny_llama

CONFIG = HomerConfig(max_chunk_len=48, target_len=40, warmup_layers=2)
PAPER = HomerConfig.paper(max_chunk_len=48, target_len=40, warmup_layers=2)
PARTS = random_ids(5, 1), random_ids(300, 2), random_ids(7, 3)


def plan_for(config: HomerConfig, num_layers: int = 8) -> MergePlan:
    return MergePlan.build(5, 300, 7, num_layers, config)


def on_disk(name: str, folder: Path) -> Any:
    """A model of the families' tests, all but its embeddings on disk; also a head tied to them."""
    plain = load_plain(name)
    outside = ["layers", "norm", "final_layer_norm", "lm_head"]
    device_map = {
        f"{prefix}{child}": "disk" if child in outside else "cpu"
        for prefix, parent in (("", plain), (f"{plain.base_model_prefix}.", plain.base_model))
        for child, _ in parent.named_children()
        if f"{prefix}{child}" != plain.base_model_prefix
    }
    return load_model(model_dir(name), device_map=device_map, offload_folder=str(folder))


def compress(model: Any, leaf_batch_size: int, config: HomerConfig = CONFIG) -> CompressedContext:
    return HomerModel(model, config, leaf_batch_size=leaf_batch_size).compress(*PARTS)


def assert_same(one: CompressedContext, other: CompressedContext) -> None:
    """To the last bit."""
    assert torch.equal(one.context_indices, other.context_indices)
    assert torch.equal(one.position_ids, other.position_ids)
    assert torch.equal(one.logits, other.logits)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_every_node_runs_once_and_behind_its_children(config: HomerConfig, size: int) -> None:
    plan = plan_for(config)
    for top in plan.nodes:
        batches = list(node_batches(plan, top.id, size))
        order = [node.id for batch in batches for node in batch]
        assert sorted(order) == sorted(node.id for node in plan.subtree(top.id))
        assert order[-1] == top.id
        for batch in batches:
            before = order[: order.index(batch[0].id)]
            assert len({(node.layer_start, node.layer_end) for node in batch}) == 1
            assert all(child in before for node in batch for child in node.children)
            assert len(batch) <= size
        if size == 1:
            assert order == [node.id for node in plan.subtree(top.id)]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt-neox", "deepseek-v3"])
@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["default", "paper"])
def test_batches_change_no_bit(name: str, config: HomerConfig) -> None:
    model = load_plain(name)
    alone = compress(model, 1, config)
    for size in (3, 100):
        assert_same(compress(model, size, config), alone)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt-neox", "mixtral", "llama-dynamic"])
@pytest.mark.parametrize("size", [1, 0])
def test_a_model_on_disk_answers_like_one_in_memory(name: str, size: int, tmp_path: Path) -> None:
    resident, outside = load_plain(name), on_disk(name, tmp_path)
    expected, got = compress(resident, 1), compress(outside, size)
    assert_same(got, expected)
    homer, other = HomerModel(resident, CONFIG), HomerModel(outside, CONFIG)
    assert other.stack.offloads
    assert other.stack.device == torch.device("cpu")
    assert torch.equal(homer.generate(expected, 6), other.generate(got, 6))
    # Nothing stays inside.
    layers = other.stack.layers
    assert {p.device.type for layer in layers for p in layer.parameters()} == {"meta"}


def test_weights_of_leaves_are_read_once_for_each_batch(tmp_path: Path) -> None:
    model = on_disk("llama3", tmp_path)
    stack, plan = LayerStack(model), plan_for(CONFIG)
    leaves, top = plan.leaves, plan.leaves[0].layer_end
    reads, _ = count_moved(model)

    def reads_by_layer(size: int) -> dict[int, set[int]]:
        encoder = TreeEncoder(stack, plan, PARTS[0], PARTS[2])
        # It is the same for all leaves, and read before.
        encoder.prefix_kv()
        reads.clear()
        encoder.run_subtree(plan.root.id, PARTS[1], leaf_batch_size=size)
        found: dict[int, set[int]] = {}
        for name, times in reads.items():
            found.setdefault(int(name.split(".")[2]), set()).add(times)
        return found

    alone, together, all_at_once = reads_by_layer(1), reads_by_layer(4), reads_by_layer(100)
    merge_layers = range(top, stack.num_layers)
    for layer in range(top):
        assert alone[layer] == {len(leaves)}
        assert together[layer] == {-(-len(leaves) // 4)}
        assert all_at_once[layer] == {1}
    for layer in merge_layers:
        at_layer = [n for n in plan.merges if n.layer_start <= layer < n.layer_end]
        assert alone[layer] == {len(at_layer)}
        # All merges of a level together.
        assert all_at_once[layer] == {1}


def test_what_fails_inside_leaves_no_weights_behind(tmp_path: Path) -> None:
    model = on_disk("llama3", tmp_path)
    parts = offloaded_parts(model.model.layers[0])
    hooks = [part._hf_hook for part in parts]

    def fail() -> None:
        with weights_held(parts):
            assert all(p.device.type == "cpu" for p in model.model.layers[0].parameters())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert all(p.device.type == "meta" for p in model.model.layers[0].parameters())
    assert [part._hf_hook for part in parts] == hooks


def test_progress_comes_node_by_node() -> None:
    homer = HomerModel.from_pretrained(model_dir("llama3"), CONFIG, device="cpu", leaf_batch_size=4)
    plan, reports = plan_for(CONFIG), list[NodeReport]()
    homer.compress(*PARTS, on_node=reports.append)
    assert sorted(r.node for r in reports) == sorted(node.id for node in plan.nodes)
    assert reports[-1].node == plan.root.id
    order = [report.node for report in reports]
    assert order[:4] == [leaf.id for leaf in plan.leaves[:4]]
    # Depth-first still: the merge above the first leaves does not wait for the last ones.
    assert order.index(NodeId(1, 0)) < order.index(plan.leaves[-1].id)


def test_batches_are_as_large_as_memory_allows_where_weights_are_outside(tmp_path: Path) -> None:
    plan = plan_for(CONFIG)
    root, leaves = plan.root.id, len(plan.leaves)
    inside = TreeEncoder(LayerStack(load_plain("llama3")), plan, PARTS[0], PARTS[2])
    assert inside.choose_batch_size(root, 1 << 40) == 1
    outside = TreeEncoder(LayerStack(on_disk("llama3", tmp_path)), plan, PARTS[0], PARTS[2])
    assert outside.choose_batch_size(root, 1 << 40) == leaves
    assert outside.choose_batch_size(root, 0) == 1
    footprint = outside.stack.footprint
    three = footprint.subtree(plan, root, 3)
    assert outside.choose_batch_size(root, three) == 3
    assert outside.choose_batch_size(root, three - 1) == 2


def test_a_batch_takes_more_memory_than_a_leaf() -> None:
    plan = plan_for(CONFIG)
    footprint = Footprint(kv_row_bytes=512, hidden_row_bytes=256, running_row_bytes=4096)
    sizes = [footprint.subtree(plan, plan.root.id, size) for size in (1, 2, 4, 8)]
    assert sizes == sorted(set(sizes))
    chunk = 48 * (8 + 4) * 512
    # Another leaf of a batch takes its rows, not what only the layer at hand needs.
    assert sizes[1] - sizes[0] < chunk


def test_a_negative_batch_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaf_batch_size"):
        HomerModel(tiny_llama(4), CONFIG, leaf_batch_size=-1)


@pytest.mark.parametrize("name", ["llama3", "gpt-neox"])
def test_an_automatic_map_fills_memory_and_then_the_disk(name: str) -> None:
    resident = load_model(model_dir(name), dtype="bfloat16")
    half = sum(p.nbytes for p in resident.parameters()) // 2
    outside = load_model(
        model_dir(name), dtype="bfloat16", device="cpu", device_map="auto", max_memory={"cpu": half}
    )
    places = outside.hf_device_map.values()
    assert set(places) == {"cpu", "disk"}
    inside = sum(p.nbytes for p in outside.parameters() if p.device.type == "cpu")
    assert 0 < inside <= half
    assert_same(compress(outside, 0), compress(resident, 1))


def test_an_automatic_map_of_the_lowest_layers() -> None:
    lower = load_model(
        model_dir("llama3"), device_map="auto", max_memory={"cpu": 100_000}, lower_layers=4
    )
    stack, whole = LayerStack(lower), LayerStack(load_plain("llama3"))
    assert (stack.loaded_layers, stack.offloads) == (4, True)
    plan = plan_for(CONFIG)
    (leaf, *_) = plan.leaves
    states = [
        TreeEncoder(one, plan, PARTS[0], PARTS[2]).run_subtree(
            leaf.id, PARTS[1][: leaf.context_end]
        )
        for one in (stack, whole)
    ]
    assert torch.equal(states[0].hidden, states[1].hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "use one of auto, balanced"),
        ({"device_map": '{"lm_head": '}, "which is no JSON"),
        ({"device_map": '{"lm_head": [1]}'}, "an object of numbers and texts"),
        ({"device_map": "auto", "max_memory": "60GiB"}, "max_memory is '60GiB', which is no JSON"),
        ({"max_memory": '{"cpu": "1GiB"}'}, "there is no device_map; use auto"),
        ({"offload_folder": "/tmp"}, "there is no device_map; use auto"),
        ({"device_map": "auto", "device": "cuda:1"}, "leave device at auto"),
        ({"device_map": "auto", "adapter": "lora"}, "merge it into a checkpoint"),
        ({"device_map": '{"": "disk"}', "max_memory": '{"cpu": 1}'}, "not with a map of modules"),
        ({"device_map": '{"": "disk"}', "lower_layers": 2}, "use device_map auto"),
    ],
)
def test_device_maps_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "max_memory": {9: "1GiB"}}, r"max_memory names 9, but .* GPUs"),
        ({"device_map": {"": "cuda:9"}}, r"device_map names cuda:9, but"),
        ({"device_map": {"": 0}, "device": "cpu"}, r"names 0, but this process has 0 GPUs"),
        ({"device_map": {"model": "cpu", "lm_haed": "cpu"}}, "names lm_haed, which LlamaForCausal"),
    ],
)
def test_devices_and_modules_that_are_not_there_are_named(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(model_dir("llama3"), **options)
