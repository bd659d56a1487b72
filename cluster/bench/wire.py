"""The bytes that one request moves between workers, beside the least that must travel.

With W workers, whose shares of the document meet at the root, at least W-1 states go from one
worker to another, and every surviving KV row that the root's worker does not have, once. Knows
nothing about how bytes travel.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.bench.bytes_moved import state_bytes
from cluster.bench.local_workers import connected, local_workers
from cluster.bench.scaling import make_job
from cluster.job import CacheReady, JobProgress, MergeDone, WorkerClient
from cluster.scheduler import Scheduler
from homer.bench.bench_model import BenchSize, save_bench_model
from homer.plan import MergePlan, NodeId
from homer.shape import ModelShape


@dataclass(frozen=True)
class WireResult:
    """Bytes of one request.

    `sent` is counted by the workers, message by message, headers of ours included. `state_least`
    and `row_least` are the lower bound; `states_moved` counts the states that went to another
    worker.
    """

    tokens: int
    workers: int
    sent: int
    state_least: int
    row_least: int
    states_moved: int

    @property
    def least(self) -> int:
        return self.state_least + self.row_least

    @property
    def ratio(self) -> float:
        return self.sent / self.least


def measure_wire(
    tokens: int, workers: Sequence[int] = (2, 3, 4), *, size: BenchSize | None = None
) -> list[WireResult]:
    """Run one request of `tokens` tokens on each number of workers."""
    size = size or BenchSize()
    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        with local_workers(Path(folder), max(workers)) as started:
            return asyncio.run(_measure(started, tokens, workers, size, ModelShape.load(folder)))


async def _measure(
    started: Sequence[Any], tokens: int, counts: Sequence[int], size: BenchSize, shape: ModelShape
) -> list[WireResult]:
    results = []
    async with connected(started) as clients:
        for count in counts:
            results.append(await _one_request(clients[:count], tokens, size, shape))
    return results


async def _one_request(
    clients: Sequence[WorkerClient], tokens: int, size: BenchSize, shape: ModelShape
) -> WireResult:
    job = make_job(tokens, size)
    homes: dict[NodeId, str] = {}
    kept: Sequence[int] = ()
    states_moved = 0
    before = await _sent(clients)
    scheduler = Scheduler(clients)
    async with aclosing(cast(Any, scheduler.run(job))) as events:
        async for event in events:
            match event:
                case JobProgress(done):
                    homes[done.node] = event.worker
                    if isinstance(done, MergeDone):
                        children = job.plan.by_id[done.node].children
                        states_moved += sum(homes[child] != event.worker for child in children)
                case CacheReady():
                    kept = event.context_indices
    await scheduler.close()
    sent = await _sent(clients) - before
    used = len(set(homes.values()))
    return WireResult(
        tokens=tokens,
        workers=len(clients),
        sent=sent,
        state_least=(used - 1) * least_state_bytes(job.plan, shape),
        row_least=rows_elsewhere(job.plan, homes, kept) * shape.kv_bytes_per_row,
        states_moved=states_moved,
    )


async def _sent(clients: Sequence[WorkerClient]) -> int:
    stats = await asyncio.gather(*(client.stats() for client in clients))
    return sum(one.sent_bytes for one in stats)


def least_state_bytes(plan: MergePlan, shape: ModelShape) -> int:
    """The smallest state that can go from one worker's share of the document to another's."""
    return min(
        (state_bytes(plan, node, shape) for node in plan.nodes if node.id != plan.root.id),
        default=0,
    )


def rows_elsewhere(plan: MergePlan, homes: Mapping[NodeId, str], kept: Sequence[int]) -> int:
    """Surviving KV rows, over all layers, that were made on another worker than the root's."""
    root = homes[plan.root.id]
    rows = 0
    for node in plan.nodes:
        if homes[node.id] != root:
            inside = sum(node.context_start <= index < node.context_end for index in kept)
            rows += inside * (node.layer_end - node.layer_start)
    return rows
