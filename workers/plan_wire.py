"""Plans and nodes as messages, both ways. Needs no torch, so that a client can use it."""

from __future__ import annotations

from typing import cast

from homer.config import HomerConfig, PlanKind, ScoreKind
from homer.plan import MergePlan, NodeId
from homer.v1 import plan_pb2, worker_pb2

PLAN_KINDS: dict[PlanKind, plan_pb2.PlanKind] = {
    "balanced": plan_pb2.PLAN_KIND_BALANCED,
    "paper": plan_pb2.PLAN_KIND_PAPER,
}
_KIND_NAMES: dict[int, PlanKind] = {number: name for name, number in PLAN_KINDS.items()}


def read_node(node: worker_pb2.NodeId) -> NodeId:
    return NodeId(node.height, node.index)


def write_node(node: NodeId) -> worker_pb2.NodeId:
    return worker_pb2.NodeId(height=node.height, index=node.index)


def read_plan_kind(number: int) -> PlanKind:
    """The plan kind of a message; unspecified is the default of `HomerConfig`."""
    return _KIND_NAMES.get(number, HomerConfig.plan)


def write_plan(plan: MergePlan) -> worker_pb2.PlanSpec:
    """Everything from which every machine builds the same plan."""
    config = plan.config
    return worker_pb2.PlanSpec(
        prefix_len=plan.prefix_len,
        context_len=plan.context_len,
        suffix_len=plan.suffix_len,
        num_layers=plan.num_layers,
        max_chunk_len=config.max_chunk_len,
        target_len=config.target_len,
        warmup_layers=config.warmup_layers,
        max_initial_chunk_len=config.max_initial_chunk_len or 0,
        fan_in=config.fan_in or 0,
        refresh_suffix=config.refresh_suffix,
        plan=PLAN_KINDS[config.plan],
        score=config.score,
    )


def read_plan(spec: worker_pb2.PlanSpec) -> MergePlan:
    """The plan of a message.

    Raises
    ------
    ConfigError, PlanError
        When there is no such plan.
    """
    config = HomerConfig(
        max_chunk_len=spec.max_chunk_len,
        target_len=spec.target_len,
        warmup_layers=spec.warmup_layers,
        max_initial_chunk_len=spec.max_initial_chunk_len or None,
        plan=read_plan_kind(spec.plan),
        fan_in=spec.fan_in or None,
        refresh_suffix=spec.refresh_suffix,
        score=cast(ScoreKind, spec.score or HomerConfig.score),
    )
    return MergePlan.build(
        spec.prefix_len, spec.context_len, spec.suffix_len, spec.num_layers, config
    )
