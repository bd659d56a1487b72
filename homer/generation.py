"""Decoding from a compressed context. Knows nothing about how it was compressed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import StrEnum
from typing import Any

import torch

from homer.context import CompressedContext
from homer.sampling import SamplingParams, TokenSampler


class FinishReason(StrEnum):
    """Why decoding ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


def eos_token_ids(model: Any) -> frozenset[int]:
    """The model's end-of-sequence token ids: those of its generation config, else of its config."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def generate_tokens(
    model: Any,
    context: CompressedContext,
    params: SamplingParams,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[int, None, FinishReason]:
    """Yield token ids as they are chosen; the generator's return value says why it ended.

    The first token comes from the context's own logits and costs no model run. An end-of-sequence
    token ends the answer and is not yielded.
    """
    sampler = TokenSampler(params)
    eos = frozenset() if params.ignore_eos else eos_token_ids(model)
    cache = context.past_key_values
    logits = context.logits
    for step in range(params.max_new_tokens):
        if should_stop is not None and should_stop():
            return FinishReason.CANCELLED
        token = sampler.choose(logits)
        if token in eos:
            return FinishReason.STOP
        yield token
        if step + 1 < params.max_new_tokens:
            position = context.next_position + step
            logits = forward(model, [token], position, cache)[-1]
    return FinishReason.LENGTH


@torch.inference_mode()
def forward(model: Any, ids: list[int], position: int, cache: Any) -> torch.Tensor:
    """Append `ids` to `cache` from `position` on; logits of shape (len(ids), vocab), float32."""
    device = model.get_input_embeddings().weight.device
    past = cache.get_seq_length()
    out = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.arange(position, position + len(ids), device=device)[None],
        # Without a mask, positions with gaps are taken for packed sequences.
        attention_mask=torch.ones(1, past + len(ids), dtype=torch.int64, device=device),
        past_key_values=cache,
        use_cache=True,
    )
    logits: torch.Tensor = out.logits[0].float()
    return logits
