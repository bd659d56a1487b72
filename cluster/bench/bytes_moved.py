"""The bytes that have to travel between workers, by a plan and a model's dimensions.

Pure Python. Knows nothing about how they travel.
"""

from __future__ import annotations

from homer.plan import MergePlan, PlanNode
from homer.shape import ModelShape

INDEX_BYTES = 4


def state_bytes(plan: MergePlan, node: PlanNode, shape: ModelShape) -> int:
    """What a parent elsewhere needs of `node`.

    Hidden states and a position for each row, the index of each context token, and, where suffix
    states are averaged, the suffix rows of all layers so far.
    """
    rows = node.context_out + plan.suffix_len
    hidden = rows * (shape.hidden_size * shape.value_bytes + INDEX_BYTES)
    suffix = 0
    if not plan.refreshes_suffix:
        suffix = node.layer_end * plan.suffix_len * shape.kv_bytes_per_row
    return hidden + node.context_out * INDEX_BYTES + suffix
