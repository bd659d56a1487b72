"""Tokens per second of one answer beside those of several decoded together.

Knows nothing about workers: what a worker's batch does is `next_tokens`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.generation import Answer, FinishReason, next_tokens
from homer.model import HomerModel
from homer.sampling import SamplingParams


@dataclass(frozen=True)
class DecodeResult:
    """Seconds in which one answer, and several together, got `tokens` tokens each; per round."""

    answers: int
    tokens: int
    threads: int
    cache_tokens: tuple[int, ...]
    alone_seconds: tuple[float, ...]
    together_seconds: tuple[float, ...]
    same_tokens: bool

    @property
    def ratios(self) -> list[float]:
        """Tokens per second together, in those of one alone; per round."""
        pairs = zip(self.alone_seconds, self.together_seconds, strict=True)
        return [self.answers * alone / together for alone, together in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure_decode(
    answers: int = 8,
    tokens: int = 64,
    *,
    runs: int = 3,
    threads: int = 1,
    size: BenchSize | None = None,
) -> DecodeResult:
    """Answer prompts of different lengths, one after the other and all together, in turns."""
    size = size or BenchSize()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        save_bench_model(Path(folder), size)
        homer = HomerModel.from_pretrained(folder, size.config, device="cpu", dtype="float32")
    contexts = [
        homer.compress(*random_prompt(size.chunk * (4 + 3 * number) // 6, size.vocab, number))
        for number in range(answers)
    ]
    alone_seconds, together_seconds, same = [], [], True
    for _ in range(runs):
        # One of the longest, for the others are not the slower ones.
        seconds, one = _decode(homer, contexts[-1:], tokens)
        alone_seconds.append(seconds)
        seconds, all_of_them = _decode(homer, contexts, tokens)
        together_seconds.append(seconds)
        same = same and all_of_them[-1:] == one
    for number, context in enumerate(contexts):
        same = same and _decode(homer, [context], tokens)[1] == all_of_them[number : number + 1]
    return DecodeResult(
        answers=answers,
        tokens=tokens,
        threads=threads,
        cache_tokens=tuple(context.cache_len for context in contexts),
        alone_seconds=tuple(alone_seconds),
        together_seconds=tuple(together_seconds),
        same_tokens=same,
    )


def _decode(
    homer: HomerModel, contexts: Sequence[CompressedContext], tokens: int
) -> tuple[float, list[list[int]]]:
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    answers = [
        Answer(homer.stack, DecodeCache.copy_of(context, tokens), params) for context in contexts
    ]
    step = partial(decode_step, homer.stack)
    started = time.perf_counter()
    for answer, context in zip(answers, contexts, strict=True):
        answer.choose(context.logits)
    while not answers[0].is_full:
        if any(isinstance(token, FinishReason) for token in next_tokens(step, answers)):
            raise AssertionError("unreachable: nothing ends these answers but their length")
    return time.perf_counter() - started, [answer.tokens for answer in answers]
