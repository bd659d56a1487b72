"""Bytes of weights that are brought in for each leaf, where weights lie on disk, by batch size.

Beside it, what batches change in time where all weights are in memory.

Knows nothing about answers: weights and prompts are random.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.context import CompressedContext
from homer.devices import placing_hooks
from homer.loading import load_model
from homer.model import HomerModel

LAYERS_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@dataclass(frozen=True)
class OffloadResult:
    """One compression with so many leaves together; 0 is as many as memory has room for.

    `moved_bytes` are those of weights that were brought in, `same` whether all numbers that came
    out are those of a model in memory, run leaf by leaf. `seconds_in_memory` is what such a model
    takes with this batch size, at the fastest.
    """

    leaf_batch_size: int
    tokens: int
    leaves: int
    moved_bytes: int
    seconds: float
    seconds_in_memory: float
    same: bool

    @property
    def bytes_per_leaf(self) -> float:
        return self.moved_bytes / self.leaves


class _Counted(Mapping[str, torch.Tensor]):
    """Weights that lie outside; counts those that are brought in."""

    def __init__(self, weights: Mapping[str, torch.Tensor], on_read: Callable[[str, int], None]):
        self._weights, self._on_read = weights, on_read

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self._weights[key]
        self._on_read(key, tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def count_moved(model: Any) -> tuple[Counter[str], Counter[str]]:
    """How often each weight that lies outside is brought in from now on, and its bytes so far."""
    times: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for part_name, part in model.named_modules():
        for hook in placing_hooks(part):
            if not hook.offload:
                continue

            def on_read(key: str, nbytes: int, part_name: str = part_name) -> None:
                times[f"{part_name}.{key}"] += 1
                moved[f"{part_name}.{key}"] += nbytes

            hook.weights_map = _Counted(hook.weights_map, on_read)
    return times, moved


def measure_offload(
    tokens: int,
    batch_sizes: Sequence[int],
    *,
    threads: int = 1,
    rounds: int = 3,
    size: BenchSize | None = None,
    on_run: Callable[[int, float], None] | None = None,
) -> list[OffloadResult]:
    """Compress one prompt with all layers on disk, once for each of `batch_sizes`.

    In memory it is compressed `rounds` times for each.
    """
    size = size or BenchSize()
    torch.set_num_threads(threads)
    parts = random_prompt(tokens, size.vocab)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save_bench_model(Path(folder), size)
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
        resident = load_model(folder, **options)
        expected = HomerModel(resident, size.config, leaf_batch_size=1).compress(*parts)
        in_memory = _fastest_in_memory(resident, size, parts, batch_sizes, rounds)
        model = load_model(folder, **options, device_map=LAYERS_ON_DISK)
        _, moved = count_moved(model)
        for batch_size in batch_sizes:
            homer = HomerModel(model, size.config, leaf_batch_size=batch_size)
            plan = homer.plan(*(len(part) for part in parts))
            moved.clear()
            started = time.perf_counter()
            context = homer.compress(*parts)
            seconds = time.perf_counter() - started
            if on_run is not None:
                on_run(batch_size, seconds)
            results.append(
                OffloadResult(
                    leaf_batch_size=batch_size,
                    tokens=tokens,
                    leaves=len(plan.leaves),
                    moved_bytes=moved.total(),
                    seconds=seconds,
                    seconds_in_memory=in_memory[batch_size],
                    same=_same(context, expected),
                )
            )
    return results


def _fastest_in_memory(
    model: Any,
    size: BenchSize,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    batch_sizes: Sequence[int],
    rounds: int,
) -> dict[int, float]:
    """Seconds of a compression by batch size: all take turns, and the fastest of each counts."""
    seconds: dict[int, float] = {}
    for _ in range(rounds):
        for batch_size in batch_sizes:
            homer = HomerModel(model, size.config, leaf_batch_size=batch_size)
            started = time.perf_counter()
            homer.compress(*parts)
            took = time.perf_counter() - started
            seconds[batch_size] = min(took, seconds.get(batch_size, took))
    return seconds


def _same(one: CompressedContext, other: CompressedContext) -> bool:
    rows = zip(one.layers, other.layers, strict=True)
    return (
        torch.equal(one.context_indices, other.context_indices)
        and torch.equal(one.logits, other.logits)
        and all(all(map(torch.equal, mine, theirs)) for mine, theirs in rows)
    )
