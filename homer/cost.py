"""What a merge plan costs on a model of given dimensions: KV bytes and estimated FLOPs.

Counted from the plan as `homer.encode` runs it. Pure Python; knows nothing about tensors or
machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from homer.plan import MergePlan, PlanNode
from homer.shape import ModelShape


@dataclass(frozen=True)
class LevelCost:
    """All nodes of one height above the leaves.

    `context_in` and `context_out` count the context tokens of the whole level; `kv_bytes` is what
    their survivors hold in every layer so far.
    """

    height: int
    nodes: int
    layer_start: int
    layer_end: int
    context_in: int
    context_out: int
    kv_bytes: int
    flops: int


@dataclass(frozen=True)
class PlanCost:
    """A plan on a model, beside full attention over the same prompt on the same model.

    `peak_kv_bytes` is the most KV that one process holds while it runs the whole plan depth-first;
    `refresh_flops` is the part of `flops` that runs the suffix once more at the root.
    """

    levels: tuple[LevelCost, ...]
    flops: int
    refresh_flops: int
    full_flops: int
    cache_bytes: int
    full_cache_bytes: int
    peak_kv_bytes: int

    @classmethod
    def of(cls, plan: MergePlan, shape: ModelShape) -> PlanCost:
        """Count the costs of `plan`; `plan.num_layers` must be the model's."""
        levels = tuple(_level(plan, shape, height) for height in range(plan.height + 1))
        head = 2 * shape.hidden_size * shape.vocab_size
        prefix = 0
        if plan.height > 0:
            prefix = layer_flops(shape, plan.prefix_len) * plan.num_layers
        refresh = 0
        if plan.refreshes_suffix:
            past = plan.prefix_len + plan.root.context_out
            refresh = suffix_flops(shape, plan.suffix_len, past, plan.num_layers)
        return cls(
            levels=levels,
            flops=sum(level.flops for level in levels) + prefix + refresh + head,
            refresh_flops=refresh,
            full_flops=layer_flops(shape, plan.prompt_len) * plan.num_layers + head,
            cache_bytes=plan.kept_len * plan.num_layers * shape.kv_bytes_per_row,
            full_cache_bytes=plan.prompt_len * plan.num_layers * shape.kv_bytes_per_row,
            peak_kv_bytes=_peak_kv_rows(plan) * shape.kv_bytes_per_row,
        )


def layer_flops(shape: ModelShape, tokens: int, past: int = 0) -> int:
    """One layer over `tokens` tokens that see `past` rows before them and each other causally.

    Multiplications and additions of the matrix products; norms, rotations and softmax are left out.
    """
    width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    projections = 2 * tokens * shape.hidden_size * (2 * width + 2 * kv_width)
    pairs = tokens * past + tokens * (tokens + 1) // 2
    return projections + 4 * width * pairs + mlp_flops(shape, tokens)


def mlp_flops(shape: ModelShape, tokens: int) -> int:
    """One gated MLP (three projections) over `tokens` tokens."""
    return 6 * tokens * shape.hidden_size * shape.intermediate_size


def suffix_flops(shape: ModelShape, tokens: int, past: int, layers: int) -> int:
    """`tokens` tokens over `past` rows in all layers; of the last MLP, the last token alone."""
    return layer_flops(shape, tokens, past) * layers - mlp_flops(shape, tokens - 1)


def node_flops(plan: MergePlan, shape: ModelShape, node: PlanNode) -> int:
    """One node of `plan`; the prefix is computed once for all of them and is not counted."""
    if plan.height == 0:
        tokens, past = plan.prompt_len, 0
    else:
        tokens, past = node.context_in + plan.suffix_len, plan.prefix_len
    flops = layer_flops(shape, tokens, past) * (node.layer_end - node.layer_start)
    # Only what goes on passes the MLP of the layer that prunes; of the root, the last token alone.
    if node.id == plan.root.id and (node.prunes or plan.height > 0):
        flops -= mlp_flops(shape, tokens - 1)
    elif node.prunes:
        flops -= mlp_flops(shape, node.context_in - node.context_out)
    return flops


def _level(plan: MergePlan, shape: ModelShape, height: int) -> LevelCost:
    nodes: Sequence[PlanNode] = [node for node in plan.nodes if node.id.height == height]
    context_out = sum(node.context_out for node in nodes)
    return LevelCost(
        height=height,
        nodes=len(nodes),
        layer_start=nodes[0].layer_start,
        layer_end=nodes[0].layer_end,
        context_in=sum(node.context_in for node in nodes),
        context_out=context_out,
        kv_bytes=context_out * nodes[0].layer_end * shape.kv_bytes_per_row,
        flops=sum(node_flops(plan, shape, node) for node in nodes),
    )


def _peak_kv_rows(plan: MergePlan) -> int:
    """Most rows, over tokens and layers, that are alive at once when one process runs all nodes."""
    prefix = plan.prefix_len * plan.num_layers
    suffix_rows = 0 if plan.refreshes_suffix else plan.suffix_len
    held: list[int] = []
    peak = 0
    for node in plan.nodes:
        new_layers = node.layer_end - node.layer_start
        running = (node.context_in + plan.suffix_len) * new_layers
        peak = max(peak, prefix + sum(held) + running)
        if node.children:
            del held[-len(node.children) :]
        held.append((node.context_out + suffix_rows) * node.layer_end)
    return max(peak, plan.kept_len * plan.num_layers)
