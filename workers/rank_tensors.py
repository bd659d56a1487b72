"""Tensors between the ranks of a worker: from rank 0 to all, and from all to rank 0.

Every rank makes the same calls in the same order as everything else that its process group does.
Rows of keys and values are split by heads. Knows nothing about commands or what is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from homer.context import KVRows
from homer.heads import HeadGroup
from homer.plan import NodeId
from homer.stack import LayerStack
from homer.state import KVShard, LayerKV, NodeState
from workers.tensor_stream import Spec
from workers.wire import gather_tensors


@dataclass(frozen=True)
class RankTensors:
    """Moves tensors of a model that is split as `stack` is; rank 0 gives what the others get."""

    stack: LayerStack

    @property
    def _heads(self) -> HeadGroup:
        return self.stack.cache_heads

    def share_state(
        self, node: NodeId, rows: int, suffix_len: int, layers: int, state: NodeState | None = None
    ) -> NodeState:
        """A state of `rows` rows that rank 0 gives, with each rank's heads of `layers` layers."""
        stack, suffix = self.stack, None if state is None else state.suffix_kv
        shapes = stack.cache_row.shapes(suffix_len)
        hidden = self._share(
            None if state is None else state.hidden, (rows, stack.hidden_size), stack.dtype
        )
        positions = self._share(None if state is None else state.position_ids, (rows,), torch.int64)
        indices = self._share(
            None if state is None else state.context_indices, (rows - suffix_len,), torch.int64
        )
        suffix_kv = [
            self._share_kv(suffix[layer] if suffix else (None, None), shapes)
            for layer in range(layers)
        ]
        return NodeState(node, hidden, positions, indices, suffix_kv or None)

    def share_rows(self, counts: Sequence[int], pieces: Sequence[KVRows] = ()) -> list[KVRows]:
        """Rows of one layer that rank 0 gives, in pieces of so many; with each rank's heads."""
        out = []
        for number, count in enumerate(counts):
            indices, *kv = pieces[number] if pieces else (None, None, None)
            shapes = self.stack.cache_row.shapes(count)
            own = self._share(indices, (count,), torch.int64)
            out.append(KVRows(own, *self._share_kv((kv[0], kv[1]), shapes)))
        return out

    def collect_rows(
        self, shards: Sequence[KVShard], kept: torch.Tensor
    ) -> tuple[list[Spec], list[torch.Tensor]]:
        """What `gather_tensors` gives; on rank 0 with all heads, and in main memory."""
        specs, tensors = gather_tensors(shards, kept, self.stack)
        out = []
        for spec, tensor in zip(specs, tensors, strict=True):
            whole = tensor if spec.name.startswith("indices") else self._collect(tensor, spec.shape)
            out.append(whole.cpu())
        return specs, out

    def collect_kv(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Keys and values of some layers; on rank 0 with all heads."""
        out = []
        for keys, values in layers:
            shapes = self.stack.cache_row.shapes(keys.shape[1])
            out.append((self._collect(keys, shapes[0]), self._collect(values, shapes[1])))
        return out

    def _share(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=self.stack.device)
        tensor = tensor.to(dtype).contiguous()
        if tensor.numel():
            distributed.broadcast(_bytes(tensor), 0)
        return tensor

    def _share_kv(
        self,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
    ) -> LayerKV:
        keys, values = (
            self._share_heads(tensor, shape) for tensor, shape in zip(given, shapes, strict=True)
        )
        return keys, values

    def _share_heads(self, whole: torch.Tensor | None, shape: tuple[int, int, int]) -> torch.Tensor:
        parts = self._heads.size
        if parts == 1:
            return self._share(whole, shape, self.stack.dtype)
        own = torch.empty(
            (shape[0] // parts, *shape[1:]), dtype=self.stack.dtype, device=self.stack.device
        )
        given = None
        if whole is not None:
            given = [_bytes(part.contiguous()) for part in whole.to(own).chunk(parts)]
        if own.numel():
            distributed.scatter(_bytes(own), given, 0)
        return own

    def _collect(self, own: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The rows of all heads on rank 0; on others what they gave."""
        parts = self._heads.size
        if parts == 1:
            return own
        if not own.numel():
            return own.new_empty(shape)
        own, whole, pieces = own.contiguous(), own, None
        if self._heads.rank == 0:
            whole = own.new_empty(shape)
            pieces = [_bytes(part) for part in whole.chunk(parts)]
        distributed.gather(_bytes(own), pieces, 0)
        return whole


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, which every backend moves, whatever it computes with."""
    return tensor.view(torch.uint8)
