"""One and more workers on the same machine: time to the first token, beside what the tree allows.

Worker processes and gRPC as in a service; the scheduler runs in this process. Runs of different
numbers of workers take turns, and are compared within a round. Knows nothing about answers: weights
and prompts are random.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from cluster.bench.ideal import TreeTime
from cluster.bench.local_workers import LocalWorker, connected, local_workers
from cluster.job import CacheReady, Job, JobProgress, JobSummary, Sampling, TokenOut, WorkerClient
from cluster.scheduler import Scheduler
from homer.bench.bench_model import BenchSize, random_prompt
from homer.config import HomerConfig
from homer.plan import MergePlan, NodeId


@dataclass(frozen=True, kw_only=True)
class JobTimes:
    """One job as it was seen from outside, and its nodes as the workers timed them.

    Seconds; `first_token` and `total` count from submission.
    """

    plan: MergePlan
    workers: int
    first_token: float
    total: float
    node_seconds: dict[NodeId, float]
    node_workers: dict[NodeId, str]
    gather: float
    refresh: float
    moved_bytes: int
    # Processor time of this process, which schedules, during the job.
    scheduler_cpu: float
    # How long threads of the workers were ready to run and had no core, in all.
    waited: float
    events: int
    tokens: int

    @property
    def compute(self) -> float:
        """Seconds that the workers spent on nodes and on the refreshed suffix, in all."""
        return sum(self.node_seconds.values()) + self.refresh


def make_job(
    tokens: int, size: BenchSize, *, seed: int = 0, new_tokens: int = 1, chunk: int | None = None
) -> Job:
    """A job of `tokens` random prompt tokens for the bench model, in chunks of `chunk` tokens."""
    config = size.config.replace(max_chunk_len=chunk, target_len=chunk) if chunk else size.config
    parts = random_prompt(tokens, size.vocab, seed)
    return job_of(parts, size.layers, config, new_tokens=new_tokens)


def job_of(
    parts: Sequence[torch.Tensor], num_layers: int, config: HomerConfig, *, new_tokens: int = 1
) -> Job:
    """A job for any model: prefix, context and suffix by these settings."""
    prefix, context, suffix = (part.tolist() for part in parts)
    plan = MergePlan.build(len(prefix), len(context), len(suffix), num_layers, config)
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    return Job(f"bench-{uuid.uuid4().hex}", plan, prefix, context, suffix, sampling)


async def time_job(clients: Sequence[WorkerClient], job: Job, pids: Sequence[int] = ()) -> JobTimes:
    """Run `job` to its end on `clients` alone, and note when what came.

    `pids` are the workers' processes.
    """
    scheduler = Scheduler(clients)
    try:
        return await _time_job(scheduler, job, pids)
    finally:
        await scheduler.close()


async def _time_job(scheduler: Scheduler, job: Job, pids: Sequence[int]) -> JobTimes:
    seconds: dict[NodeId, float] = {}
    homes: dict[NodeId, str] = {}
    cache: CacheReady | None = None
    summary: JobSummary | None = None
    first = 0.0
    events = tokens = 0
    waited = sum(map(seconds_without_core, pids))
    cpu = time.process_time()
    started = time.perf_counter()
    async with aclosing(cast(Any, scheduler.run(job))) as stream:
        async for event in stream:
            events += 1
            match event:
                case JobProgress(done):
                    seconds[done.node] = done.seconds
                    homes[done.node] = event.worker
                case CacheReady():
                    cache = event
                case TokenOut():
                    tokens += 1
                    first = first or time.perf_counter() - started
                case JobSummary():
                    summary = event
    total = time.perf_counter() - started
    if cache is None or summary is None:
        raise RuntimeError("the job ended without an answer")
    return JobTimes(
        plan=job.plan,
        workers=len(scheduler.workers),
        first_token=first,
        total=total,
        node_seconds=seconds,
        node_workers=homes,
        gather=cache.gather_seconds,
        refresh=cache.refresh_seconds,
        moved_bytes=summary.moved_bytes,
        scheduler_cpu=time.process_time() - cpu,
        waited=sum(map(seconds_without_core, pids)) - waited,
        events=events,
        tokens=tokens,
    )


def seconds_without_core(pid: int) -> float:
    """How long the threads of a process were ready to run but did not, so far (Linux)."""
    waited = 0.0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited += int(file.read_text(encoding="ascii").split()[1]) / 1e9
        except OSError:
            continue  # The thread has just ended.
    return waited


@dataclass(frozen=True)
class ScalingRow:
    """All rounds of one length and one number of workers, and those of one worker beside them.

    Of each the fastest round counts: whatever else the machine does only makes a round slower.
    """

    tokens: int
    workers: int
    runs: tuple[JobTimes, ...]
    alone: tuple[JobTimes, ...]

    @property
    def fastest(self) -> JobTimes:
        return _fastest(self.runs)

    @property
    def seconds(self) -> float:
        """Time to the first token in the fastest round."""
        return self.fastest.first_token

    @property
    def median_seconds(self) -> float:
        """Over all rounds."""
        return statistics.median(run.first_token for run in self.runs)

    @property
    def speedup(self) -> float:
        """One worker's time over this one's."""
        return _fastest(self.alone).first_token / self.seconds

    @property
    def ideal_speedup(self) -> float:
        """What the tree allows, by the node times of one worker."""
        alone = _fastest(self.alone)
        plan = alone.plan
        return TreeTime.of(plan, alone.node_seconds, self.workers, alone.refresh).ideal_speedup

    @property
    def efficiency(self) -> float:
        """The speed-up's part of the ideal one."""
        return self.speedup / self.ideal_speedup

    @property
    def slowdown(self) -> float:
        """How much longer the same nodes took than on one worker: what the machine takes back."""
        return self.fastest.compute / _fastest(self.alone).compute

    @property
    def waited(self) -> float:
        """The part of the time in which a worker had to wait for a core."""
        return self.fastest.waited / self.workers / self.seconds

    @property
    def event_seconds(self) -> float:
        """Processor time of the scheduler's process for each event: median."""
        return statistics.median(run.scheduler_cpu / run.events for run in self.runs)


def _fastest(runs: Sequence[JobTimes]) -> JobTimes:
    return min(runs, key=lambda run: run.first_token)


def measure_scaling(
    model: Path,
    size: BenchSize,
    lengths: Sequence[int],
    workers: Sequence[int] = (1, 2),
    *,
    runs: int = 3,
    threads: int = 1,
    on_run: Callable[[int, JobTimes], None] | None = None,
) -> list[ScalingRow]:
    """Time each length on each number of workers, `runs` times in turn.

    `model` is the folder of the bench model of `size`. `workers` must begin with 1, with which the
    others are compared.
    """
    with local_workers(model, max(workers), threads=threads) as started:
        return asyncio.run(_measure(started, lengths, workers, runs, size, on_run))


async def _measure(
    started: Sequence[LocalWorker],
    lengths: Sequence[int],
    counts: Sequence[int],
    runs: int,
    size: BenchSize,
    on_run: Callable[[int, JobTimes], None] | None,
) -> list[ScalingRow]:
    rows = []
    async with connected(started) as clients:
        await _warm_up(clients, size)
        for tokens in lengths:
            times: dict[int, list[JobTimes]] = {count: [] for count in counts}
            for turn in range(runs):
                for count in counts:
                    job = make_job(tokens, size, seed=turn)
                    pids = [worker.pid for worker in started[:count]]
                    times[count].append(await time_job(clients[:count], job, pids))
                    if on_run is not None:
                        on_run(tokens, times[count][-1])
            for count in counts:
                runs_of, alone = tuple(times[count]), tuple(times[counts[0]])
                rows.append(ScalingRow(tokens, count, runs_of, alone))
    return rows


async def _warm_up(clients: Sequence[WorkerClient], size: BenchSize) -> None:
    """Every worker runs leaves, merges and an answer once."""
    for client in clients:
        await time_job([client], make_job(6 * size.chunk, size, new_tokens=4))
    await time_job(clients, make_job(8 * size.chunk, size, new_tokens=4))
