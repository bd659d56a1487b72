"""Rotary frequencies and rotations, written out from their formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def yarn_frequencies(base: Tensor, theta: float, rope: dict[str, Any]) -> tuple[Tensor, float]:
    factor, length, dim = rope["factor"], rope["original_max_position_embeddings"], 2 * len(base)

    def turning(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(rope.get("beta_fast") or 32), turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(len(base)) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp), 0.1 * math.log(factor) + 1


def llama3_frequencies(base: Tensor, rope: dict[str, Any]) -> Tensor:
    length, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    out = []
    for frequency in base.tolist():
        turns = length * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        out.append((1 - smooth) * frequency / rope["factor"] + smooth * frequency)
    return torch.tensor(out, dtype=torch.float64)


def frequencies(
    config: Any, rope: dict[str, Any], head_dim: int, span: int
) -> tuple[Tensor, float]:
    """Frequencies of a prompt of `span` positions, and the factor of sine and cosine."""
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    theta, kind, window = rope["rope_theta"], rope["rope_type"], config.max_position_embeddings
    steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    base = theta**-steps
    match kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / rope["factor"], 1.0
        case "llama3":
            return llama3_frequencies(base, rope), 1.0
        case "yarn":
            return yarn_frequencies(base, theta, rope)
        case "dynamic":
            growth = rope["factor"] * max(span, window) / window - (rope["factor"] - 1)
            return (theta * growth ** (dim / (dim - 2))) ** -steps, 1.0
        case "longrope":
            short = rope["original_max_position_embeddings"]
            factors = rope["long_factor"] if span > short else rope["short_factor"]
            factor = window / short
            attention = math.sqrt(1 + math.log(factor) / math.log(short)) if factor > 1 else 1.0
            return base / torch.tensor(factors, dtype=torch.float64), attention
    raise NotImplementedError(kind)


def rotate(x: Tensor, positions: list[int], angles: tuple[Tensor, float], pairs: str) -> Tensor:
    """Rotate the first numbers of each head; `x` has shape (heads, tokens, head_dim)."""
    steps, factor = angles
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * steps
    cos, sin = angle.cos() * factor, angle.sin() * factor
    turned, rest = x[..., : 2 * len(steps)], x[..., 2 * len(steps) :]
    if pairs == "halves":
        a, b = turned.chunk(2, dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
    a, b = a * cos - b * sin, b * cos + a * sin
    if pairs == "neighbours":
        return torch.cat((torch.stack((a, b), dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((a, b, rest), dim=-1)
