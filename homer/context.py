"""The compressed context, and how it is put together from KV rows that may arrive layer by layer.

Knows nothing about trees or machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import DynamicCache

from homer.attention import NodePass
from homer.errors import StateError
from homer.stack import LayerStack
from homer.state import KVShard, LayerKV


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
    layers : list of (keys, values)
        For each layer, of shape (kv_heads, prefix + kept + suffix, head_dim), keys after RoPE.
    """

    context_indices: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    logits: torch.Tensor
    layers: list[LayerKV]

    @property
    def past_key_values(self) -> DynamicCache:
        """A fresh transformers cache over these rows; appending to it changes nothing here."""
        return DynamicCache([(keys[None], values[None]) for keys, values in self.layers])

    @property
    def cache_len(self) -> int:
        """Tokens in the cache."""
        return len(self.position_ids)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def assemble(pieces: Sequence[KVRows], wanted: torch.Tensor, layer: int) -> LayerKV:
    """Keys and values of one layer for the context tokens `wanted` (ascending) from `pieces`."""
    if not pieces:
        raise StateError(f"no KV rows of layer {layer} are held anywhere")
    indices = torch.cat([piece.context_indices for piece in pieces])
    order = indices.argsort()
    if not torch.equal(indices[order], wanted):
        raise StateError(
            f"layer {layer} needs the KV rows of {len(wanted)} context tokens, but there "
            f"are {len(indices)} rows that do not match them; the request has to be run again"
        )
    keys = torch.cat([piece.keys for piece in pieces], dim=1)
    values = torch.cat([piece.values for piece in pieces], dim=1)
    if len(pieces) > 1:
        keys, values = keys.index_select(1, order), values.index_select(1, order)
    return keys, values


def refresh(
    stack: LayerStack,
    suffix_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_kv: Sequence[LayerKV] | None,
    context_rows: Callable[[int], LayerKV],
    shards: Sequence[KVShard] = (),
    *,
    span: int,
) -> tuple[list[LayerKV], torch.Tensor]:
    """Run the suffix once more through all layers, over the surviving context.

    Averaging at merges mixes the suffix states of the chunk that holds the answer with those of all
    that don't; after three levels most of it is noise. This replaces them for `suffix_len` tokens
    of work. `positions` are those of the whole cache, `span` the length of the prompt in positions.
    Rows are asked for layer by layer, so that the run goes on behind a gather. `shards` give up
    each layer once it is used.

    Returns
    -------
    layers : list of (keys, values) over prefix, context and suffix
    logits : torch.Tensor of shape (vocab,), float32
    """
    layers: list[LayerKV] = []

    def past(layer: int) -> LayerKV:
        keys, values = context_rows(layer)
        if prefix_kv is not None:
            keys = torch.cat((prefix_kv[layer][0], keys), dim=1)
            values = torch.cat((prefix_kv[layer][1], values), dim=1)
        layers.append((keys, values))
        release_layer(shards, layer)
        return keys, values

    past_len = len(positions) - len(suffix_ids)
    node_pass = NodePass(
        span=span,
        past=past,
        past_positions=positions[:past_len],
        choose_rows=lambda scores: last_row.clone(),
    )
    last_row = torch.tensor([len(suffix_ids) - 1], device=suffix_ids.device)
    hidden = stack.embed(suffix_ids)
    hidden = stack.run(hidden, positions[past_len:], range(stack.num_layers), node_pass)
    for layer, ((keys, values), suffix) in enumerate(zip(layers, node_pass.kv, strict=True)):
        layers[layer] = (torch.cat((keys, suffix[0]), dim=1), torch.cat((values, suffix[1]), dim=1))
    return layers, stack.logits(hidden[-1:])[0]


def release_layer(shards: Sequence[KVShard], layer: int) -> None:
    """Let go of one layer's rows that are now in the cache."""
    for shard in shards:
        if shard.layer_start <= layer < shard.layer_end:
            at = layer - shard.layer_start
            shard.keys[at] = shard.keys[at][:, :0].clone()
            shard.values[at] = shard.values[at][:, :0].clone()
