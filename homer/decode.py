"""Decodes several answers at once, a token each per step.

The tokens of all answers run through the layers together, so that weights are read once a step; in
attention each sees its own cache alone. Answers join and leave between steps. Knows nothing about
how tokens are chosen, or about how contexts were compressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from homer.attention import LayerPass
from homer.context import CompressedContext
from homer.stack import LayerStack


class DecodeCache:
    """One answer's cache: a copy of a context's rows, with room for `max_new_tokens` more."""

    def __init__(self, context: CompressedContext, max_new_tokens: int) -> None:
        self.length = context.cache_len
        self.next_position = context.next_position
        self._keys = [_with_room(keys, max_new_tokens) for keys, _ in context.layers]
        self._values = [_with_room(values, max_new_tokens) for _, values in context.layers]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's rows, (kv_heads, head_dim) each, to `layer`; all its rows so far."""
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length] = key
        values[:, self.length] = value
        return keys[:, : self.length + 1], values[:, : self.length + 1]


class _DecodePass(LayerPass):
    def __init__(self, caches: Sequence[DecodeCache]) -> None:
        self._caches = caches

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        out = []
        for slot, cache in enumerate(self._caches):
            keys, values = cache.append(self.layer, key[0, :, slot], value[0, :, slot])
            own = query[:, :, slot : slot + 1]
            out.append(
                F.scaled_dot_product_attention(
                    own, keys[None], values[None], scale=scaling, enable_gqa=grouped
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2).contiguous()


@torch.inference_mode()
def decode_step(
    stack: LayerStack, tokens: Sequence[int], caches: Sequence[DecodeCache]
) -> torch.Tensor:
    """Append one token to each cache; logits of shape (answers, vocab), float32."""
    ids = torch.tensor(tokens, device=stack.device)
    positions = torch.tensor([cache.next_position for cache in caches], device=stack.device)
    layers = range(stack.num_layers)
    hidden = stack.run(stack.embed(ids), positions, layers, _DecodePass(caches))
    for cache in caches:
        cache.length += 1
        cache.next_position += 1
    return stack.logits(hidden)


def _with_room(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    kv_heads, rows, head_dim = tensor.shape
    roomy = tensor.new_empty(kv_heads, rows + tokens, head_dim)
    roomy[:, :rows] = tensor
    return roomy
