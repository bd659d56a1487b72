"""The speed and memory measurements, on sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from homer.bench.bench_model import BenchSize
from homer.bench.memory import MemoryResult, measure_memory
from homer.bench.show import memory_table, speed_table
from homer.bench.speed import METHODS, SpeedResult, Timing, measure_speed
from homer.errors import ConfigError

SMALL = BenchSize(
    layers=6, hidden=64, intermediate=128, heads=4, vocab=256, chunk=128, warmup_layers=2
)


def test_speed_takes_every_method_in_turn_and_leaves_threads_alone() -> None:
    before = torch.get_num_threads()
    order: list[tuple[int, str]] = []
    results = measure_speed(
        [512, 1024],
        runs=2,
        size=SMALL,
        on_run=lambda tokens, method, seconds: order.append((tokens, method)),
    )
    assert order == [(tokens, m) for tokens in (512, 1024) for _ in range(2) for m in METHODS]
    assert [result.tokens for result in results] == [512, 1024]
    for result in results:
        assert all(len(result.timings[method]) == 2 for method in METHODS)
        assert all(min(timing) > 0 for runs in result.timings.values() for timing in runs)
    assert torch.get_num_threads() == before
    assert speed_table(results).row_count == 2


def test_ratios_compare_runs_of_the_same_round() -> None:
    homer = [Timing(1.0, 1.0), Timing(6.0, 2.0), Timing(2.0, 2.0)]
    plain = [Timing(4.0, 4.0), Timing(12.0, 10.0), Timing(4.0, 4.0)]
    result = SpeedResult(512, 1, {"homer": homer, "paper": homer, "plain": plain})
    assert result.ratio("homer") == 0.5
    assert result.cpu_ratio("homer") == 0.25
    assert result.median_seconds("homer") == 2.0
    assert result.median_seconds("plain") == 4.0


def test_memory_is_measured_in_fresh_processes() -> None:
    # Full attention keeps the KV of all tokens and runs them through a layer at once: between the
    # lengths at least the KV must show, 2 * 6 layers * 64 * 4 bytes a token.
    small, large = measure_memory([512, 8192], ["plain"], size=SMALL)
    assert (small.method, small.tokens, small.threads) == ("plain", 512, 1)
    assert large.above_bytes == large.peak_bytes - large.loaded_bytes
    assert large.above_bytes - small.above_bytes > 0.8 * 2 * 6 * 64 * 4 * (8192 - 512)
    assert memory_table([small, large]).row_count == 2


def test_memory_above_the_model() -> None:
    assert MemoryResult("homer", 512, 1, loaded_bytes=70, peak_bytes=100).above_bytes == 30


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose from homer, paper, plain"):
        measure_memory([512], ["yarn"], size=SMALL)
