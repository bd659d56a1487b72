"""How the next token is chosen. Knows nothing about models, caches or merging."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from homer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings by their usual names; the defaults are greedy decoding.

    `repetition_penalty` counts generated tokens, not the prompt. With `logprobs` each token's
    log-probability is kept, and those of as many tokens that were likeliest.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        problems = {
            "max_new_tokens must be 1 or more": self.max_new_tokens >= 1,
            "temperature must be 0 (greedy) or more": self.temperature >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "min_p must be from 0 (off) to 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "logprobs must be 0 or more": self.logprobs is None or self.logprobs >= 0,
        }
        for message, holds in problems.items():
            if not holds:
                raise ConfigError(f"{message}; got {getattr(self, message.split()[0])}")

    def for_answer(self, number: int) -> SamplingParams:
        """The settings of one of several answers: the first has the seed, others follow from it."""
        if self.seed is None or not number:
            return self
        digest = hashlib.blake2b(f"{self.seed}:{number}".encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest))


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model took a token to be, and which it took to be likeliest.

    Natural logarithms of the model's own probabilities, before temperature, penalties and cuts.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
        """Of `token` among `logits` of shape (vocab,), and of the `count` likeliest."""
        logprobs = torch.log_softmax(logits, dim=-1)
        top = torch.topk(logprobs, min(count, len(logprobs)))
        return cls(float(logprobs[token]), top.indices.tolist(), top.values.tolist())


class TokenSampler:
    """Chooses tokens by `params`, one sequence each; the same seed gives the same choices."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._generator: torch.Generator | None = None
        if params.temperature > 0:
            self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k > 0:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._processors.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0:
                self._processors.append(MinPLogitsWarper(params.min_p))
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)

    def choose(self, logits: torch.Tensor, forced: int | None = None) -> int:
        """The next token id, from `logits` of shape (vocab,).

        With `forced` it is that one; the draw is made nonetheless, so that later ones are the same.
        """
        # On the CPU, so that a seed means the same on every device.
        plain = logits.detach().float().cpu()
        scores = plain[None]
        so_far: Any = torch.tensor([self.generated], dtype=torch.int64)
        scores = self._processors(so_far, scores)
        if self._generator is None:
            token = int(scores[0].argmax())
        else:
            probabilities = torch.softmax(scores[0], dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        token = token if forced is None else forced
        if self.params.logprobs is not None:
            self.logprobs.append(TokenLogprobs.of(plain, token, self.params.logprobs))
        self.generated.append(token)
        return token
