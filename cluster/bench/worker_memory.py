"""Peak memory of each worker of a pool against the length of the document.

Resident memory of worker processes as the kernel counts it (Linux). Knows nothing about answers:
weights and prompts are random.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.local_workers import LocalWorker, connected, local_workers
from cluster.bench.scaling import make_job, time_job
from homer.bench.bench_model import PREFIX_TOKENS, SUFFIX_TOKENS, BenchSize, save_bench_model
from homer.errors import ConfigError, HomerError


@dataclass(frozen=True)
class WorkerMemory:
    """One request on fresh workers.

    `loaded_bytes` is each worker's memory with the model loaded and all code paths run once on a
    few tokens, `peak_bytes` its highest during the request.
    """

    tokens: int
    leaves: int
    levels: int
    loaded_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def above_bytes(self) -> tuple[int, ...]:
        """Each worker's peak above the loaded model."""
        pairs = zip(self.peak_bytes, self.loaded_bytes, strict=True)
        return tuple(peak - loaded for peak, loaded in pairs)


@dataclass(frozen=True)
class LogFit:
    """Bytes as `at_first + per_doubling * log2(tokens / first tokens)`, by least squares."""

    at_first: float
    per_doubling: float
    largest_error: float

    @classmethod
    def of(cls, results: Sequence[WorkerMemory]) -> LogFit:
        """Fitted to the mean over the workers; the error is a part of the measured bytes."""
        xs = [math.log2(result.tokens / results[0].tokens) for result in results]
        ys = [sum(result.above_bytes) / len(result.above_bytes) for result in results]
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        spread = sum((x - mean_x) ** 2 for x in xs)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slope = slope / spread if spread else 0.0
        start = mean_y - slope * mean_x
        errors = [abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True)]
        return cls(start, slope, max(errors))


def measure_worker_memory(
    lengths: Sequence[int],
    workers: int = 2,
    *,
    size: BenchSize | None = None,
    on_start: Callable[[int], None] | None = None,
) -> list[WorkerMemory]:
    """Run a request of each length on `workers` fresh workers.

    Raises
    ------
    ConfigError
        Where the kernel does not tell peak memory.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("measuring peak memory needs Linux with /proc mounted")
    size = size or BenchSize()
    results = []
    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        for tokens in lengths:
            if on_start is not None:
                on_start(tokens)
            with local_workers(Path(folder), workers) as started:
                results.append(asyncio.run(_one_length(started, tokens, size)))
    return results


async def _one_length(started: Sequence[LocalWorker], tokens: int, size: BenchSize) -> WorkerMemory:
    async with connected(started) as clients:
        # Two leaves and a merge of a few tokens each load all code, and leave hardly any memory
        # over which the measured run could use again without being seen.
        affixes = PREFIX_TOKENS + SUFFIX_TOKENS
        for client in clients:
            await time_job([client], make_job(affixes + 16, size, chunk=affixes + 8))
        loaded = tuple(status_bytes(worker.pid, "VmRSS") for worker in started)
        for worker in started:
            # 5 sets the peak back to what is resident now.
            Path(f"/proc/{worker.pid}/clear_refs").write_text("5", encoding="ascii")
        job = make_job(tokens, size)
        await time_job(clients, job)
        peak = tuple(status_bytes(worker.pid, "VmHWM") for worker in started)
    return WorkerMemory(tokens, len(job.plan.leaves), job.plan.height + 1, loaded, peak)


def status_bytes(pid: int, field: str) -> int:
    """A size of a process as the kernel tells it: VmRSS, VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise HomerError(f"/proc/{pid}/status has no {field}")
