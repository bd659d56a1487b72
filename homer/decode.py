"""Decodes several answers at once, a token each per step.

The tokens of all answers run through the layers together, so that weights are read once a step; in
attention each sees its own cache alone. Answers join and leave between steps. Knows nothing about
how tokens are chosen, or about how contexts were compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from homer.attention import AttentionCall, LayerPass
from homer.context import CompressedContext
from homer.families import Window
from homer.stack import LayerStack
from homer.state import LayerKV


class DecodeCache:
    """One answer's cache: a context's rows, and room behind them for those of generated tokens.

    `buffers` are those of a context, or a copy of them: rows from `length` on are written over.
    """

    def __init__(self, context: CompressedContext, buffers: Sequence[LayerKV]) -> None:
        self.length = context.cache_len
        self.next_position = context.next_position
        self.span = context.next_position
        room = buffers[0][0].shape[1] - self.length
        answer = torch.arange(room, device=context.position_ids.device) + self.span
        self._positions = torch.cat((context.position_ids, answer))
        self.buffers = buffers

    @classmethod
    def over(cls, context: CompressedContext) -> DecodeCache:
        """In the room behind the context's own rows, for one answer at a time."""
        return cls(context, context.buffers)

    @classmethod
    def copy_of(cls, context: CompressedContext, room_tokens: int) -> DecodeCache:
        """In memory of its own: the context stays as it is for other answers."""
        buffers = [
            (_with_room(keys, room_tokens), _with_room(values, room_tokens))
            for keys, values in context.layers
        ]
        return cls(context, buffers)

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's rows, (heads, numbers) each, to `layer`; all its rows so far."""
        keys, values = self.buffers[layer]
        keys[:, self.length] = key
        values[:, self.length] = value
        return keys[:, : self.length + 1], values[:, : self.length + 1]

    def mask(self, window: Window | None, device: torch.device) -> torch.Tensor | None:
        """Which rows the next token sees, of shape (1, rows); None for all of them."""
        if window is None or window.sees_all(self.next_position + 1):
            return None
        return window.sees(self.next_position, self._positions[None, : self.length + 1]).to(device)


class _DecodePass(LayerPass):
    """Takes a token each of several answers through the layers; each sees its own rows."""

    def __init__(self, caches: Sequence[DecodeCache], expands_rows: bool) -> None:
        self._caches = caches
        # Layers that expand the cache's rows have to be given all of them, one after the other.
        self._joins = expands_rows and len(caches) > 1
        self._rows: list[LayerKV] = []

    @property
    def spans(self) -> Sequence[int]:
        return [cache.span for cache in self._caches]

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> LayerKV:
        self._rows = [
            cache.append(self.layer, key[0, :, slot], value[0, :, slot])
            for slot, cache in enumerate(self._caches)
        ]
        if len(self._rows) == 1:
            keys, values = self._rows[0]
            return keys[None], values[None]
        if self._joins:
            all_keys, all_values = zip(*self._rows, strict=True)
            return torch.cat(all_keys, dim=1)[None], torch.cat(all_values, dim=1)[None]
        return key, value

    def get_seq_length(self, *_: Any) -> torch.Tensor:
        """What has to be added to a token's place in this step to get its place in its cache."""
        lengths = [cache.length - slot for slot, cache in enumerate(self._caches)]
        return torch.tensor(lengths, device=self.positions.device)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if len(self._caches) == 1:
            return call.attend(self._caches[0].mask(self.window, call.query.device))
        out = []
        lengths = [cache.length + 1 for cache in self._caches]
        rows = [(keys[None], values[None]) for keys, values in self._rows]
        if self._joins:
            rows = list(
                zip(call.key.split(lengths, dim=2), call.value.split(lengths, dim=2), strict=True)
            )
        for slot, (cache, (keys, values)) in enumerate(zip(self._caches, rows, strict=True)):
            own = call.query[:, :, slot : slot + 1]
            part = replace(call, query=own, key=keys, value=values)
            out.append(part.attend(cache.mask(self.window, own.device)))
        return torch.cat(out, dim=1)


@torch.inference_mode()
def decode_step(
    stack: LayerStack, tokens: Sequence[int], caches: Sequence[DecodeCache]
) -> torch.Tensor:
    """Append one token to each cache; logits of shape (answers, vocab), float32."""
    ids = torch.tensor(tokens, device=stack.device)
    positions = torch.tensor([cache.next_position for cache in caches], device=stack.device)
    layers = range(stack.num_layers)
    layer_pass = _DecodePass(caches, expands_rows=stack.family.latent_cache)
    hidden = stack.run(stack.embed(ids), positions, layers, layer_pass)
    for cache in caches:
        cache.length += 1
        cache.next_position += 1
    return stack.logits(hidden)


def _with_room(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    kv_heads, rows, head_dim = tensor.shape
    roomy = tensor.new_empty(kv_heads, rows + tokens, head_dim)
    roomy[:, :rows] = tensor
    return roomy
