"""How long compression takes beside full attention, in one run, on the same threads.

Knows nothing about answers: weights and prompts are random.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.bench.plain import plain_context
from homer.loading import load_model
from homer.model import HomerModel

METHODS = ("homer", "paper", "plain")


@dataclass(frozen=True)
class SpeedResult:
    """Seconds of each method at one length, run by run: run i of all methods was taken in turn."""

    tokens: int
    threads: int
    seconds: dict[str, list[float]]

    def median_seconds(self, method: str) -> float:
        return statistics.median(self.seconds[method])

    def ratio(self, method: str) -> float:
        """Median over the rounds of a method's time over the plain model's in the same round.

        What else the machine does in a round hits both.
        """
        pairs = zip(self.seconds[method], self.seconds["plain"], strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)


def measure_speed(
    lengths: Sequence[int],
    *,
    runs: int = 3,
    threads: int = 1,
    size: BenchSize | None = None,
    on_run: Callable[[int, str, float], None] | None = None,
) -> list[SpeedResult]:
    """Time from token ids to the first token's logits, for each length and method.

    Parameters
    ----------
    lengths : sequence of int
        Prompt tokens, prefix and suffix included.
    runs : int
        Rounds; each runs every method once.
    threads : int
    size : BenchSize, optional
    on_run : callable, optional
        Called with (tokens, method, seconds) after each run.
    """
    size = size or BenchSize()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
            save_bench_model(Path(folder), size)
            model = load_model(folder, dtype="float32", device="cpu")
        homer, paper = HomerModel(model, size.config), HomerModel(model, size.paper_config)
        methods: dict[str, Callable[..., object]] = {
            "homer": homer.compress,
            "paper": paper.compress,
            "plain": lambda *parts: plain_context(model, torch.cat(parts)),
        }
        warm_up = random_prompt(3 * size.chunk, size.vocab)
        for run in methods.values():
            run(*warm_up)
        results = []
        for tokens in lengths:
            seconds: dict[str, list[float]] = {name: [] for name in METHODS}
            for turn in range(runs):
                prompt = random_prompt(tokens, size.vocab, seed=turn)
                for name, run in methods.items():
                    started = time.perf_counter()
                    run(*prompt)
                    seconds[name].append(time.perf_counter() - started)
                    if on_run is not None:
                        on_run(tokens, name, seconds[name][-1])
            results.append(SpeedResult(tokens, threads, seconds))
        return results
    finally:
        torch.set_num_threads(before)
