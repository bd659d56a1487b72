"""Costs of a GPU from its data sheet: an estimate for where none is at hand to be measured.

A node's matrix products run at a part of the peak; a short run reads all weights once, and a
decoded token the cache as well, at a part of the memory's bandwidth. Whatever this says is derived,
not measured, and files made from it say so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cluster.sim.costs import CostPoint, Costs, Kind
from homer.cost import layer_flops, suffix_flops
from homer.shape import ModelShape

NODE_PLAN_SECONDS = 6e-6
EVENT_SECONDS = 0.0005


@dataclass(frozen=True, kw_only=True)
class GpuSheet:
    """A GPU as its maker describes it, and the parts of it that a run is taken to reach.

    The defaults are those of an NVIDIA H100 SXM (dense bfloat16, HBM3). Chunks of 2,048 tokens
    usually reach 40 to 60 percent of the peak; a layer launches a dozen kernels.
    """

    name: str = "H100 SXM"
    peak_flops: float = 989e12
    bytes_per_second: float = 3.35e12
    flops_part: float = 0.45
    bandwidth_part: float = 0.7
    layer_seconds: float = 100e-6


def derive_costs(sheet: GpuSheet, shape: ModelShape) -> Costs:
    """Costs of a model of `shape` on a GPU, each worker with one."""
    chunk, settings = shape.window // 2, shape.recommended_config()
    points = []

    def add(kind: Kind, tokens: int, past: int, layers: int, flops: int, seconds: float) -> None:
        points.append(CostPoint(kind, tokens, past, layers, flops, seconds))

    rate = sheet.peak_flops * sheet.flops_part
    for kind in ("leaf", "merge"):
        for tokens in (chunk // 2, chunk):
            for layers in (1, shape.num_layers // 4, shape.num_layers // 2):
                flops = layer_flops(shape, tokens) * layers
                add(kind, tokens, 0, layers, flops, flops / rate + layers * sheet.layer_seconds)
    layers = shape.num_layers
    read = sheet.bytes_per_second * sheet.bandwidth_part
    kv_width = shape.num_kv_heads * shape.head_dim
    width = shape.num_heads * shape.head_dim
    layer_weights = shape.hidden_size * (2 * width + 2 * kv_width + 3 * shape.intermediate_size)
    weights = layers * layer_weights * shape.value_bytes
    for tokens in (16, 32, 64):
        flops = suffix_flops(shape, tokens, chunk, layers)
        seconds = max(weights / read, flops / rate) + layers * sheet.layer_seconds
        add("suffix", tokens, chunk, layers, flops, seconds)
    for past in (chunk // 2, chunk, 2 * chunk):
        cache = past * layers * shape.kv_bytes_per_row
        seconds = (weights + cache) / read + layers * sheet.layer_seconds
        add("decode", 1, past, layers, suffix_flops(shape, 1, past, layers), seconds)
    return Costs(
        about=f"7B model of 32 layers on {sheet.name}, from its data sheet",
        measured=False,
        shape=shape,
        settings={
            name: getattr(settings, name)
            for name in ("max_chunk_len", "target_len", "warmup_layers")
        },
        points=tuple(points),
        event_seconds=EVENT_SECONDS,
        node_plan_seconds=NODE_PLAN_SECONDS,
        details={"sheet": asdict(sheet)},
    )
