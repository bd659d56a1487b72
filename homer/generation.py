"""Decoding from a compressed context. Knows nothing about how it was compressed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import StrEnum
from typing import Any

from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.sampling import SamplingParams, TokenSampler
from homer.stack import LayerStack


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
    stack: LayerStack,
    context: CompressedContext,
    params: SamplingParams,
    should_stop: Callable[[], bool] | None = None,
    forced: Sequence[int] = (),
) -> Generator[int, None, FinishReason]:
    """Yield token ids as they are chosen; the generator's return value says why it ended.

    The first token comes from the context's own logits and costs no model run. An end-of-sequence
    token ends the answer and is not yielded. The first tokens can be `forced`: the sampler draws
    for them as it did when they were chosen, so that the answer goes on as it would have.
    """
    sampler = TokenSampler(params)
    eos = frozenset() if params.ignore_eos else eos_token_ids(stack.model)
    cache = DecodeCache(context, params.max_new_tokens)
    logits = context.logits
    for step in range(params.max_new_tokens):
        if should_stop is not None and should_stop():
            return FinishReason.CANCELLED
        token = sampler.choose(logits, forced[step] if step < len(forced) else None)
        if token in eos:
            return FinishReason.STOP
        yield token
        if step + 1 < params.max_new_tokens:
            logits = decode_step(stack, [token], [cache])[0]
    return FinishReason.LENGTH
