"""The bytes that one request moves between workers, beside the least that must travel.

The least is what shares of neighbouring leaves cannot do without (`fair_split`): the states that go
from one worker to another, and every surviving KV row that the root's worker does not have, once.
How large the shares are is not a matter of bytes: each is what its worker got done of the leaves,
which is uneven where workers compete for processors. Knows nothing about how bytes travel.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.bench.bytes_moved import state_bytes
from cluster.bench.fair_split import least_bytes
from cluster.bench.local_workers import connected, local_workers
from cluster.bench.scaling import job_of, make_job
from cluster.job import CacheReady, Job, JobProgress, WorkerClient
from cluster.scheduler import Scheduler
from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.config import PlanKind
from homer.plan import MergePlan, NodeId, PlanNode
from homer.shape import ModelShape, homer_defaults


@dataclass(frozen=True)
class WireResult:
    """Bytes of one request.

    `sent` is counted by the workers, message by message, headers of ours included. `state_least`
    and `row_least` are the lower bound; `states_moved` counts the states that went to another
    worker, `moved_state_bytes` their bytes.
    """

    tokens: int
    workers: int
    sent: int
    state_least: int
    row_least: int
    states_moved: int
    moved_state_bytes: int

    @property
    def least(self) -> int:
        return self.state_least + self.row_least

    @property
    def ratio(self) -> float:
        return self.sent / self.least


def measure_wire(
    tokens: int, workers: Sequence[int] = (2, 3, 4), *, size: BenchSize | None = None
) -> list[WireResult]:
    """Run one request of `tokens` tokens on each number of workers of the bench model."""
    size = size or BenchSize()
    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        return _measure(Path(folder), lambda: make_job(tokens, size), workers, "float32")


def measure_model_wire(
    model: str, tokens: int, workers: Sequence[int], plan: PlanKind
) -> list[WireResult]:
    """The same for a model with its own settings, in its own type."""
    shape, config = ModelShape.load(model), homer_defaults(model).replace(plan=plan)
    parts = random_prompt(tokens, shape.vocab_size)
    return _measure(Path(model), lambda: job_of(parts, shape.num_layers, config), workers, "auto")


def _measure(
    model: Path, make: Callable[[], Job], counts: Sequence[int], dtype: str
) -> list[WireResult]:
    shape = ModelShape.load(model)

    async def run(started: Sequence[Any]) -> list[WireResult]:
        async with connected(started) as clients:
            return [await _one_request(clients[:count], make(), shape) for count in counts]

    with local_workers(model, max(counts), dtype=dtype) as started:
        return asyncio.run(run(started))


async def _one_request(clients: Sequence[WorkerClient], job: Job, shape: ModelShape) -> WireResult:
    homes: dict[NodeId, str] = {}
    kept: Sequence[int] = ()
    before = await _sent(clients)
    scheduler = Scheduler(clients)
    async with aclosing(cast(Any, scheduler.run(job))) as events:
        async for event in events:
            match event:
                case JobProgress(done):
                    homes[done.node] = event.worker
                case CacheReady():
                    kept = event.context_indices
    await scheduler.close()
    sent = await _sent(clients) - before
    moved = states_moved(job.plan, homes)
    return WireResult(
        tokens=job.plan.prompt_len,
        workers=len(clients),
        sent=sent,
        state_least=least_states(job.plan, shape, leaf_work(job.plan, homes)),
        row_least=rows_elsewhere(job.plan, homes, kept) * shape.kv_bytes_per_row,
        states_moved=len(moved),
        moved_state_bytes=sum(state_bytes(job.plan, node, shape) for node in moved),
    )


async def _sent(clients: Sequence[WorkerClient]) -> int:
    stats = await asyncio.gather(*(client.stats() for client in clients))
    return sum(one.sent_bytes for one in stats)


def leaf_work(plan: MergePlan, homes: Mapping[NodeId, str]) -> list[int]:
    """Tokens times layers of the leaves that each worker ran."""
    work: Counter[str] = Counter()
    for leaf in plan.leaves:
        work[homes[leaf.id]] += leaf.context_in * (leaf.layer_end - leaf.layer_start)
    return list(work.values())


def least_states(plan: MergePlan, shape: ModelShape, parts: Sequence[float]) -> int:
    """The fewest bytes of states that travel when workers share the plan as `parts` says."""
    states = {node.id: state_bytes(plan, node, shape) for node in plan.nodes}
    return least_bytes(plan, states, parts)


def states_moved(plan: MergePlan, homes: Mapping[NodeId, str]) -> list[PlanNode]:
    """The nodes whose states went to another worker."""
    return [
        node
        for node in plan.nodes
        if (parent := plan.parents.get(node.id)) and homes[parent] != homes[node.id]
    ]


def rows_elsewhere(plan: MergePlan, homes: Mapping[NodeId, str], kept: Sequence[int]) -> int:
    """Surviving KV rows, over all layers, that were made on another worker than the root's."""
    root = homes[plan.root.id]
    rows = 0
    for node in plan.nodes:
        if homes[node.id] != root:
            inside = sum(node.context_start <= index < node.context_end for index in kept)
            rows += inside * (node.layer_end - node.layer_start)
    return rows
