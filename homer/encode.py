"""Runs the nodes of a merge plan for one request: leaves, merges, and the final cache.

Depth-first, each child freed as soon as it is merged, so that memory grows with the height of the
tree. The same functions run in one process and on every worker of a cluster. Knows nothing about
machines: rows that live elsewhere come through a callback.

Reference: HOMER, arXiv 2404.10308, section 3 (merging 3.1, token reduction 3.2, propagative
refinement 3.1, calibration 3.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from homer.attention import NodePass
from homer.bias import check_bias
from homer.context import CompressedContext, KVRows
from homer.errors import Cancelled, StateError
from homer.finish import CacheBuilder
from homer.plan import MergePlan, NodeId, PlanNode
from homer.stack import LayerStack
from homer.state import KVShard, LayerKV, NodeState, join_shards

RemoteRows = Callable[[int], Sequence[KVRows]]
"""The surviving rows of one layer that live elsewhere; asked for layer by layer; may block."""


@dataclass(frozen=True)
class NodeReport:
    """A node is done: what went in, what is left, and the seconds it took."""

    node: NodeId
    context_in: int
    context_out: int
    seconds: float


class TreeEncoder:
    """Runs nodes of `plan` for one prompt.

    Parameters
    ----------
    stack : LayerStack
    plan : MergePlan
    prefix_ids, suffix_ids : torch.Tensor of shape (n,), int64
    bias : torch.Tensor of shape (num_layers, distances), or None
        Calibration bias; None means zeros.

    Notes
    -----
    Not for use from several threads at once.
    """

    def __init__(
        self,
        stack: LayerStack,
        plan: MergePlan,
        prefix_ids: torch.Tensor,
        suffix_ids: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.stack = stack
        self.plan = plan
        self.prefix_ids = stack.check_ids("prefix_ids", prefix_ids)
        self.suffix_ids = stack.check_ids("suffix_ids", suffix_ids)
        for name, ids, length in (
            ("prefix_ids", self.prefix_ids, plan.prefix_len),
            ("suffix_ids", self.suffix_ids, plan.suffix_len),
        ):
            if len(ids) != length:
                raise StateError(
                    f"{name} has {len(ids)} tokens, but the plan was made for {length}"
                )
        if bias is not None:
            check_bias(bias, num_layers=stack.num_layers, max_distance=plan.max_distance)
        self.bias = bias
        self._prefix_kv: list[LayerKV] | None = None

    @torch.inference_mode()
    def run_subtree(
        self,
        node_id: NodeId,
        context_ids: torch.Tensor,
        on_node: Callable[[NodeReport], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> NodeState:
        """Run the subtree under `node_id` depth-first.

        Parameters
        ----------
        node_id : NodeId
        context_ids : torch.Tensor of shape (span,), int64
            The token ids of this subtree's span of the context.
        on_node : callable, optional
            Called after each node.
        should_stop : callable, optional
            Asked before each node; when it says so, `Cancelled` is raised.
        """
        nodes = self.plan.subtree(node_id)
        top = nodes[-1]
        context_ids = self.stack.check_ids("context_ids", context_ids)
        if len(context_ids) != top.context_end - top.context_start:
            raise StateError(
                f"node {node_id} spans {top.context_end - top.context_start} context tokens, "
                f"but {len(context_ids)} ids were given"
            )
        done: list[NodeState] = []
        for node in nodes:
            if should_stop is not None and should_stop():
                raise Cancelled(f"stopped before node {node.id}")
            started = time.perf_counter()
            if node.is_leaf:
                span = slice(
                    node.context_start - top.context_start, node.context_end - top.context_start
                )
                done.append(self._run_leaf(node, context_ids[span]))
            else:
                children = done[-len(node.children) :]
                del done[-len(node.children) :]
                done.append(self._run_merge(node, children))
                del children
            if on_node is not None:
                seconds = time.perf_counter() - started
                on_node(NodeReport(node.id, node.context_in, node.context_out, seconds))
        return done.pop()

    @torch.inference_mode()
    def merge(self, node_id: NodeId, children: Sequence[NodeState]) -> NodeState:
        """Merge finished children, in context order, into `node_id`.

        The children's shards move into the result; a child that lives elsewhere has none.
        """
        node = self.plan.by_id[node_id]
        if tuple(child.node for child in children) != node.children:
            given = [child.node for child in children]
            raise StateError(f"node {node_id} merges {list(node.children)}, not {given}")
        return self._run_merge(node, children)

    @torch.inference_mode()
    def finish(
        self, root: NodeState, remote: RemoteRows | None = None, room_tokens: int = 0
    ) -> CompressedContext:
        """The final cache from the root's state; `root`'s shards move into it.

        Raises
        ------
        StateError
            When a surviving row is missing, or there more than once.
        """
        builder = self.finishing(root, room_tokens)
        while not builder.complete:
            builder.add_layer(remote(builder.next_layer) if remote is not None else ())
        return builder.finish()

    @torch.inference_mode()
    def finishing(self, root: NodeState, room_tokens: int = 0) -> CacheBuilder:
        """What `finish` does, layer by layer: for who has other work in between."""
        prefix_kv = self.prefix_kv() if self.plan.prefix_len else None
        return CacheBuilder(self.stack, self.plan, root, prefix_kv, self.suffix_ids, room_tokens)

    def prefix_kv(self) -> list[LayerKV]:
        """Keys and values of the prefix in all layers here; computed once for all chunks, levels.

        The prefix sees only itself, so its states are the same everywhere; averaging them at a
        merge changes nothing.
        """
        if self._prefix_kv is None:
            node_pass = NodePass(span=self.plan.next_position)
            positions = torch.arange(self.plan.prefix_len, device=self.stack.device)
            hidden = self.stack.embed(self.prefix_ids)
            self.stack.run(hidden, positions, range(self.stack.loaded_layers), node_pass)
            self._prefix_kv = node_pass.kv
        return self._prefix_kv

    def _run_leaf(self, node: PlanNode, context_ids: torch.Tensor) -> NodeState:
        plan, device = self.plan, self.stack.device
        front = plan.prefix_len
        ids = torch.cat((context_ids, self.suffix_ids))
        context_positions = torch.arange(front, front + len(context_ids), device=device)
        suffix_start = front + plan.chunk_context_len
        suffix_positions = torch.arange(suffix_start, suffix_start + plan.suffix_len, device=device)
        positions = torch.cat((context_positions, suffix_positions))
        indices = torch.arange(node.context_start, node.context_end, device=device)
        if plan.height == 0:
            # One chunk: the whole prompt in one pass, exactly as the plain model runs it.
            ids = torch.cat((self.prefix_ids, ids))
            positions = torch.cat((torch.arange(front, device=device), positions))
            return self._run_node(node, self.stack.embed(ids), positions, indices, front=front)
        return self._run_node(node, self.stack.embed(ids), positions, indices)

    def _run_merge(self, node: PlanNode, children: Sequence[NodeState]) -> NodeState:
        suffix_len = self.plan.suffix_len
        suffixes = torch.stack([child.hidden[-suffix_len:] for child in children])
        hidden = torch.cat([*(child.hidden[:-suffix_len] for child in children), suffixes.mean(0)])
        positions = torch.cat(
            [
                *(child.position_ids[:-suffix_len] for child in children),
                children[-1].position_ids[-suffix_len:],
            ]
        )
        indices = torch.cat([child.context_indices for child in children])
        suffix_kv = [c.suffix_kv for c in children if c.suffix_kv is not None]
        state = self._run_node(node, hidden, positions, indices)
        if state.suffix_kv is not None:
            state.suffix_kv = [
                _mean(layer) for layer in zip(*suffix_kv, strict=True)
            ] + state.suffix_kv
        below = [
            shard.select_(state.context_indices) for child in children for shard in child.shards
        ]
        state.shards = join_shards([*below, *state.shards])
        return state

    def _run_node(
        self,
        node: PlanNode,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        indices: torch.Tensor,
        front: int = 0,
    ) -> NodeState:
        """Run the node's layers over [front | context | suffix] and prune the context rows."""
        plan = self.plan
        context_end = front + node.context_in
        is_root = node.id == plan.root.id
        context_rows = torch.arange(node.context_in, device=hidden.device)
        suffix_rows = torch.arange(context_end, len(hidden), device=hidden.device)

        def choose(scores: torch.Tensor) -> torch.Tensor:
            nonlocal context_rows
            if node.prunes:
                scores = self._calibrated(scores, positions, score_layer)
                context_rows = keep_highest(scores[front:context_end], node.context_out)
            # No layer follows the root: of its hidden states only the last is used, for the logits.
            return suffix_rows[-1:] if is_root else torch.cat((context_rows + front, suffix_rows))

        prefix_kv = self.prefix_kv() if plan.prefix_len and not front else None
        layers = range(node.layer_start, node.layer_end)
        score_layer = self.stack.score_layer(layers, plan.prefix_len, plan.next_position - 1)
        node_pass = NodePass(
            span=plan.next_position,
            score_layer=score_layer,
            score=plan.config.score,
            suffix_len=plan.suffix_len,
            past_positions=torch.arange(plan.prefix_len, device=hidden.device),
            past=prefix_kv.__getitem__ if prefix_kv is not None else None,
            # A prompt that fits runs as the plain model would, to the last bit.
            choose_rows=choose if node.prunes or (is_root and plan.height > 0) else None,
        )
        hidden = self.stack.run(hidden, positions, layers, node_pass)
        if front:
            self._prefix_kv = [
                (keys[:, :front], values[:, :front]) for keys, values in node_pass.kv
            ]
        suffix_kv = None
        if not plan.refreshes_suffix:
            suffix_kv = [(k[:, suffix_rows], v[:, suffix_rows]) for k, v in node_pass.kv]
        shard = KVShard(node.layer_start, indices[context_rows], [], [])
        kept_rows = context_rows + front
        for layer, (keys, values) in enumerate(node_pass.kv):
            shard.keys.append(keys.index_select(1, kept_rows))
            shard.values.append(values.index_select(1, kept_rows))
            node_pass.kv[layer] = (keys[:, :0], values[:, :0])
        return NodeState(
            node=node.id,
            hidden=hidden,
            position_ids=positions[torch.cat((kept_rows, suffix_rows))],
            context_indices=shard.context_indices,
            suffix_kv=suffix_kv,
            shards=[shard],
        )

    def _calibrated(
        self, scores: torch.Tensor, positions: torch.Tensor, layer: int
    ) -> torch.Tensor:
        if self.bias is None or not self.plan.config.wants_bias:
            return scores
        return scores - self.bias[layer].to(scores)[positions[-1] - positions]


def _mean(suffixes: Sequence[LayerKV]) -> LayerKV:
    keys, values = zip(*suffixes, strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def keep_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of the `count` highest `scores`, ascending; of equals the earlier, on any device."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
