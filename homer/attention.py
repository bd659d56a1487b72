"""The attention function through which Homer drives transformers' own layers.

Registered with transformers as `homer_<implementation>`. Outside a `LayerPass` it is that
implementation. Inside one, set for the running thread only, the pass says what attention does: a
`NodePass` attends causally by slot order, keeps the keys and values, and yields the last query's
scores in the layer that prunes. Knows nothing about plans or trees.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from homer.errors import ModelError
from homer.state import LayerKV

_PREFIX = "homer_"
_active: ContextVar[LayerPass | None] = ContextVar("homer_layer_pass", default=None)


class LayerPass:
    """One run of some tokens through some layers, for the thread that entered it.

    `LayerStack.run` sets the first three. `rows` are those that go on through the MLP of the layer
    at hand and out of it, or None for all.
    """

    tokens: int = 0
    layer: int = 0
    is_last_layer: bool = False
    rows: torch.Tensor | None = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of one layer.

        `query` has shape (1, heads, tokens, head_dim), `key` and `value` fewer heads where they are
        grouped, the result (1, tokens, heads, head_dim).
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._token = _active.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active.reset(self._token)


@dataclass
class NodePass(LayerPass):
    """The run of a node: causal attention over past rows and its own, by slot order.

    Parameters
    ----------
    past : callable from a layer number to (keys, values), or None
        Rows that come before the node's own, each of shape (kv_heads, past, head_dim).
    choose_rows : callable, or None
        In the last layer: from the scores of shape (tokens,) of the last token's query against
        every token's key, to the rows (ascending int64) that go on through the MLP and out of the
        layer.
    on_scores : callable, or None
        Called with (layer, scores) in every layer; for calibration.
    keep_kv : bool
        Whether to keep each layer's keys and values in `kv`.
    """

    past: Callable[[int], LayerKV] | None = None
    choose_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    on_scores: Callable[[int, torch.Tensor], None] | None = None
    keep_kv: bool = True
    kv: list[LayerKV] = field(default_factory=list)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if self.keep_kv:
            self.kv.append((key[0], value[0]))
        prunes = self.is_last_layer and self.choose_rows is not None
        if prunes or self.on_scores is not None:
            scores = last_query_scores(query, key, scaling)
            if self.on_scores is not None:
                self.on_scores(self.layer, scores)
            if prunes and self.choose_rows is not None:
                self.rows = self.choose_rows(scores)
        if self.past is not None:
            past_key, past_value = self.past(self.layer)
            key = torch.cat((past_key[None], key), dim=2)
            value = torch.cat((past_value[None], value), dim=2)
        return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous()


def last_query_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Largest scaled logit over the heads of the last query against each key, shape (tokens,).

    Raw logits after RoPE, no softmax, in float32 (paper, section 3.2). Grouped queries use their
    group's key.
    """
    kv_heads, head_dim = key.shape[1], key.shape[3]
    last = query[0, :, -1].float().view(kv_heads, -1, head_dim)
    return (torch.matmul(last, key[0].float().transpose(1, 2)) * scaling).amax(dim=(0, 1))


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention where query i sees the keys up to `past + i`, by slot order.

    `query` has shape (1, heads, tokens, head_dim), `key` and `value` (1, kv_heads, past + tokens,
    head_dim).
    """
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if past > tokens:
        mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=query.device).tril(past)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
    # A few idle queries in front make it plain causal attention, which has the fast kernels.
    query = F.pad(query, (0, 0, past, 0)) if past else query
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out[:, :, past:]


def install(model: Any) -> None:
    """Switch `model` to the registered function that wraps the attention it was loaded with."""
    current: str = model.config._attn_implementation
    if current.startswith(_PREFIX):
        return
    # The eager function lives in each model's own file; sdpa is the same attention.
    plain = "sdpa" if current == "eager" else current
    if plain not in ALL_ATTENTION_FUNCTIONS:
        raise ModelError(f"unknown attention implementation {plain!r}; load the model with 'sdpa'")
    name = _PREFIX + plain
    plain_attention = ALL_ATTENTION_FUNCTIONS[plain]

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer_pass = _active.get()
        if layer_pass is None:
            return plain_attention(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return layer_pass.attend(query, key, value, scale), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    model.set_attn_implementation(name)


def run_mlp_on_kept_rows(mlp: torch.nn.Module) -> None:
    """Hook a layer's MLP: where a `LayerPass` has chosen rows, only those go through it.

    The MLP works on each token alone, so the surviving rows get the same numbers as if nothing had
    been skipped; the others are dropped when the layer returns.
    """

    def before(
        _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        layer_pass = _active.get()
        if layer_pass is None or layer_pass.rows is None:
            return None
        return (args[0].index_select(1, layer_pass.rows), *args[1:])

    def after(
        _: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> torch.Tensor | None:
        layer_pass = _active.get()
        if layer_pass is None or layer_pass.rows is None:
            return None
        full = out.new_zeros(out.shape[0], layer_pass.tokens, out.shape[2])
        return full.index_copy_(1, layer_pass.rows, out)

    mlp.register_forward_pre_hook(before)
    mlp.register_forward_hook(after)
