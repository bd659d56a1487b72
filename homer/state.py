"""What a finished node leaves behind: plain tensors, and the few operations on them.

Rows are context tokens in ascending order of their index in the original context. That index names
a token everywhere, so KV rows can stay on the machine that made them and be asked for by index.
This module knows nothing about models, plans or machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from homer.plan import NodeId

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each of shape (kv_heads, tokens, head_dim)."""


def rows_of(context_indices: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Row numbers of those `context_indices` that are in `kept`; both ascending, int64."""
    return torch.isin(context_indices, kept, assume_unique=True).nonzero().flatten()


class ElsewhereToo(Protocol):
    """What stands for a shard or state that other ranks hold their own heads of."""

    def copy(self) -> ElsewhereToo:
        """Copy the shard there as well."""

    def select(self, kept: torch.Tensor) -> None:
        """Select its rows there as well."""


@dataclass
class KVShard:
    """Keys (after RoPE) and values of some context tokens in consecutive layers.

    `keys[i]` and `values[i]` belong to layer `layer_start + i` and have shape
    (kv_heads, rows, head_dim), on the device of that layer; `context_indices` has shape (rows,),
    int64, ascending. `elsewhere` is set where other ranks hold further heads of the same rows.
    """

    layer_start: int
    context_indices: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    elsewhere: ElsewhereToo | None = None

    @property
    def layer_end(self) -> int:
        return self.layer_start + len(self.keys)

    @property
    def nbytes(self) -> int:
        return self.context_indices.nbytes + sum(t.nbytes for t in (*self.keys, *self.values))

    def copy(self) -> KVShard:
        """A copy that shares the tensors: who works on it and fails leaves this one whole."""
        elsewhere = None if self.elsewhere is None else self.elsewhere.copy()
        return replace(self, keys=list(self.keys), values=list(self.values), elsewhere=elsewhere)

    def select_(self, kept: torch.Tensor) -> KVShard:
        """Drop the rows whose context index is not in `kept`, layer by layer, in place."""
        rows = rows_of(self.context_indices, kept)
        if len(rows) < len(self.context_indices):
            for tensors in (self.keys, self.values):
                for i, tensor in enumerate(tensors):
                    tensors[i] = tensor.index_select(1, rows.to(tensor.device))
            self.context_indices = self.context_indices[rows]
        return self

    def layer(self, layer: int) -> LayerKV:
        """Keys and values of `layer`."""
        return self.keys[layer - self.layer_start], self.values[layer - self.layer_start]


def join_shards(shards: Sequence[KVShard]) -> list[KVShard]:
    """Put together the shards that cover the same layers, or follow each other for the same rows.

    Consumes its input: tensors move layer by layer, so that both copies never exist in full.
    """
    side_by_side: dict[tuple[int, int], KVShard] = {}
    for shard in shards:
        mine = side_by_side.setdefault((shard.layer_start, shard.layer_end), shard)
        if mine is not shard:
            for ours, theirs in ((mine.keys, shard.keys), (mine.values, shard.values)):
                for i in range(len(ours)):
                    ours[i] = torch.cat((ours[i], theirs[i]), dim=1)
                theirs.clear()
            mine.context_indices = torch.cat((mine.context_indices, shard.context_indices))
    joined: list[KVShard] = []
    for shard in sorted(side_by_side.values(), key=lambda s: s.layer_start):
        below = next((s for s in joined if _continues(s, shard)), None)
        if below is None:
            joined.append(shard)
        else:
            below.keys += shard.keys
            below.values += shard.values
    return joined


def _continues(below: KVShard, above: KVShard) -> bool:
    return below.layer_end == above.layer_start and torch.equal(
        below.context_indices, above.context_indices
    )


@dataclass
class NodeState:
    """The state of a finished node.

    Attributes
    ----------
    node : NodeId
    hidden : torch.Tensor of shape (rows + suffix_len, hidden_size)
        Input of the parent's first layer. A root has no parent and keeps only its last row.
    position_ids : torch.Tensor of shape (rows + suffix_len,), int64
    context_indices : torch.Tensor of shape (rows,), int64
        Ascending original indices of the surviving context tokens.
    suffix_kv : list of (keys, values), each of shape (kv_heads, suffix_len, head_dim), or None
        For each layer so far, where the root uses the suffix's averaged states; else None.
    shards : list of KVShard
        The KV rows that live in this process.
    elsewhere : ElsewhereToo or None
        Set where other ranks have the state too, with their own heads of `suffix_kv`.
    """

    node: NodeId
    hidden: torch.Tensor
    position_ids: torch.Tensor
    context_indices: torch.Tensor
    suffix_kv: list[LayerKV] | None = None
    shards: list[KVShard] = field(default_factory=list)
    elsewhere: ElsewhereToo | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, shards left out."""
        tensors = [self.hidden, self.position_ids, self.context_indices]
        for keys, values in self.suffix_kv or ():
            tensors += [keys, values]
        return sum(t.nbytes for t in tensors)

    def without_shards(self) -> NodeState:
        """What a parent on another machine needs."""
        return replace(self, shards=[])
