"""The algorithm once more, written out slowly in float64 from its description, for any family.

Shares no code with `homer`: attention, windows, merging, pruning and the paper's plan stand here
in the plainest form that they have; other plans are given in numbers. Of transformers it uses the
weights and the modules that work on each token alone (projections, norms, MLPs, embedding, output
head); what lies between them comes from `descriptions`, rotations from `rotations`.
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


@dataclass(frozen=True)
class Node:
    """A node of a plan: the layers it runs, the context tokens it keeps at most, what is below it.

    `below` is a leaf's span of the context, or the nodes that are merged.
    """

    layers: range
    keep: int
    below: tuple[int, int] | list[Node]

    @property
    def longest_leaf(self) -> int:
        if isinstance(self.below, tuple):
            return self.below[1] - self.below[0]
        return max(node.longest_leaf for node in self.below)


def paper_plan(
    affix_len: int, context_len: int, depth: int, *, chunk: int, target: int, warmup: int
) -> Node:
    """The plan of the paper, for a context that takes more than one chunk."""
    room = chunk - affix_len
    height = math.ceil(math.log2(math.ceil(context_len / room)))
    leaf_len = math.ceil(context_len / 2**height)
    spans = [(i * leaf_len, min((i + 1) * leaf_len, context_len)) for i in range(2**height)]
    per_node, left_over = divmod(depth - warmup, height + 1)

    def build(level: int, index: int, keep: int) -> Node:
        end = warmup + left_over + per_node * (level + 1)
        if level == 0:
            return Node(range(end), keep, spans[index])
        first, last = spans[(2 * index + 1) * 2 ** (level - 1)]
        right = min(last - first, room // 2)
        left = room - right if right < room // 2 else room // 2
        children = [build(level - 1, 2 * index + i, kept) for i, kept in enumerate((left, right))]
        return Node(range(end - per_node, end), keep, children)

    return build(height, 0, target - affix_len)


class Reference:
    def __init__(self, model: Any, description: Description) -> None:
        self.model, self.about = model, description
        base = model.get_decoder()
        self.base = base.model if not hasattr(base, "layers") else base
        self.config = self.base.config
        self.score_kind = "max_logit"
        self.prefix_len = self.suffix_len = 0

    def embed(self, ids: list[int]) -> Tensor:
        table = self.model.get_input_embeddings()
        return self.about.embed(self.config, table(torch.tensor(ids)))

    def logits(self, hidden: Tensor) -> Tensor:
        normed = getattr(self.base, self.about.norm)(hidden)
        return self.about.logits(self.config, self.model.get_output_embeddings()(normed))

    def sees(self, layer: int, queries: list[int], keys: list[int]) -> Tensor:
        """What the layer's window lets positions see of others: (queries, keys)."""
        config = self.config
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        kind = kinds[layer] if kinds else "sliding_attention"
        query, key = torch.tensor(queries)[:, None], torch.tensor(keys)
        if kind == "sliding_attention" and window is not None:
            return (query - key).abs() < window
        if kind == "chunked_attention":
            size = config.attention_chunk_size
            return query // size == key // size
        return torch.ones(len(queries), len(keys), dtype=torch.bool)

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
    ) -> tuple[Tensor, Rows, Rows]:
        """Hidden states after the layer, its new rows, the raw logits of the new keys and these."""
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
            kept.extend([new, (logits[:, :, first:], key[:, first:])])
            cap = about.softcap and getattr(config, about.softcap)
            if cap:
                logits = cap * torch.tanh(logits / cap)
            seen = self.sees(layer, positions, past_positions + positions).tril(first)
            logits = logits.masked_fill(~seen, -math.inf)
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
        """Scores of a node's keys from the logits of all its queries: (heads, tokens, tokens)."""
        tokens = logits.shape[-1]
        if self.score_kind == "max_logit":
            return logits[:, -1].amax(0)
        if self.score_kind == "key_norm":
            return -(key**2).sum(-1).sqrt().mean(0)
        if self.score_kind == "random":
            count = tokens - self.prefix_len
            drawn = torch.rand(
                count, generator=torch.Generator().manual_seed(count), dtype=torch.float32
            )
            return torch.cat((torch.zeros(self.prefix_len), drawn))
        weights = logits.exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        if self.score_kind == "softmax_mean":
            return weights[:, -1].mean(0)
        scores = weights[:, -self.suffix_len :].mean(dim=(0, 1)).tolist()
        before = tokens - self.suffix_len
        near = [scores[max(0, i - 3) : min(before, i + 4)] for i in range(before)]
        return torch.tensor([sum(some) / len(some) for some in near] + scores[before:])

    def run_node(self, state: State, node: Node, span: int, bias: Tensor | None) -> State:
        """Run a node's layers over prefix, context and suffix, then prune the context."""
        prefix_len, suffix_len = self.prefix_len, self.suffix_len
        seen: dict[int, Rows] = {}
        for layer in node.layers:
            state.hidden, new, seen[layer] = self.run_layer(
                layer, state.hidden, state.positions, None, [], span
            )
            state.cache.append(new)
        count = len(state.indices)
        if node.keep >= count:
            return state
        # The last layer whose last query sees the whole chunk; where there is none, the last layer.
        whole = [layer for layer in node.layers if self.sees(layer, [span - 1], [prefix_len])]
        judge = (whole or node.layers)[-1]
        score = self.score(*seen[judge])
        if bias is not None:
            last = state.positions[-1]
            score = score - bias[judge][[last - position for position in state.positions]]
        context = score[prefix_len : prefix_len + count].tolist()
        kept = sorted(sorted(range(count), key=lambda i: (-context[i], i))[: node.keep])
        rows = [
            *range(prefix_len),
            *(prefix_len + i for i in kept),
            *range(prefix_len + count, prefix_len + count + suffix_len),
        ]
        return State(
            state.hidden[rows],
            [state.positions[row] for row in rows],
            [state.indices[i] for i in kept],
            [(key[:, rows], value[:, rows]) for key, value in state.cache],
        )

    def merge(self, children: list[State]) -> State:
        prefix_len, suffix_len = self.prefix_len, self.suffix_len

        def join(parts: list[Tensor], dim: int) -> Tensor:
            def cut(x: Tensor) -> tuple[Tensor, ...]:
                middle = x.shape[dim] - prefix_len - suffix_len
                return x.split([prefix_len, middle, suffix_len], dim=dim)

            prefixes, contexts, suffixes = zip(*map(cut, parts), strict=True)
            prefix, suffix = (sum(x[1:], x[0]) / len(x) for x in (prefixes, suffixes))
            return torch.cat((prefix, *contexts, suffix), dim=dim)

        first, last = children[0].positions[:prefix_len], children[-1].positions[-suffix_len:]
        contexts = [position for c in children for position in c.positions[prefix_len:-suffix_len]]
        layers = zip(*(child.cache for child in children), strict=True)
        return State(
            join([child.hidden for child in children], 0),
            first + contexts + last,
            [index for child in children for index in child.indices],
            [(join([k for k, _ in rows], 1), join([v for _, v in rows], 1)) for rows in layers],
        )

    def compress(
        self,
        prefix: list[int],
        context: list[int],
        suffix: list[int],
        *,
        plan: Node,
        refresh: bool,
        score: str = "max_logit",
        bias: Tensor | None = None,
    ) -> tuple[State, Tensor, int]:
        """The final state, the logits after it, and the next position."""
        self.prefix_len, self.suffix_len, self.score_kind = len(prefix), len(suffix), score
        suffix_start = len(prefix) + plan.longest_leaf
        span = suffix_start + len(suffix)

        def run(node: Node) -> State:
            if isinstance(node.below, tuple):
                first, end = node.below
                state = State(
                    self.embed(prefix + context[first:end] + suffix),
                    [*range(len(prefix) + end - first), *range(suffix_start, span)],
                    list(range(first, end)),
                )
            else:
                state = self.merge([run(child) for child in node.below])
            return self.run_node(state, node, span, bias)

        state = run(plan)
        logits = self.logits(state.hidden[-1:])[0]
        if refresh:
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
