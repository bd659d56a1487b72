"""The algorithm once more, written out slowly in float64 from its description, for any family.

Shares no code with `homer`: attention, windows, merging, pruning and the paper's plan stand here
in the plainest form that they have. Of transformers it uses the weights and the modules that work
on each token alone (projections, norms, MLPs, embedding, output head); what lies between them comes
from `descriptions`, rotations from `rotations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.homer.families.descriptions import Description
from tests.homer.families.rotations import frequencies, rotate

Rows = tuple[Tensor, Tensor]


def longer(past: Rows, new: Rows) -> Rows:
    return torch.cat((past[0], new[0]), dim=1), torch.cat((past[1], new[1]), dim=1)


@dataclass
class State:
    """A node's tokens: prefix, context, suffix; the cache's rows in every layer so far."""

    hidden: Tensor
    positions: list[int]
    indices: list[int]
    cache: list[Rows] = field(default_factory=list)


class Reference:
    def __init__(self, model: Any, description: Description) -> None:
        self.model, self.about = model, description
        base = model.get_decoder()
        self.base = base.model if not hasattr(base, "layers") else base
        self.config = self.base.config
        self.score_kind = "max_logit"
        self.suffix_len = 0

    def embed(self, ids: list[int]) -> Tensor:
        table = self.model.get_input_embeddings()
        return self.about.embed(self.config, table(torch.tensor(ids)))

    def logits(self, hidden: Tensor) -> Tensor:
        normed = getattr(self.base, self.about.norm)(hidden)
        return self.about.logits(self.config, self.model.get_output_embeddings()(normed))

    def sees(self, layer: int, query: int, key: int) -> bool:
        config = self.config
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        kind = kinds[layer] if kinds else "sliding_attention"
        if kind == "sliding_attention" and window is not None:
            return abs(query - key) < window
        if kind == "chunked_attention":
            return query // config.attention_chunk_size == key // config.attention_chunk_size
        return True

    def angles(self, layer: int, head_dim: int, span: int) -> tuple[Tensor, float]:
        rope = self.config.rope_parameters
        if "rope_type" not in rope:
            rope = rope[self.config.layer_types[layer]]
        return frequencies(self.config, rope, head_dim, span)

    def project(
        self, layer: int, normed: Tensor, positions: list[int], first: int, span: int
    ) -> tuple[Tensor, Rows]:
        """Queries, and the rows that the cache takes, after rotation."""
        about, config = self.about, self.config
        attention = getattr(self.base.layers[layer], about.attention)
        query, key, value = about.projections(attention, normed, config)
        turned_dim = key.shape[-1] if not about.latent else config.qk_rope_head_dim
        if about.rotates(config, layer):
            angles = self.angles(layer, turned_dim, span)
            fixed = query.shape[-1] - turned_dim
            turned = rotate(query[..., fixed:], positions, angles, about.pairs)
            query = torch.cat((query[..., :fixed], turned), dim=-1)
            if about.latent:
                value = rotate(value, positions, angles, about.pairs)
            else:
                key = rotate(key, positions, angles, about.pairs)
        query = about.after_rotation(attention, query, config, layer)
        if not about.latent:
            key = about.after_rotation(attention, key, config, layer)
        slots = [about.query_scale(config, layer, first + i) for i in range(len(positions))]
        return query * torch.tensor(slots, dtype=torch.float64)[:, None], (key, value)

    def keys_and_values(self, layer: int, rows: Rows, heads: int) -> Rows:
        """What the rows of the cache mean, for every query head."""
        if not self.about.latent:
            key, value = (x.repeat_interleave(heads // x.shape[0], dim=0) for x in rows)
            return key, value
        config, attention = self.config, self.base.layers[layer].self_attn
        latent, turned = rows
        both = attention.kv_b_proj(latent[0]).view(len(latent[0]), heads, -1).transpose(0, 1)
        key, value = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return torch.cat((key, turned.expand(heads, -1, -1)), dim=-1), value

    def run_layer(
        self,
        layer: int,
        hidden: Tensor,
        positions: list[int],
        past: Rows | None,
        past_positions: list[int],
        span: int,
    ) -> tuple[Tensor, Rows, Tensor]:
        """Hidden states after the layer, its new rows, the last query's score of each new key."""
        about, config = self.about, self.config
        module = self.base.layers[layer]
        kept: list[Any] = []

        def attend(normed: Tensor) -> Tensor:
            first = len(past_positions)
            query, new = self.project(layer, normed, positions, first, span)
            rows = new if past is None else longer(past, new)
            key, value = self.keys_and_values(layer, rows, len(query))
            head_dim = query.shape[-1]
            logits = query @ key.transpose(1, 2) * about.scale(config, head_dim)
            kept.extend([new, self.score(logits[:, :, first:].clone(), key[:, first:])])
            cap = about.softcap and getattr(config, about.softcap)
            if cap:
                logits = cap * torch.tanh(logits / cap)
            key_positions = past_positions + positions
            for i, query_position in enumerate(positions):
                for j, key_position in enumerate(key_positions):
                    if j > first + i or not self.sees(layer, query_position, key_position):
                        logits[:, i, j] = -math.inf
            sinks = getattr(getattr(module, about.attention), "sinks", None)
            if sinks is not None:
                sink = sinks[:, None, None].expand(-1, len(positions), 1)
                logits = torch.cat((logits, sink), dim=-1)
            weights = torch.softmax(logits, dim=-1)[..., : key.shape[1]]
            out = (weights @ value).transpose(0, 1).flatten(1)
            return getattr(getattr(module, about.attention), about.output)(out)

        hidden = about.layer(module, hidden, attend, config)
        return hidden, kept[0], kept[1]

    def score(self, logits: Tensor, key: Tensor) -> Tensor:
        """Scores of the new keys from the logits of all queries: (heads, tokens, tokens)."""
        tokens = logits.shape[-1]
        if self.score_kind == "max_logit":
            return logits[:, -1].amax(0)
        if self.score_kind == "key_norm":
            return -(key**2).sum(-1).sqrt().mean(0)
        weights = logits.exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        if self.score_kind == "softmax_mean":
            return weights[:, -1].mean(0)
        mean = weights[:, -self.suffix_len :].mean(dim=(0, 1))
        before = tokens - self.suffix_len
        for i in range(before):
            near = range(max(0, i - 3), min(before, i + 4))
            weights[0, 0, i] = sum(mean[j] for j in near) / len(near)
        return torch.cat((weights[0, 0, :before], mean[before:]))

    def whole_view(self, layer: int, first: int, last: int) -> bool:
        return self.sees(layer, last, first)

    def run_node(
        self,
        state: State,
        layers: range,
        prefix_len: int,
        suffix_len: int,
        keep: int,
        span: int,
        bias: Tensor | None,
        compete: tuple[int, int],
    ) -> State:
        """Run layers over prefix, context and suffix, then prune the context to `keep` tokens."""
        scores: dict[int, Tensor] = {}
        for layer in layers:
            state.hidden, new, scores[layer] = self.run_layer(
                layer, state.hidden, state.positions, None, [], span
            )
            state.cache.append(new)
        count = len(state.indices)
        if keep >= count:
            return state
        # The last layer whose last query sees the whole chunk; where there is none, the last layer.
        judging = [layer for layer in layers if self.whole_view(layer, *compete)] or [layers[-1]]
        score = scores[judging[-1]]
        if bias is not None:
            last = state.positions[-1]
            score = score - bias[judging[-1]][[last - position for position in state.positions]]
        context = score[prefix_len : prefix_len + count]
        kept = sorted(sorted(range(count), key=lambda i: (-context[i].item(), i))[:keep])
        rows = [
            *range(prefix_len),
            *(prefix_len + i for i in kept),
            *range(prefix_len + count, len(state.positions)),
        ]
        return State(
            state.hidden[rows],
            [state.positions[row] for row in rows],
            [state.indices[i] for i in kept],
            [(key[:, rows], value[:, rows]) for key, value in state.cache],
        )

    def merge(self, left: State, right: State, prefix_len: int, suffix_len: int) -> State:
        def join(a: Tensor, b: Tensor, dim: int) -> Tensor:
            def cut(x: Tensor) -> tuple[Tensor, ...]:
                middle = x.shape[dim] - prefix_len - suffix_len
                return x.split([prefix_len, middle, suffix_len], dim=dim)

            (p, c, s), (q, d, t) = cut(a), cut(b)
            return torch.cat(((p + q) / 2, c, d, (s + t) / 2), dim=dim)

        end = -suffix_len
        return State(
            join(left.hidden, right.hidden, 0),
            left.positions[:end] + right.positions[prefix_len:],
            left.indices + right.indices,
            [
                (join(a, c, 1), join(b, d, 1))
                for (a, b), (c, d) in zip(left.cache, right.cache, strict=True)
            ],
        )

    def compress(
        self,
        prefix: list[int],
        context: list[int],
        suffix: list[int],
        *,
        chunk: int,
        target: int,
        warmup: int,
        refresh: bool,
        bias: Tensor | None = None,
    ) -> tuple[State, Tensor, int]:
        """The paper's plan. The final state, the logits after it, and the next position."""
        p, n, s, depth = len(prefix), len(context), len(suffix), len(self.base.layers)
        room = chunk - p - s
        height = math.ceil(math.log2(math.ceil(n / room)))
        leaf_len = math.ceil(n / 2**height)
        spans = [(i * leaf_len, min((i + 1) * leaf_len, n)) for i in range(2**height)]
        per_node, left_over = divmod(depth - warmup, height + 1)
        span = p + leaf_len + s
        compete = (p, span - 1)

        def build(level: int, index: int, limit: int) -> State:
            start = 0 if level == 0 else warmup + left_over + per_node * level
            layers = range(start, warmup + left_over + per_node * (level + 1))
            if level == 0:
                first, end = spans[index]
                state = State(
                    self.embed(prefix + context[first:end] + suffix),
                    [
                        *range(p),
                        *range(p, p + end - first),
                        *range(p + leaf_len, p + leaf_len + s),
                    ],
                    list(range(first, end)),
                )
            else:
                right_first = spans[(2 * index + 1) * 2 ** (level - 1)]
                right_len = right_first[1] - right_first[0]
                limits = [p + room // 2 + s] * 2
                if right_len < room // 2:
                    limits = [chunk - right_len, p + s + right_len]
                children = [build(level - 1, 2 * index + i, limits[i]) for i in range(2)]
                state = self.merge(children[0], children[1], p, s)
            return self.run_node(state, layers, p, s, limit - p - s, span, bias, compete)

        state = build(height, 0, min(target, p + s + n))
        logits = self.logits(state.hidden[-1:])[0]
        if refresh and height > 0:
            logits = self.refresh(state, suffix, span)
        return state, logits, span

    def refresh(self, state: State, suffix: list[int], span: int) -> Tensor:
        """Run the suffix once more over what is left; replaces its rows in the cache."""
        cut = len(state.positions) - len(suffix)
        kept = [(key[:, :cut], value[:, :cut]) for key, value in state.cache]
        logits, state.cache = self.run_on(
            suffix, state.positions[cut:], kept, state.positions[:cut], span
        )
        return logits[-1]

    def run_on(
        self,
        ids: list[int],
        positions: list[int],
        cache: list[Rows],
        past_positions: list[int],
        span: int,
    ) -> tuple[Tensor, list[Rows]]:
        """Run tokens through all layers behind a cache; their logits, and the longer cache."""
        hidden, cached = self.embed(ids), []
        for layer, past in enumerate(cache):
            hidden, new, _ = self.run_layer(layer, hidden, positions, past, past_positions, span)
            cached.append(longer(past, new))
        return self.logits(hidden), cached
