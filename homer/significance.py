"""Significance: how much each token matters to the question, from queries and keys of one layer.

The lowest go. A new way is a function, and its name in `SCORES` and `homer.config.ScoreKind`; the
setting `score` chooses. Knows nothing about models, plans or calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from homer.config import ScoreKind
from homer.heads import ALL_HEADS, HeadGroup

_OBSERVED_QUERIES = 16
_POOLED_TOKENS = 7


@dataclass(frozen=True)
class Scored:
    """What a layer computes before any softmax, soft cap, sink or window.

    `query` has shape (heads, tokens, head_dim), `key` (kv_heads, past + tokens, head_dim), both
    rotated; logits are their products times `scaling`. The last `suffix_len` tokens are the suffix.
    Where heads are spread over ranks, these are those of this one; `heads` knows the others.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    suffix_len: int
    heads: HeadGroup = ALL_HEADS

    @property
    def own_key(self) -> torch.Tensor:
        """Keys of the tokens that are scored: without past ones."""
        return self.key[:, self.key.shape[1] - self.query.shape[1] :]

    def attention(self, queries: int) -> torch.Tensor:
        """Weights of the last queries, causal by slot order: (heads, queries, past + tokens)."""
        query = self.query[:, -queries:].float()
        key = self.key.float().repeat_interleave(len(query) // len(self.key), dim=0)
        logits = torch.matmul(query, key.transpose(1, 2)) * self.scaling
        rows = key.shape[1]
        seen = torch.ones(queries, rows, dtype=torch.bool, device=key.device).tril(rows - queries)
        return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def max_logit(scored: Scored) -> torch.Tensor:
    """Largest logit over the heads of the last query: raw, no softmax (paper, section 3.2)."""
    key = scored.own_key
    last = scored.query[:, -1].float().view(key.shape[0], -1, key.shape[2])
    logits = torch.matmul(last, key.float().transpose(1, 2)) * scored.scaling
    return scored.heads.max(logits.amax(dim=(0, 1)))


def softmax_mean(scored: Scored) -> torch.Tensor:
    """Attention of the last query, mean over the heads."""
    return scored.heads.mean(scored.attention(1).mean(dim=(0, 1)))


def query_window(scored: Scored) -> torch.Tensor:
    """Attention of the suffix's last queries, mean over them and the heads, and over neighbours.

    As SnapKV does, arXiv 2404.14469.
    """
    observed = min(_OBSERVED_QUERIES, scored.suffix_len)
    scores = scored.heads.mean(scored.attention(observed).mean(dim=(0, 1)))
    before, suffix = scores.tensor_split([len(scores) - scored.suffix_len])
    margin = _POOLED_TOKENS // 2
    pooled = F.avg_pool1d(before[None], _POOLED_TOKENS, 1, margin, count_include_pad=False)
    return torch.cat((pooled[0], suffix))


def key_norm(scored: Scored) -> torch.Tensor:
    """Shortness of the keys, mean over the heads; asks no question (arXiv 2406.11430)."""
    return scored.heads.mean(-scored.own_key.float().norm(dim=-1).mean(dim=0))


def random(scored: Scored) -> torch.Tensor:
    """The control: about nothing, and the same on every machine."""
    tokens = scored.query.shape[1]
    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    return drawn.to(scored.key.device)


SCORES: dict[ScoreKind, Callable[[Scored], torch.Tensor]] = {
    "max_logit": max_logit,
    "softmax_mean": softmax_mean,
    "query_window": query_window,
    "key_norm": key_norm,
    "random": random,
}


def significance(kind: ScoreKind, scored: Scored) -> torch.Tensor:
    """Scores of the layer's own tokens, shape (tokens,), in float32."""
    scores = SCORES[kind](scored)
    return scores[len(scores) - scored.query.shape[1] :]
