"""`python -m tests.workers.over_devices`: a model over two emulated devices, beside one in memory.

Prints what came out as JSON. What is placed wrongly ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import dispatch_model

from homer import HomerConfig, HomerModel
from homer.context import CompressedContext, KVRows
from homer.encode import TreeEncoder
from homer.state import NodeState
from tests.homer.emulated_devices import emulated_devices
from tests.homer.tiny import random_ids, tiny_llama
from workers.staging import Places, Staging
from workers.tensor_stream import NamedTensor, Spec
from workers.wire import LayerRows, gather_tensors, read_state, state_tensors

LAYERS = 8
SPLIT = 3
PARTS = random_ids(5, 1), random_ids(300, 2), random_ids(7, 3)
SIZES = {"max_chunk_len": 48, "target_len": 40, "warmup_layers": 2}
CONFIGS = {"default": HomerConfig(**SIZES), "paper": HomerConfig.paper(**SIZES)}  # type: ignore[arg-type]
TOKENS = 6


def spread_model() -> Any:
    """Three layers on the first device with the embeddings, all else on the second."""
    device_map = {f"model.layers.{i}": f"emulated:{int(i >= SPLIT)}" for i in range(LAYERS)}
    device_map["model.embed_tokens"] = "emulated:0"
    for name in ("model.rotary_emb", "model.norm", "lm_head"):
        device_map[name] = "emulated:1"
    with emulated_devices():
        return dispatch_model(tiny_llama(LAYERS), device_map=device_map, main_device="emulated:0")


class Wire:
    """From a worker to another that has its layers on the same devices."""

    def __init__(self, places: Places) -> None:
        self.places, self.staging = places, Staging(places)

    def state(self, state: NodeState) -> NodeState:
        named = state_tensors(state)
        came = self._bring([one.name for one in named], [one.tensor for one in named])
        return read_state(state.node, came, self.places)

    def rows(self, specs: Sequence[Spec], tensors: Iterable[torch.Tensor]) -> dict[int, KVRows]:
        layers = LayerRows(self.places)
        came = self._bring([spec.name for spec in specs], tensors)
        return dict(done for named in came if (done := layers.take(named)) is not None)

    def _bring(self, names: list[str], tensors: Iterable[torch.Tensor]) -> list[NamedTensor]:
        travelling = list(self.staging.to_host(tensors))
        assert {tensor.device.type for tensor in travelling} == {"cpu"}
        return [
            NamedTensor(name, self.staging.to_device(name, tensor))
            for name, tensor in zip(names, travelling, strict=True)
        ]


def across(homer: HomerModel, places: Places) -> CompressedContext:
    """As two workers run it: the root is merged where the last child is, the others travel."""
    plan = homer.plan(*(len(part) for part in PARTS))
    here, there = (TreeEncoder(homer.stack, plan, PARTS[0], PARTS[2]) for _ in range(2))
    wire = Wire(places)
    *first, last = plan.root.children
    made = []
    for child in first:
        node = plan.by_id[child]
        made.append(there.run_subtree(child, PARTS[1][node.context_start : node.context_end]))
    span = slice(plan.by_id[last].context_start, plan.by_id[last].context_end)
    own = here.run_subtree(last, PARTS[1][span])
    root = here.merge(plan.root.id, [*(wire.state(state) for state in made), own])
    shards = [shard for state in made for shard in state.shards]
    rows = wire.rows(*gather_tensors(shards, root.context_indices, homer.stack))
    for layer, one in rows.items():
        assert one.keys.device == one.values.device == homer.stack.layer_devices[layer]
    return here.finish(root, lambda layer: [rows.pop(layer)])


def facts(homer: HomerModel, context: CompressedContext) -> dict[str, Any]:
    """What came out, and on which devices rows of the cache are."""
    return {
        "kept": context.context_indices.tolist(),
        "logits": context.logits.tolist(),
        "tokens": homer.generate(context, TOKENS, ignore_eos=True).tolist(),
        "devices": [str(keys.device) for keys, _ in context.buffers],
    }


def main() -> None:
    told: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        plain = HomerModel(tiny_llama(LAYERS), config)
        told[f"{name}/memory"] = facts(plain, plain.compress(*PARTS))
    model = spread_model()
    for name, config in CONFIGS.items():
        with emulated_devices():
            spread = HomerModel(model, config)
            told[f"{name}/spread"] = facts(spread, spread.compress(*PARTS))
            places = Places.of(spread.stack)
            told[f"{name}/across"] = facts(spread, across(spread, places))
            if name == "paper":
                # Suffix rows that all come out on the first device.
                try:
                    across(spread, Places(places.home))
                except RuntimeError as error:
                    told["misplaced"] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
