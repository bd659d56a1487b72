"""A merge plan for people and for scripts: as a table, as a tree, as JSON.

Draws with rich; knows nothing about tensors or machines.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from homer.config import HomerConfig
from homer.cost import PlanCost, node_flops
from homer.plan import MergePlan, NodeId
from homer.shape import BIAS_FILE, UNCALIBRATED, ModelShape


def plan_summary(
    plan: MergePlan,
    cost: PlanCost,
    shape: ModelShape,
    sources: dict[str, str],
    calibrated: bool | None = None,
) -> dict[str, Any]:
    """The plan, its cost and where its settings come from as plain values, for JSON.

    `calibrated` is None where no model is given.
    """
    return {
        "prompt_tokens": plan.prompt_len,
        "prefix_tokens": plan.prefix_len,
        "context_tokens": plan.context_len,
        "suffix_tokens": plan.suffix_len,
        "num_layers": plan.num_layers,
        "window": shape.window,
        "window_source": shape.window_source,
        "config": asdict(plan.config),
        "setting_sources": sources,
        "calibrated": calibrated,
        "leaves": len(plan.leaves),
        "merges": len(plan.merges),
        "fan_in": plan.fan_in,
        "leaf_context_tokens": plan.chunk_context_len,
        "kept_tokens": plan.kept_len,
        "next_position": plan.next_position,
        **asdict(cost),
        "flops_ratio": cost.flops / cost.full_flops,
    }


def plan_facts(
    plan: MergePlan,
    cost: PlanCost,
    shape: ModelShape,
    sources: dict[str, str],
    calibrated: bool | None = None,
) -> Table:
    """What holds for the plan as a whole, one fact a row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    leaves = len(plan.leaves)
    add_settings(table, plan.config, shape, sources)
    config = plan.config
    if config.max_initial_chunk_len is not None:
        table.add_row("max_initial_chunk_len", f"{config.max_initial_chunk_len:,} tokens")
    suffix = "run again at the root" if config.refresh_suffix else "averaged at merges"
    table.add_row("plan", f"{config.plan}; the question is {suffix}")
    table.add_row("score", config.score)
    if calibrated is not None and config.wants_bias:
        table.add_row("calibrated", f"by {BIAS_FILE} beside it" if calibrated else UNCALIBRATED)
    table.add_row(
        "prompt",
        f"{plan.prompt_len:,} tokens ({plan.prefix_len:,} prefix + {plan.context_len:,} context "
        f"+ {plan.suffix_len:,} suffix)",
    )
    table.add_row(
        "leaves",
        f"{leaves:,} of at most {plan.chunk_context_len:,} context tokens, merged up to "
        f"{plan.fan_in} at a time",
    )
    share = cost.cache_bytes / cost.full_cache_bytes
    table.add_row(
        "final cache",
        f"{plan.kept_len:,} tokens, {format_bytes(cost.cache_bytes)} "
        f"({share:.1%} of full attention's {format_bytes(cost.full_cache_bytes)})",
    )
    table.add_row("peak KV", f"{format_bytes(cost.peak_kv_bytes)} where one process runs it all")
    table.add_row(
        "compute",
        f"{format_flops(cost.flops)} FLOPs ({cost.flops / cost.full_flops:.1%} of full attention's "
        f"{format_flops(cost.full_flops)})",
    )
    return table


def add_settings(
    table: Table, config: HomerConfig, shape: ModelShape, sources: dict[str, str]
) -> None:
    """The window, and the settings that follow from it where nobody gives them."""
    table.add_row("window", f"{shape.window:,} positions ({shape.window_source})")
    for name, source in sources.items():
        value = getattr(config, name)
        of_layers = f" of {shape.num_layers}" if name == "warmup_layers" else " tokens"
        table.add_row(name, f"{value:,}{of_layers} ({source})")


def plan_table(plan: MergePlan, cost: PlanCost) -> Table:
    """One row per level of the tree, the root first."""
    table = Table(
        caption="in, out: context tokens of the whole level; prefix and suffix come on top"
    )
    table.add_column("level", no_wrap=True)
    for title in ("nodes", "layers", "in", "out", "KV", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    for level in reversed(cost.levels):
        table.add_row(
            _level_name(plan, level.height),
            f"{level.nodes:,}",
            f"{level.layer_start}-{level.layer_end - 1}",
            f"{level.context_in:,}",
            f"{level.context_out:,}",
            format_bytes(level.kv_bytes),
            format_flops(level.flops),
        )
    if plan.refreshes_suffix:
        layers = f"0-{plan.num_layers - 1}"
        flops = format_flops(cost.refresh_flops)
        table.add_row("suffix refresh", "1", layers, "", "", "", flops)
    return table


def plan_tree(plan: MergePlan, shape: ModelShape) -> Tree:
    """Every node below its parent, the root first."""

    def label(node_id: NodeId) -> Text:
        node = plan.by_id[node_id]
        kv_bytes = node.context_out * node.layer_end * shape.kv_bytes_per_row
        return Text(
            f"{_node_name(plan, node_id)}  [{node.context_start:,}, {node.context_end:,})  "
            f"layers {node.layer_start}-{node.layer_end - 1}  "
            f"{node.context_in:,} -> {node.context_out:,}  {format_bytes(kv_bytes)}  "
            f"{format_flops(node_flops(plan, shape, node))}",
            no_wrap=True,
            overflow="ignore",
        )

    def grow(branch: Tree, node_id: NodeId) -> None:
        for child in plan.by_id[node_id].children:
            grow(branch.add(label(child)), child)

    tree = Tree(label(plan.root.id))
    grow(tree, plan.root.id)
    return tree


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def format_flops(count: float) -> str:
    """A count with the largest decimal prefix that keeps the number at 1 or more."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.1f} {unit}".rstrip()
        count /= 1000
    return f"{count:,.1f} P"


def _level_name(plan: MergePlan, height: int) -> str:
    if height == plan.height:
        return "root" if height else "one leaf"
    return f"merge {height}" if height else "leaves"


def _node_name(plan: MergePlan, node_id: NodeId) -> str:
    if node_id == plan.root.id:
        return _level_name(plan, plan.height)
    return (
        f"leaf {node_id.index}"
        if node_id.height == 0
        else f"merge {node_id.height}.{node_id.index}"
    )
