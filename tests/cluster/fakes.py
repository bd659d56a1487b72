"""Workers without models: they keep rows as sets of numbers and check every call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from cluster.errors import WorkerCallError
from cluster.job import (
    CacheReady,
    GenerateDone,
    GenerateEvent,
    Job,
    MergeDone,
    NodeDone,
    TokenOut,
    WorkerInfo,
    WorkerStats,
)
from homer import HomerConfig, MergePlan
from homer.plan import NodeId, PlanNode


def survivors(node: PlanNode, rows: Sequence[int]) -> list[int]:
    """What a fake prunes to: a fixed pseudo-random choice of the plan's size."""
    chosen = random.Random(f"{node.id}").sample(list(rows), node.context_out)
    return sorted(chosen)


@dataclass
class Held:
    """What a fake holds of one request."""

    states: dict[NodeId, list[int]] = field(default_factory=dict)
    # Rows of the KV shards: (layer, context index).
    rows: set[tuple[int, int]] = field(default_factory=set)


class FakeWorker:
    """A worker that answers after a number of turns of the event loop that `rng` draws."""

    def __init__(self, name: str, pool: dict[str, FakeWorker], rng: random.Random) -> None:
        self.name = name
        self.address = f"{name}:1"
        self.pool = pool
        self.rng = rng
        self.held: dict[str, Held] = {}
        self.released: set[str] = set()
        self.calls: list[tuple[str, NodeId]] = []
        self.in_call = 0
        self.fail_subtrees: list[Exception] = []
        self.stall = asyncio.Event()
        self.stall.set()
        pool[self.address] = self

    async def _work(self) -> None:
        for _ in range(self.rng.randrange(6)):
            await asyncio.sleep(0)
        await self.stall.wait()

    def _begin(self, job: Job, call: str, node: NodeId) -> Held:
        assert job.request_id not in self.released, "a call after release"
        self.calls.append((call, node))
        return self.held.setdefault(job.request_id, Held())

    def _run(self, held: Held, node: PlanNode, rows: Sequence[int]) -> list[int]:
        held.rows |= {
            (layer, row) for layer in range(node.layer_start, node.layer_end) for row in rows
        }
        kept = survivors(node, rows)
        dropped = set(rows) - set(kept)
        held.rows = {entry for entry in held.rows if entry[1] not in dropped}
        return kept

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        held = self._begin(job, "subtree", node)
        self.in_call += 1
        assert self.in_call == 1, "two pieces of work at a time"
        try:
            done: dict[NodeId, list[int]] = {}
            for part in job.plan.subtree(node):
                await self._work()
                if self.fail_subtrees:
                    raise self.fail_subtrees.pop()
                rows = (
                    list(range(part.context_start, part.context_end))
                    if part.is_leaf
                    else [row for child in part.children for row in done.pop(child)]
                )
                done[part.id] = self._run(held, part, rows)
                yield NodeDone(
                    node=part.id,
                    context_in=part.context_in,
                    context_out=part.context_out,
                    seconds=0.0,
                )
            assert node not in held.states
            held.states[node] = done[node]
        finally:
            self.in_call -= 1

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        held = self._begin(job, "merge", node)
        self.in_call += 1
        assert self.in_call == 1, "two pieces of work at a time"
        try:
            await self._work()
            part = job.plan.by_id[node]
            assert tuple(child for child, _ in children) == part.children
            rows: list[int] = []
            received = 0
            for child, address in children:
                home = self.pool[address] if address else self
                state = home.held[job.request_id].states.pop(child)
                received += 0 if home is self else len(state)
                rows += state
            kept = self._run(held, part, rows)
            held.states[node] = kept
            return MergeDone(
                node=node,
                context_in=len(rows),
                context_out=len(kept),
                seconds=0.0,
                transfer_seconds=0.0,
                received_bytes=received,
                context_indices=kept,
            )
        finally:
            self.in_call -= 1

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None:
        held = self._begin(job, "prune", node)
        await self._work()
        part = job.plan.by_id[node]
        dropped = set(range(part.context_start, part.context_end)) - set(context_indices)
        held.rows = {entry for entry in held.rows if entry[1] not in dropped}

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        resume_token_ids: Sequence[int] = (),
    ) -> AsyncIterator[GenerateEvent]:
        held = self._begin(job, "generate", job.plan.root.id)
        kept = held.states[job.plan.root.id]
        await self._work()
        assert self.address not in shard_addresses
        rows = [
            entry
            for worker in (self, *(self.pool[address] for address in shard_addresses))
            for entry in worker.held[job.request_id].rows
            if entry[1] in set(kept)
        ]
        if len(rows) != len(set(rows)) or len(rows) != len(kept) * job.plan.num_layers:
            raise WorkerCallError("rows are missing or there twice")
        yield CacheReady(job.plan.kept_len, 0.0, 0.0, 0, kept)
        for token in range(job.sampling.max_new_tokens):
            await self._work()
            yield TokenOut(token)
        yield GenerateDone(job.sampling.max_new_tokens, "length", 0.0)

    async def release(self, request_id: str) -> None:
        await self._work()
        self.released.add(request_id)
        self.held.pop(request_id, None)

    async def drop(self, request_id: str, node: NodeId, attempt: int) -> None:
        raise NotImplementedError("the scheduler drops nothing")

    async def reset(self, keep_request_ids: Sequence[str] = ()) -> None:
        self.held.clear()

    async def info(self) -> WorkerInfo:
        raise NotImplementedError("the scheduler asks for no information")

    async def stats(self) -> WorkerStats:
        raise NotImplementedError("the scheduler asks for no statistics")

    async def close(self) -> None:
        return None


def make_pool(count: int, seed: int = 0) -> list[FakeWorker]:
    """`count` fakes that know each other."""
    pool: dict[str, FakeWorker] = {}
    rng = random.Random(seed)
    return [FakeWorker(f"worker-{number}", pool, rng) for number in range(count)]


def make_job(
    context_len: int, *, request_id: str = "r", fan_in: int | None = None, layers: int = 12
) -> Job:
    """A job of chunks of 16 tokens."""
    config = HomerConfig(max_chunk_len=16, target_len=12, warmup_layers=1, fan_in=fan_in)
    plan = MergePlan.build(2, context_len, 3, layers, config)
    return Job(request_id, plan, [1, 2], list(range(context_len)), [3, 4, 5])
