"""The compressed context: what any number of answers are generated from.

Knows nothing about trees, machines, or how it was put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import DynamicCache

from homer.state import LayerKV


class KVRows(NamedTuple):
    """Rows of one layer: indices (rows,), keys and values (kv_heads, rows, head_dim)."""

    context_indices: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class CompressedContext:
    """A prompt, compressed to one cache from which any number of answers can be generated.

    Attributes
    ----------
    context_indices : torch.Tensor of shape (kept,), int64
        Original context index of each surviving context token, in cache order (ascending).
    position_ids : torch.Tensor of shape (prefix + kept + suffix,), int64
        Positions in cache order. They restart between chunks.
    next_position : int
        Position of the first generated token: the last suffix position + 1.
    logits : torch.Tensor of shape (vocab,), float32
        Prediction after the last suffix token.
    buffers : list of (keys, values), each (heads, prefix + kept + suffix + room, numbers)
        The rows of each layer, keys after RoPE, and room behind them for those of as many generated
        tokens, which one answer at a time may use.
    """

    context_indices: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    logits: torch.Tensor
    buffers: list[LayerKV]

    @property
    def layers(self) -> list[LayerKV]:
        """Keys and values of each layer, of shape (heads, prefix + kept + suffix, numbers)."""
        rows = self.cache_len
        return [(keys[:, :rows], values[:, :rows]) for keys, values in self.buffers]

    @property
    def past_key_values(self) -> DynamicCache:
        """A fresh transformers cache over these rows; appending to it changes nothing here."""
        return DynamicCache([(keys[None], values[None]) for keys, values in self.layers])

    @property
    def cache_len(self) -> int:
        """Tokens in the cache."""
        return len(self.position_ids)

    @property
    def room_tokens(self) -> int:
        """Generated tokens that fit behind the rows."""
        return self.buffers[0][0].shape[1] - self.cache_len

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, and of the room behind them."""
        return sum(tensor.nbytes for buffer in self.buffers for tensor in buffer)
