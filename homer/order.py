"""In which order the nodes of a subtree run, and which of them run together.

Depth-first, so that few states wait to be merged. Where weights lie outside of the device that
computes, nodes of one level run together, layer by layer: each weight is then brought in once for
all of them. Knows nothing about tensors or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from homer.plan import MergePlan, NodeId, PlanNode


def node_batches(
    plan: MergePlan, node_id: NodeId, leaf_batch_size: int = 1
) -> Iterator[tuple[PlanNode, ...]]:
    """The nodes under `node_id` in the order in which they run, itself last.

    Those of a tuple run together: `leaf_batch_size` leaves that follow each other, then level by
    level the merges whose children are all there. One leaf at a time is post-order.
    """
    leaves = [node for node in plan.subtree(node_id) if node.is_leaf]
    children_done: Counter[NodeId] = Counter()
    for start in range(0, len(leaves), leaf_batch_size):
        batch = tuple(leaves[start : start + leaf_batch_size])
        while batch:
            yield batch
            ready: list[PlanNode] = []
            for node in batch:
                if node.id == node_id:
                    return
                parent = plan.by_id[plan.parents[node.id]]
                children_done[parent.id] += 1
                if children_done[parent.id] == len(parent.children):
                    ready.append(parent)
            batch = tuple(ready)
