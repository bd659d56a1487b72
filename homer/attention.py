"""The attention function through which Homer drives transformers' own layers.

Registered with transformers as `homer_<implementation>`, for flash attention in its own place.
Outside a `LayerPass` it is that implementation. Inside one, set for the running thread only, the
pass is the layers' cache and says what attention does: a `NodePass` attends causally by slot order,
keeps the cache's rows, and yields the last query's scores for the layer that prunes. Knows nothing
about plans or trees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from homer.config import ScoreKind
from homer.errors import ModelError
from homer.families import Window
from homer.flash import FlashAttention, is_flash
from homer.heads import ALL_HEADS, HeadGroup
from homer.significance import Scored, significance
from homer.state import LayerKV

_PREFIX = "homer_"
_EAGER_LOGITS = 1 << 26
_active: ContextVar[LayerPass | None] = ContextVar("homer_layer_pass", default=None)


@dataclass(frozen=True)
class AttentionCall:
    """What a layer hands to its attention function.

    `query` has shape (1, heads, tokens, head_dim), `key` and `value` (1, kv_heads, rows, head_dim),
    past rows included. `extra` holds what only some families have: a soft cap on the logits, an
    attention sink. `flash` is the flash attention that the model was loaded with, if any.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    extra: dict[str, Any]
    flash: FlashAttention | None = None

    def attend(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention, causal by slot order, or where `mask` of shape (tokens, rows) is true.

        Flash attention knows no masks: these are left to the others. Returns a tensor of shape (1,
        tokens, heads, head_dim).
        """
        if mask is None and self.flash is not None and self.flash.takes >= self.extra.keys():
            states = self.query, self.key, self.value
            return self.flash.attend(self.module, states, self.scaling, self.extra)
        if self.extra:
            return self._attend_as_family(mask)
        if mask is None:
            out = _causal_attention(self.query, self.key, self.value, self.scaling)
            return out.transpose(1, 2).contiguous()
        masked = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = masked(
            self.module, self.query, self.key, self.value, mask[None, None], scaling=self.scaling
        )
        return out

    def _attend_as_family(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The family's own eager function, some queries at a time: it makes all their logits."""
        query, rows = self.query, self.key.shape[2]
        tokens = query.shape[2]
        if mask is None:
            mask = causal_mask(tokens, rows, query.device)
        lowest = torch.finfo(query.dtype).min
        out = []
        step = max(1, _EAGER_LOGITS // (query.shape[1] * rows))
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            added = torch.zeros_like(mask[part], dtype=query.dtype).masked_fill_(
                ~mask[part], lowest
            )
            out.append(
                _eager_function(self.module)(
                    self.module,
                    query[:, :, part],
                    self.key,
                    self.value,
                    added[None, None],
                    scaling=self.scaling,
                    **self.extra,
                )[0]
            )
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


class LayerPass:
    """One run of some tokens through some layers, for the thread that entered it.

    It takes the place of the layers' cache. `LayerStack.run` sets all but the last, `positions` on
    the device of the layer at hand. `rows` are those that go on through the MLP of that layer and
    out of it, or None for all.
    """

    positions: torch.Tensor
    layer: int = 0
    is_last_layer: bool = False
    window: Window | None = None
    heads: HeadGroup = ALL_HEADS
    rows: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.positions)

    @property
    def spans(self) -> Sequence[int]:
        """Length of the prompt in positions: one for all tokens, or one for each."""
        raise NotImplementedError

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> LayerKV:
        """Take new rows of shape (1, heads, tokens, numbers); all rows of the layer so far."""
        raise NotImplementedError

    def get_seq_length(self, *_: Any) -> int | torch.Tensor:
        """Rows of this layer before the new ones."""
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of one layer, of shape (1, tokens, heads, head_dim)."""
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
    span : int
        Length of the whole prompt in positions.
    past : callable from a layer number to (keys, values), or None
        Rows that come before the node's own, each of shape (heads, past, numbers). Called once for
        each layer.
    past_positions : torch.Tensor of shape (past,), or None
        Their positions.
    end : int, optional
        All positions of queries and keys are below; by default `span`.
    choose_rows : callable, or None
        In the last layer: from the scores of shape (tokens,) of the last token's query against
        every token's key, to the rows (ascending int64) that go on through the MLP and out of the
        layer.
    score_layer : int, optional
        The layer that the scores come from; by default the last one.
    score, suffix_len
        How tokens are scored, and how many of the last ones are the suffix.
    on_scores : callable, or None
        Called with (layer, scores) in every layer; for calibration.
    keep_kv : bool
        Whether to keep each layer's new rows in `kv`.
    """

    span: int
    past: Callable[[int], LayerKV] | None = None
    past_positions: torch.Tensor | None = None
    end: int | None = None
    choose_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    score_layer: int | None = None
    score: ScoreKind = "max_logit"
    suffix_len: int = 1
    on_scores: Callable[[int, torch.Tensor], None] | None = None
    keep_kv: bool = True
    kv: list[LayerKV] = field(default_factory=list)
    _past_rows: tuple[int, LayerKV] | None = None
    _scores: torch.Tensor | None = None
    _masks: dict[tuple[Window, torch.device], torch.Tensor] = field(default_factory=dict)

    @property
    def spans(self) -> Sequence[int]:
        return (self.span,)

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> LayerKV:
        if self.keep_kv:
            self.kv.append((key[0], value[0]))
        if self.past is None:
            return key, value
        past_key, past_value = self._past()
        return torch.cat((past_key[None], key), dim=2), torch.cat((past_value[None], value), dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.past is None else self._past()[0].shape[1]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        prunes = self.choose_rows is not None
        decides = self.layer == self.score_layer or (self.is_last_layer and self._scores is None)
        if self.on_scores is not None or (prunes and decides):
            scored = Scored(call.query[0], call.key[0], call.scaling, self.suffix_len, self.heads)
            self._scores = significance(self.score, scored)
            if self.on_scores is not None:
                self.on_scores(self.layer, self._scores)
        if self.is_last_layer and self.choose_rows is not None and self._scores is not None:
            self.rows = self.choose_rows(self._scores).to(call.query.device)
        return call.attend(self._mask(call.key.shape[2]))

    def _past(self) -> LayerKV:
        if self._past_rows is None or self._past_rows[0] != self.layer:
            assert self.past is not None
            self._past_rows = (self.layer, self.past(self.layer))
        return self._past_rows[1]

    def _mask(self, rows: int) -> torch.Tensor | None:
        window = self.window
        if window is None or window.sees_all(self.span if self.end is None else self.end):
            return None
        kind = window, self.positions.device
        if kind not in self._masks:
            keys = self.positions
            if self.past is not None and self.past_positions is not None:
                keys = torch.cat((self.past_positions.to(keys.device), keys))
            seen = window.sees(self.positions[:, None], keys[None])
            self._masks[kind] = seen & causal_mask(self.tokens, rows, keys.device)
        return self._masks[kind]


def causal_mask(tokens: int, rows: int, device: torch.device) -> torch.Tensor:
    """True where query i sees key j, by slot order; the queries are the last rows."""
    return torch.ones(tokens, rows, dtype=torch.bool, device=device).tril(rows - tokens)


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention where query i sees the keys up to `past + i`, by slot order."""
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if tokens == 1:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
    if past > tokens:
        mask = causal_mask(tokens, past + tokens, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
    # A few idle queries in front make it plain causal attention, which has the fast kernels.
    query = F.pad(query, (0, 0, past, 0)) if past else query
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out[:, :, past:]


def _eager_function(module: torch.nn.Module) -> Callable[..., Any]:
    """The plain attention of a layer's family; it lives in the family's own file."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(
            f"{type(module).__name__} has no eager attention function beside it; load the model "
            f"with attn_implementation='sdpa'"
        )
    return function


@dataclass(frozen=True)
class _Attention:
    """What layers call: `function`, or in a `LayerPass` what that has in its place.

    Without a function it is the family's own eager one.
    """

    function: Callable[..., Any] | None
    flash: FlashAttention | None = None

    def __call__(
        self,
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
            function = self.function or _eager_function(module)
            if scaling is not None:
                kwargs["scaling"] = scaling
            return function(module, query, key, value, attention_mask, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        extra = _extra(module, kwargs)
        call = AttentionCall(module, query, key, value, scale, extra, self.flash)
        return layer_pass.attend(call), None


def install(model: Any) -> None:
    """Switch `model` to the registered function that wraps the attention it was loaded with."""
    plain: str = model.config._attn_implementation
    if plain.startswith(_PREFIX):
        return
    if plain != "eager" and plain not in ALL_ATTENTION_FUNCTIONS:
        raise ModelError(f"unknown attention implementation {plain!r}; load the model with 'sdpa'")
    function = None if plain == "eager" else ALL_ATTENTION_FUNCTIONS[plain]
    if isinstance(function, _Attention):
        return
    if function is not None and is_flash(plain):
        # transformers goes by this name wherever it calls the package, so it has to stay.
        flash = FlashAttention.of(plain, function)
        AttentionInterface.register(plain, _Attention(function, flash))
        return
    name = _PREFIX + plain
    AttentionInterface.register(name, _Attention(function))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    model.set_attn_implementation(name)


_WITHOUT_EFFECT = frozenset(
    # What a pass decides itself, and what does nothing in inference.
    ("dropout", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions")
)
_AS_FAMILY = frozenset(("softcap", "s_aux"))


def _extra(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that only the family's own attention understands."""
    extra = {k: v for k, v in kwargs.items() if v is not None and k not in _WITHOUT_EFFECT}
    if unknown := extra.keys() - _AS_FAMILY:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which "
            f"Homer does not know"
        )
    return extra


def run_on_kept_rows(module: torch.nn.Module) -> None:
    """Hook a module that works on each token alone: only the rows that a `LayerPass` chose go in.

    The surviving rows get the same numbers as if nothing had been skipped; the others are dropped
    when the layer returns. In layers whose attention and MLP read the same input this holds too, as
    attention is called first. A mixture of experts returns routing statistics as well; nobody reads
    them.
    """

    def before(
        _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        layer_pass = _active.get()
        if layer_pass is None or layer_pass.rows is None:
            return None
        return (args[0].index_select(1, layer_pass.rows), *args[1:])

    def after(_: torch.nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> Any:
        layer_pass = _active.get()
        if layer_pass is None or layer_pass.rows is None:
            return None
        kept, *rest = out if isinstance(out, tuple) else (out,)
        full = kept.new_zeros(*kept.shape[:-2], layer_pass.tokens, kept.shape[-1])
        full.index_copy_(-2, layer_pass.rows, kept)
        return (full, *rest) if rest else full

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
