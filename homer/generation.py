"""Answers from compressed contexts, one alone or several together.

Knows nothing about how contexts were compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.sampling import SamplingParams, TokenLogprobs, TokenSampler
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


class Answer:
    """One answer on its way: its cache, its sampler, and when it ends.

    Parameters
    ----------
    stack : LayerStack
    cache : DecodeCache
        With room for `params.max_new_tokens`.
    params : SamplingParams
    forced : sequence of int
        The answer's first tokens where they are known already. The sampler draws for them as it did
        when they were chosen, so that the answer goes on as it would have.
    """

    def __init__(
        self,
        stack: LayerStack,
        cache: DecodeCache,
        params: SamplingParams,
        forced: Sequence[int] = (),
    ) -> None:
        self.cache = cache
        self._sampler = TokenSampler(params)
        self._eos = frozenset() if params.ignore_eos else eos_token_ids(stack.model)
        self._forced = forced

    @property
    def tokens(self) -> list[int]:
        """What was chosen so far."""
        return self._sampler.generated

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of each token that was chosen, where the settings ask for them."""
        return self._sampler.logprobs

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as it may have."""
        return len(self.tokens) >= self._sampler.params.max_new_tokens

    def choose(self, logits: torch.Tensor) -> int | FinishReason:
        """The next token, from `logits` of shape (vocab,), or why there is none.

        An end-of-sequence token ends the answer and is not part of it.
        """
        if self.is_full:
            return FinishReason.LENGTH
        at = len(self.tokens)
        token = self._sampler.choose(logits, self._forced[at] if at < len(self._forced) else None)
        return FinishReason.STOP if token in self._eos else token


DecodeStep = Callable[[Sequence[int], Sequence[DecodeCache]], torch.Tensor]
"""Appends a token to each cache; logits of shape (answers, vocab). `decode_step` over a stack."""


def next_tokens(step: DecodeStep, answers: Sequence[Answer]) -> list[int | FinishReason]:
    """One decode step for all `answers`: the next token of each, or why it ends.

    Each has a token already, and is not full.
    """
    caches = [answer.cache for answer in answers]
    logits = step([answer.tokens[-1] for answer in answers], caches).cpu()
    return [answer.choose(row) for answer, row in zip(answers, logits, strict=True)]


def generate_tokens(
    stack: LayerStack,
    context: CompressedContext,
    params: SamplingParams,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[int, None, FinishReason]:
    """Yield token ids as they are chosen; the generator's return value says why it ended.

    The first token comes from the context's own logits and costs no model run.
    """
    cache = DecodeCache.copy_of(context, params.max_new_tokens)
    answer = Answer(stack, cache, params)
    while True:
        if should_stop is not None and should_stop():
            return FinishReason.CANCELLED
        if not answer.tokens:
            token = answer.choose(context.logits)
        elif answer.is_full:
            return FinishReason.LENGTH
        else:
            (token,) = next_tokens(partial(decode_step, stack), [answer])
        if isinstance(token, FinishReason):
            return token
        yield token
