"""Runs the nodes of a merge plan for one request: leaves, merges, and the final cache.

Depth-first, each child freed as soon as it is merged, so that memory grows with the height of the
tree. The same functions run in one process and on every worker of a cluster. Knows nothing about
machines: rows that live elsewhere come through a callback.

Reference: HOMER, arXiv 2404.10308, section 3 (merging 3.1, token reduction 3.2, propagative
refinement 3.1, calibration 3.3).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from homer.attention import NodePass
from homer.bias import check_bias
from homer.context import CompressedContext, KVRows
from homer.errors import Cancelled, StateError
from homer.finish import CacheBuilder
from homer.order import node_batches
from homer.plan import MergePlan, NodeId, PlanNode
from homer.stack import LayerRun, LayerStack
from homer.state import KVShard, LayerKV, NodeState, join_shards

NodeInput = torch.Tensor | Sequence[NodeState]
"""What a node begins with: a leaf's token ids, or the states of a merge's children, in order."""

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
        leaf_batch_size: int = 1,
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
            Asked before each batch of nodes; when it says so, `Cancelled` is raised.
        leaf_batch_size : int
            Leaves that run together, layer by layer, and the merges above them: see `node_batches`.
            It changes no number.
        """
        top = self.plan.by_id[node_id]
        context_ids = self.stack.check_ids("context_ids", context_ids)
        if len(context_ids) != top.context_end - top.context_start:
            raise StateError(
                f"node {node_id} spans {top.context_end - top.context_start} context tokens, "
                f"but {len(context_ids)} ids were given"
            )
        done: dict[NodeId, NodeState] = {}
        for batch in node_batches(self.plan, node_id, leaf_batch_size):
            if should_stop is not None and should_stop():
                raise Cancelled(f"stopped before node {batch[0].id}")
            started = time.perf_counter()
            inputs = [take_input(node, top, context_ids, done) for node in batch]
            for state in self.run_together(batch, inputs):
                done[state.node] = state
            # What the children left has gone into the merges.
            del inputs, state
            seconds = (time.perf_counter() - started) / len(batch)
            if on_node is not None:
                for node in batch:
                    on_node(NodeReport(node.id, node.context_in, node.context_out, seconds))
        return done.pop(node_id)

    @torch.inference_mode()
    def merge(self, node_id: NodeId, children: Sequence[NodeState]) -> NodeState:
        """Merge finished children, in context order, into `node_id`.

        The children's shards move into the result; a child that lives elsewhere has none.
        """
        node = self.plan.by_id[node_id]
        if tuple(child.node for child in children) != node.children:
            given = [child.node for child in children]
            raise StateError(f"node {node_id} merges {list(node.children)}, not {given}")
        (state,) = self.run_together([node], [children])
        return state

    @torch.inference_mode()
    def run_together(
        self, nodes: Sequence[PlanNode], inputs: Sequence[NodeInput]
    ) -> list[NodeState]:
        """Run nodes of one level, layer by layer: each gets the numbers that it would get alone.

        The shards of children move into the results.
        """
        if self.plan.prefix_len and self.plan.height:
            self.prefix_kv()
        with self.stack.embeddings_held() if nodes[0].is_leaf else nullcontext():
            running = deque(
                self._begin_leaf(node, given)
                if isinstance(given, torch.Tensor)
                else self._begin_merge(node, given)
                for node, given in zip(nodes, inputs, strict=True)
            )
        self.stack.run_together(
            [one.run for one in running], range(nodes[0].layer_start, nodes[0].layer_end)
        )
        states = []
        for given in inputs:
            # What a node does not keep is free before the next one is packed.
            state = self._end(running.popleft())
            if not isinstance(given, torch.Tensor):
                _take_in(state, given)
            states.append(state)
        return states

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

    def choose_batch_size(self, node_id: NodeId, free_bytes: int) -> int:
        """How many leaves of a subtree to run together in `free_bytes` of memory.

        More than one only where weights are offloaded, or in parts on several ranks: elsewhere
        nothing is gained.
        """
        if not self.stack.offloads:
            return 1
        return self.stack.footprint.largest_batch(self.plan, node_id, free_bytes)

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

    def _begin_leaf(self, node: PlanNode, context_ids: torch.Tensor) -> _Running:
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
            return self._begin(node, self.stack.embed(ids), positions, indices, front=front)
        return self._begin(node, self.stack.embed(ids), positions, indices)

    def _begin_merge(self, node: PlanNode, children: Sequence[NodeState]) -> _Running:
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
        return self._begin(node, hidden, positions, indices)

    def _begin(
        self,
        node: PlanNode,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        indices: torch.Tensor,
        front: int = 0,
    ) -> _Running:
        """A node about to run its layers over [front | context | suffix]; prunes context rows."""
        plan = self.plan
        context_end = front + node.context_in
        is_root = node.id == plan.root.id
        kept = [torch.arange(node.context_in, device=hidden.device)]
        suffix_rows = torch.arange(context_end, len(hidden), device=hidden.device)

        def choose(scores: torch.Tensor) -> torch.Tensor:
            if node.prunes:
                scores = self._calibrated(scores.to(positions.device), positions, score_layer)
                kept[0] = keep_highest(scores[front:context_end], node.context_out)
            # No layer follows the root: of its hidden states only the last is used, for the logits.
            return suffix_rows[-1:] if is_root else torch.cat((kept[0] + front, suffix_rows))

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
        run = LayerRun(hidden, positions, node_pass)
        return _Running(node, run, node_pass.kv, indices, front, kept, suffix_rows)

    def _end(self, running: _Running) -> NodeState:
        """What a node leaves that has run its layers."""
        node, front, kv = running.node, running.front, running.kv
        (context_rows,) = running.kept
        if front:
            self._prefix_kv = [(keys[:, :front], values[:, :front]) for keys, values in kv]
        suffix_kv = None
        if not self.plan.refreshes_suffix:
            suffix_kv = [_pick(layer, running.suffix_rows) for layer in kv]
        shard = KVShard(node.layer_start, running.indices[context_rows], [], [])
        kept_rows = context_rows + front
        for layer, (keys, values) in enumerate(kv):
            kept_keys, kept_values = _pick((keys, values), kept_rows)
            shard.keys.append(kept_keys)
            shard.values.append(kept_values)
            kv[layer] = (keys[:, :0], values[:, :0])
        return NodeState(
            node=node.id,
            hidden=running.run.hidden,
            position_ids=running.run.position_ids[torch.cat((kept_rows, running.suffix_rows))],
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


@dataclass
class _Running:
    """A node that runs its layers over rows [front | context | suffix].

    `kv` are the rows of each layer so far; `indices` those of the context tokens; `kept` has one
    entry: which of these stay, all until that is chosen.
    """

    node: PlanNode
    run: LayerRun
    kv: list[LayerKV]
    indices: torch.Tensor
    front: int
    kept: list[torch.Tensor]
    suffix_rows: torch.Tensor


def take_input(
    node: PlanNode, top: PlanNode, context_ids: torch.Tensor, done: dict[NodeId, NodeState]
) -> NodeInput:
    """What `node` begins with: its part of `top`'s ids, or its children's states out of `done`."""
    if node.is_leaf:
        return context_ids[
            node.context_start - top.context_start : node.context_end - top.context_start
        ]
    return [done.pop(child) for child in node.children]


def _take_in(state: NodeState, children: Sequence[NodeState]) -> None:
    """Put the rows of a merge's children, those that survived, below its own."""
    suffix_kv = [c.suffix_kv for c in children if c.suffix_kv is not None]
    if state.suffix_kv is not None:
        averaged = [_mean(layer) for layer in zip(*suffix_kv, strict=True)]
        state.suffix_kv = averaged + state.suffix_kv
    below = [shard.select_(state.context_indices) for child in children for shard in child.shards]
    state.shards = join_shards([*below, *state.shards])


def _pick(layer: LayerKV, rows: torch.Tensor) -> LayerKV:
    """Copies of some rows of a layer, on its device."""
    keys, values = layer
    rows = rows.to(keys.device)
    return keys.index_select(1, rows), values.index_select(1, rows)


def _mean(suffixes: Sequence[LayerKV]) -> LayerKV:
    keys, values = zip(*suffixes, strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def keep_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of the `count` highest `scores`, ascending; of equals the earlier, on any device."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
