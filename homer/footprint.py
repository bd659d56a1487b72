"""How much memory nodes, merges and answers of a plan take while they run: estimates from above.

Counted from the plan as `homer.encode` runs it. Knows nothing about tensors, models or machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from homer.order import node_batches
from homer.plan import MergePlan, NodeId, PlanNode


@dataclass(frozen=True)
class Footprint:
    """Bytes of one token: in one layer's cache, between two layers, and inside of a layer."""

    kv_row_bytes: int
    hidden_row_bytes: int
    running_row_bytes: int

    def subtree(self, plan: MergePlan, node_id: NodeId, leaf_batch_size: int = 1) -> int:
        """The most at once while a subtree runs depth-first: a batch and O(height) half chunks."""
        held: dict[NodeId, int] = {}
        total = peak = 0
        for batch in node_batches(plan, node_id, leaf_batch_size):
            peak = max(peak, total + self._running_together(plan, batch))
            for node in batch:
                total -= sum(held.pop(child) for child in node.children)
                held[node.id] = self._left(plan, node, node.layer_end)
                total += held[node.id]
            peak = max(peak, total)
        return peak + self._prefix(plan)

    def largest_batch(self, plan: MergePlan, node_id: NodeId, free_bytes: int) -> int:
        """How many leaves of a subtree may run together within `free_bytes`; at least one."""
        fits, too_many = 1, sum(node.is_leaf for node in plan.subtree(node_id)) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.subtree(plan, node_id, middle) <= free_bytes:
                fits = middle
            else:
                too_many = middle
        return fits

    def merge(self, plan: MergePlan, node_id: NodeId) -> int:
        """A merge whose children's states come from elsewhere, and what it leaves."""
        node = plan.by_id[node_id]
        states = sum(self._left(plan, plan.by_id[child], 0) for child in node.children)
        own = self._left(plan, node, node.layer_end - node.layer_start)
        return states + self._running(plan, node) + own + self._prefix(plan)

    def largest_merge(self, plan: MergePlan) -> int:
        """The most that any merge of the plan takes; 0 where there is none."""
        return max((self.merge(plan, node.id) for node in plan.merges), default=0)

    def answer(self, plan: MergePlan, max_new_tokens: int) -> int:
        """The final cache with room for an answer, and the refreshed suffix behind it."""
        rows = plan.kept_len + max_new_tokens
        # Attention puts the rows of the layer at hand together once more.
        running = plan.suffix_len * self.running_row_bytes + 2 * plan.kept_len * self.kv_row_bytes
        return rows * plan.num_layers * self.kv_row_bytes + running + self._prefix(plan)

    def _running(self, plan: MergePlan, node: PlanNode) -> int:
        return _tokens(plan, node) * self.running_row_bytes + self._waiting(plan, node)

    def _waiting(self, plan: MergePlan, node: PlanNode) -> int:
        """What a node has between two layers, but for its hidden states."""
        layers = node.layer_end - node.layer_start
        return _tokens(plan, node) * (layers + 1) * self.kv_row_bytes

    def _running_together(self, plan: MergePlan, batch: Sequence[PlanNode]) -> int:
        """One node of the batch is in a layer, the others wait with hidden states and rotations."""
        first, *others = sorted(batch, key=lambda node: node.context_in, reverse=True)
        between = 2 * self.hidden_row_bytes + self.kv_row_bytes
        return self._running(plan, first) + sum(
            self._waiting(plan, node) + _tokens(plan, node) * between for node in others
        )

    def _left(self, plan: MergePlan, node: PlanNode, layers: int) -> int:
        rows = node.context_out + plan.suffix_len
        suffix = 0 if plan.refreshes_suffix else plan.suffix_len * node.layer_end
        return (
            rows * self.hidden_row_bytes + (node.context_out * layers + suffix) * self.kv_row_bytes
        )

    def _prefix(self, plan: MergePlan) -> int:
        return plan.prefix_len * plan.num_layers * self.kv_row_bytes


def _tokens(plan: MergePlan, node: PlanNode) -> int:
    return plan.prefix_len + node.context_in + plan.suffix_len
