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
from typing import NamedTuple

import torch

from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.bench.plain import plain_context
from homer.loading import load_model
from homer.model import HomerModel

METHODS = ("homer", "paper", "plain")


class Timing(NamedTuple):
    """One run: seconds on the clock, and seconds of processor time of all threads."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class SpeedResult:
    """Timings of each method at one length: run i of all methods was taken in turn."""

    tokens: int
    threads: int
    timings: dict[str, list[Timing]]

    def median_seconds(self, method: str) -> float:
        """On the clock."""
        return statistics.median(timing.wall_seconds for timing in self.timings[method])

    def ratio(self, method: str) -> float:
        """Median over the rounds of a method's time over the plain model's in the same round.

        What else the machine does for longer than a round hits both.
        """
        return self._ratio(method, lambda timing: timing.wall_seconds)

    def cpu_ratio(self, method: str) -> float:
        """The same of processor time, which waiting for other processes does not enter."""
        return self._ratio(method, lambda timing: timing.cpu_seconds)

    def _ratio(self, method: str, seconds: Callable[[Timing], float]) -> float:
        pairs = zip(self.timings[method], self.timings["plain"], strict=True)
        return statistics.median(seconds(ours) / seconds(plain) for ours, plain in pairs)


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
            timings: dict[str, list[Timing]] = {name: [] for name in METHODS}
            for turn in range(runs):
                prompt = random_prompt(tokens, size.vocab, seed=turn)
                for name, run in methods.items():
                    started, cpu_before = time.perf_counter(), time.process_time()
                    run(*prompt)
                    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_before
                    timings[name].append(Timing(wall, cpu))
                    if on_run is not None:
                        on_run(tokens, name, wall)
            results.append(SpeedResult(tokens, threads, timings))
        return results
    finally:
        torch.set_num_threads(before)
