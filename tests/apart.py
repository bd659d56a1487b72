"""A prompt cut over workers in one process: what each of them runs, real messages between them.

Plans, states and rows are encoded, checked and decoded as workers do. Knows nothing about calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from homer import MergePlan
from homer.context import CompressedContext, KVRows
from homer.encode import TreeEncoder
from homer.plan import NodeId
from homer.stack import LayerStack
from homer.state import KVShard, NodeState
from homer.v1 import worker_pb2
from workers.frames import decode_frame
from workers.plan_wire import write_plan
from workers.staging import Places
from workers.tensor_stream import Limits, NamedTensor, Spec, StreamReader, encode_stream
from workers.wire import (
    LayerRows,
    gather_check,
    gather_tensors,
    must_equal,
    read_plan,
    read_state,
    state_specs,
    state_tensors,
)
from workers.wire_format import WireFormat

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run_apart(
    stacks: Sequence[LayerStack],
    plan: MergePlan,
    parts: Parts,
    homes: Mapping[NodeId, int],
    bias: torch.Tensor | None = None,
) -> CompressedContext:
    """Run every node on the stack that `homes` names; KV stays there until the root gathers it."""
    prefix_ids, context_ids, suffix_ids = parts
    message = write_plan(plan).SerializeToString()
    encoders: dict[int, TreeEncoder] = {}
    for home in set(homes.values()):
        own = read_plan(worker_pb2.PlanSpec.FromString(message), stacks[home])
        encoders[home] = TreeEncoder(stacks[home], own, prefix_ids, suffix_ids, bias)
    left_behind: dict[int, list[KVShard]] = {home: [] for home in encoders}
    done: dict[NodeId, NodeState] = {}
    for node in plan.nodes:
        home = homes[node.id]
        encoder = encoders[home]
        if node.is_leaf:
            ids = context_ids[node.context_start : node.context_end]
            done[node.id] = encoder.run_subtree(node.id, ids)
            continue
        children = []
        for child_id in node.children:
            child = done.pop(child_id)
            if homes[child_id] != home:
                left_behind[homes[child_id]] += child.shards
                child = _state_across(child, encoder.plan, stacks[home])
            children.append(child)
        done[node.id] = encoder.merge(node.id, children)
    root_home = homes[plan.root.id]
    kept = done[plan.root.id].context_indices
    gathered = [
        _rows_across(shards, kept, stacks[home], stacks[root_home])
        for home, shards in left_behind.items()
        if shards
    ]

    def remote(layer: int) -> list[KVRows]:
        return [rows[layer] for rows in gathered]

    return encoders[root_home].finish(done[plan.root.id], remote)


def _state_across(state: NodeState, plan: MergePlan, stack: LayerStack) -> NodeState:
    named = state_tensors(state)
    check = must_equal(state_specs(plan, plan.by_id[state.node], stack))
    specs = [Spec.of(one) for one in named]
    came = _across(specs, [one.tensor for one in named], check)
    return read_state(state.node, came, Places.of(stack))


def _rows_across(
    shards: Sequence[KVShard], kept: torch.Tensor, here: LayerStack, there: LayerStack
) -> dict[int, KVRows]:
    check = gather_check(there, len(kept), WireFormat())
    layers = LayerRows(Places.of(there))
    came = _across(*gather_tensors(shards, kept, here), check)
    return dict(complete for named in came if (complete := layers.take(named)))


def _across(
    specs: Sequence[Spec], tensors: Iterable[torch.Tensor], check: Callable[[Sequence[Spec]], None]
) -> list[NamedTensor]:
    limits = Limits(total_bytes=sum(spec.nbytes for spec in specs), tensors=len(specs))
    reader = StreamReader(limits, check)
    came: list[NamedTensor] = []
    for packed in encode_stream(specs, tensors):
        came += reader.feed(decode_frame(packed.message))
    reader.finish()
    return came


def assert_same_context(ours: CompressedContext, theirs: CompressedContext) -> None:
    """To the last bit."""
    assert torch.equal(ours.context_indices, theirs.context_indices)
    assert torch.equal(ours.position_ids, theirs.position_ids)
    assert torch.equal(ours.logits, theirs.logits)
    for our_rows, their_rows in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(our_rows[0], their_rows[0])
        assert torch.equal(our_rows[1], their_rows[1])
