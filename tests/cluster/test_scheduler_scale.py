"""A thousand workers and thousands of leaves: what the scheduler itself takes for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from cluster.job import CacheReady, GenerateDone, Job, JobSummary, MergeDone, NodeDone
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer.plan import NodeId
from tests.cluster.fakes import FakeWorker, make_job, make_pool
from tests.cluster.test_scheduler import collect
from tests.cluster.virtual_time import run_virtual


class LightWorker(FakeWorker):
    """Takes time, keeps nothing."""

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        for part in job.plan.subtree(node):
            await self._step(part.context_in)
            yield NodeDone(part.id, part.context_in, part.context_out, 0.0)

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        part = job.plan.by_id[node]
        await self._step(part.context_in)
        kept = range(part.context_out)
        return MergeDone(node, part.context_in, part.context_out, 0.0, 0.0, 0, kept)

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None:
        return None

    async def generate(self, job, attempt, shard_addresses, delivered=()):  # type: ignore[no-untyped-def]
        yield CacheReady(job.plan.kept_len, 0.0, 0.0, 0, [])
        yield GenerateDone(0, "length", 0.0)


def seconds_per_call(workers: int, leaves: int) -> tuple[float, float]:
    """Processor time per call to a worker, and how well the workers were used."""

    async def work() -> tuple[float, float]:
        pool = [
            LightWorker(worker.name, worker.pool, worker.rng, 0.3) for worker in make_pool(workers)
        ]
        scheduler = Scheduler(pool, options=SchedulerOptions(heartbeat_seconds=0))
        job = make_job(11 * leaves, layers=24)
        started = time.process_time()
        summary = (await collect(scheduler, job))[-1]
        took = time.process_time() - started
        assert isinstance(summary, JobSummary)
        calls = min(len(job.plan.nodes), workers * 8 * 2)
        busy = sum(worker.busy_seconds for worker in pool)
        await scheduler.close()
        return took / calls, busy / workers / asyncio.get_running_loop().time()

    return run_virtual(work())


def test_a_large_pool_costs_little_more_per_call_than_a_small_one() -> None:
    small, _ = seconds_per_call(32, 3_000)
    large, used = seconds_per_call(1024, 3_000)
    # A small pool's calls stand for larger pieces, whose nodes are counted one by one.
    assert large < 3 * small
    assert large < 0.005
    assert used > 0.25
