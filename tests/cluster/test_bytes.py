"""Bytes that a request moves between workers, in virtual time, beside the least of even shares."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import NamedTuple

import pytest

from cluster.bench.bytes_moved import state_bytes
from cluster.bench.fair_split import least_bytes
from cluster.bench.wire import least_states, rows_elsewhere, states_moved
from cluster.job import (
    CacheReady,
    GenerateDone,
    GenerateEvent,
    Job,
    JobProgress,
    JobSummary,
    MergeDone,
    NodeDone,
)
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer import HomerConfig, MergePlan
from homer.bench.bench_model import PREFIX_TOKENS, SUFFIX_TOKENS, BenchSize
from homer.plan import NodeId
from homer.shape import ModelShape
from tests.cluster.fakes import make_pool
from tests.cluster.test_scheduler import collect
from tests.cluster.test_scheduler_scale import LightWorker
from tests.cluster.virtual_time import run_virtual

SIZE = BenchSize()
SHAPE = ModelShape(
    num_layers=SIZE.layers,
    hidden_size=SIZE.hidden,
    intermediate_size=SIZE.intermediate,
    num_heads=SIZE.heads,
    num_kv_heads=SIZE.heads,
    head_dim=SIZE.hidden // SIZE.heads,
    vocab_size=SIZE.vocab,
    window=SIZE.window,
    value_bytes=4,
)
RUNS = 6
# A leaf takes about a tenth of a second.
SLOWER = 400


@cache
def plan_of(tokens: int) -> MergePlan:
    context = tokens - PREFIX_TOKENS - SUFFIX_TOKENS
    return MergePlan.build(PREFIX_TOKENS, context, SUFFIX_TOKENS, SIZE.layers, SIZE.config)


class EvenWorker(LightWorker):
    """Takes time by tokens and layers; what survives at the root is spread over the document."""

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        for part in job.plan.subtree(node):
            await self._step(part.context_in * (part.layer_end - part.layer_start) / SLOWER)
            yield NodeDone(part.id, part.context_in, part.context_out, 0.0)

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        part = job.plan.by_id[node]
        await self._step(part.context_in * (part.layer_end - part.layer_start) / SLOWER)
        kept = range(part.context_out)
        return MergeDone(node, part.context_in, part.context_out, 0.0, 0.0, 0, kept)

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        delivered: Sequence[Sequence[int] | None] = (),
    ) -> AsyncIterator[GenerateEvent]:
        kept, length = job.plan.root.context_out, job.plan.context_len
        indices = [place * length // kept for place in range(kept)]
        yield CacheReady(job.plan.kept_len, 0.0, 0.0, 0, indices)
        yield GenerateDone(0, "length", 0.0)


class Outcome(NamedTuple):
    """Bytes moved over those of even shares; seconds to the root over an even share of the work."""

    bytes: float
    seconds: float


def outcome(tokens: int, speeds: Sequence[float], jitter: float, seed: int) -> Outcome:
    async def work() -> Outcome:
        pool = [EvenWorker(w.name, w.pool, w.rng, jitter) for w in make_pool(len(speeds), seed)]
        for worker, speed in zip(pool, speeds, strict=True):
            worker.speed = speed
        scheduler = Scheduler(pool, options=SchedulerOptions(heartbeat_seconds=0))
        plan = plan_of(tokens)
        job = Job("r", plan, range(PREFIX_TOKENS), range(plan.context_len), range(SUFFIX_TOKENS))
        events = await collect(scheduler, job)
        await scheduler.close()
        homes = {
            event.done.node: event.worker for event in events if isinstance(event, JobProgress)
        }
        (ready,) = (event for event in events if isinstance(event, CacheReady))
        summary = events[-1]
        assert isinstance(summary, JobSummary)
        rows = rows_elsewhere(plan, homes, ready.context_indices) * SHAPE.kv_bytes_per_row
        moved = sum(state_bytes(plan, node, SHAPE) for node in states_moved(plan, homes))
        least = least_states(plan, SHAPE, [1.0] * len(speeds))
        even = sum(worker.busy_seconds * worker.speed for worker in pool) / sum(speeds)
        stages = summary.seconds
        return Outcome((rows + moved) / (rows + least), (stages.leaves + stages.merges) / even)

    return run_virtual(work())


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [16_384, 65_536])
def test_few_more_bytes_travel_than_even_shares_must_move(tokens: int, workers: int) -> None:
    outcomes = []
    for seed in range(RUNS):
        speeds = [random.Random(f"{seed}{n}").uniform(0.97, 1.0) for n in range(workers)]
        outcomes.append(outcome(tokens, speeds, jitter=0.02, seed=seed))
    assert sum(one.bytes for one in outcomes) / RUNS <= 1.05
    if workers == 2:
        # The ideal of a tree of these sizes is 1.97 and 1.99 times the speed of one worker.
        assert max(one.seconds for one in outcomes) <= 1.05


@pytest.mark.parametrize(
    ("speeds", "tokens", "slower"),
    [
        ((1, 2), 16_384, 1.10),
        ((1, 2), 65_536, 1.03),
        ((1, 1, 1, 10), 16_384, 1.30),
        ((1, 1, 1, 10), 65_536, 1.13),
    ],
)
def test_unequal_workers_lose_little(speeds: tuple[int, ...], tokens: int, slower: float) -> None:
    assert outcome(tokens, speeds, jitter=0.02, seed=1).seconds <= slower


def test_the_least_is_that_of_shares_that_are_as_even_as_leaves_allow() -> None:
    config = HomerConfig(max_chunk_len=15, target_len=15, warmup_layers=1, fan_in=2)

    def states(leaves: int, workers: int) -> int:
        plan = MergePlan.build(2, 10 * leaves, 3, 16, config)
        assert len(plan.leaves) == leaves
        return least_bytes(plan, {node.id: 1 for node in plan.nodes}, [1.0] * workers)

    # Whole subtrees: a state less than there are workers.
    assert [states(16, workers) for workers in (1, 2, 4, 8, 16, 20)] == [0, 1, 3, 7, 15, 15]
    # The halves of three leaves are two and one.
    assert states(3, 2) == 1
    # Thirds of sixteen leaves are no subtrees: 6, 5 and 5, or 5, 6 and 5.
    assert states(16, 3) > 2


def test_the_least_is_that_of_workers_as_fast_as_they_are_in_their_best_order() -> None:
    config = HomerConfig(max_chunk_len=15, target_len=15, warmup_layers=1, fan_in=2)
    plan = MergePlan.build(2, 160, 3, 16, config)
    states = {node.id: 1 for node in plan.nodes}
    # A half and two quarters are whole subtrees only where the half is at one end.
    for parts in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert least_bytes(plan, states, parts) == 2
    # Five eighths and three eighths are not.
    assert least_bytes(plan, states, (5, 3)) == 2
