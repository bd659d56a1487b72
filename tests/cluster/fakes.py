"""Workers without models, in virtual time: they keep rows as numbers and check every call.

They hold what a real worker holds, and can be killed, stopped, slowed down, cut off from each
other and short of memory. A call that was cancelled may go on for a while and leave its result.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from cluster.errors import PeerCallError, WorkerCallError, WorkerLostError
from cluster.job import (
    CacheReady,
    GenerateDone,
    GenerateEvent,
    Job,
    MergeDone,
    NodeDone,
    Sampling,
    TokenOut,
    WorkerInfo,
    WorkerStats,
)
from homer import HomerConfig, MergePlan
from homer.plan import NodeId, PlanNode
from workers.kept_runs import write_runs

# A leaf of 16 tokens in 4 layers takes about a second.
WORK_PER_SECOND = 64.0


def survivors(node: PlanNode, rows: Sequence[int], salt: str = "") -> list[int]:
    """What a fake prunes to: a fixed pseudo-random choice of the plan's size."""
    chosen = random.Random(f"{node.id}{salt}").sample(list(rows), node.context_out)
    return sorted(chosen)


def expected_survivors(job: Job) -> list[int]:
    """What is left at the root of one process, with the fakes' way of pruning."""
    return expected_kept(job)[job.plan.root.id]


def expected_kept(job: Job) -> dict[NodeId, list[int]]:
    """What is left at each node."""
    done: dict[NodeId, list[int]] = {}
    for node in job.plan.nodes:
        rows = (
            list(range(node.context_start, node.context_end))
            if node.is_leaf
            else [row for child in node.children for row in done[child]]
        )
        done[node.id] = survivors(node, rows)
    return done


def token_at(place: int, kept: Sequence[int]) -> int:
    """The fakes' answer: it depends on what was kept."""
    return random.Random(f"{place}{kept[:3]}{kept[-3:]}").randrange(10_000)


def expected_tokens(job: Job) -> list[int]:
    kept = expected_survivors(job)
    return [token_at(place, kept) for place in range(job.sampling.max_new_tokens)]


@dataclass
class Held:
    """What a fake holds of one request. Rows are (layer, context index), by their unit."""

    states: dict[NodeId, list[int]] = field(default_factory=dict)
    rows: dict[NodeId, set[tuple[int, int]]] = field(default_factory=dict)
    jobs: dict[NodeId, tuple[int, asyncio.Task[Any]]] = field(default_factory=dict)
    dropped: dict[NodeId, int] = field(default_factory=dict)
    # Answers of which nothing more is wanted.
    ended: set[int] = field(default_factory=set)

    def forget(self, node: NodeId) -> None:
        self.states.pop(node, None)
        self.rows.pop(node, None)

    def all_rows(self) -> list[tuple[int, int]]:
        return [entry for rows in self.rows.values() for entry in rows]


class FakeWorker:
    """One worker. Nodes and tokens of all requests take turns, one at a time."""

    def __init__(
        self, name: str, pool: dict[str, FakeWorker], rng: random.Random, jitter: float = 0.0
    ) -> None:
        self.name = name
        self.address = f"{name}:1"
        self.pool = pool
        self.rng = rng
        self.jitter = jitter
        self.speed = 1.0
        self.held: dict[str, Held] = {}
        self.released: set[str] = set()
        self.calls: list[tuple[str, str, NodeId]] = []
        self.in_call: dict[str, int] = {}
        self.decoding = 0
        self.busy_seconds = 0.0
        self.received = 0
        # Tokens, those that were delivered before included.
        self.decoded = 0
        self.fail: dict[str, list[Exception]] = {}
        self.cut_off_from: set[str] = set()
        self.budget_rows: int | None = None
        self.largest_held = 0
        self.salt = ""
        self.dead = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self._compute = asyncio.Lock()
        pool[self.address] = self

    def kill(self) -> None:
        """As SIGKILL: what it held is gone, and its calls fail."""
        self.dead.set()
        self.held.clear()
        self.pool.pop(self.address, None)

    def stop(self) -> None:
        """As SIGSTOP: it answers nothing."""
        self.goes_on.clear()

    def go_on(self) -> None:
        """As SIGCONT."""
        self.goes_on.set()

    @property
    def holds_nothing(self) -> bool:
        return not self.held and not any(self.in_call.values()) and not self.decoding

    def _held_rows(self) -> int:
        return sum(len(rows) for held in self.held.values() for rows in held.rows.values())

    async def _step(self, work: float) -> None:
        """Compute, in turn with other requests."""
        seconds = work / WORK_PER_SECOND / self.speed
        seconds *= 1 + self.jitter * self.rng.uniform(-1, 1)
        async with self._compute:
            await asyncio.sleep(seconds)
            await self.goes_on.wait()
            self.busy_seconds += seconds

    async def _answer(self, work: Awaitable[Any]) -> Any:
        """What `work` gives; ends with the worker, and comes only while it is not stopped."""
        task, died = asyncio.ensure_future(work), asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait({task, died}, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                task.cancel()
                raise WorkerLostError(f"{self.name} is gone")
            await self.goes_on.wait()
            return task.result()
        except asyncio.CancelledError:
            # That the caller has gone is heard late, or too late.
            asyncio.get_running_loop().call_later(self.rng.uniform(0, 3), task.cancel)
            raise
        finally:
            died.cancel()

    def _begin(self, job: Job, call: str, node: NodeId) -> Held:
        if self.dead.is_set():
            raise WorkerLostError(f"{self.name} is gone")
        if job.request_id in self.released:
            raise WorkerCallError("the request was released", "ABORTED")
        self.calls.append((call, job.request_id, node))
        if errors := self.fail.get(call):
            raise errors.pop()
        return self.held.setdefault(job.request_id, Held())

    def _check_attempt(self, held: Held, node: NodeId, attempt: int) -> None:
        if attempt <= held.dropped.get(node, 0):
            raise WorkerCallError("this attempt was dropped", "ABORTED")
        if node in held.jobs:
            older, task = held.jobs[node]
            assert attempt > older, "an attempt twice"
            task.cancel()
        held.forget(node)

    def _reserve(self, rows: int) -> None:
        self.largest_held = max(self.largest_held, self._held_rows())
        if self.budget_rows is not None and self._held_rows() + rows > self.budget_rows:
            raise WorkerCallError(f"{self.name} has no room", "RESOURCE_EXHAUSTED")

    def _prune(self, rows: set[tuple[int, int]], node: PlanNode, kept: Sequence[int]) -> None:
        gone = set(range(node.context_start, node.context_end)) - set(kept)
        rows -= {entry for entry in rows if entry[1] in gone}

    def _compute_node(
        self, node: PlanNode, rows: Sequence[int], own: set[tuple[int, int]]
    ) -> list[int]:
        layers = range(node.layer_start, node.layer_end)
        own |= {(layer, row) for layer in layers for row in rows}
        kept = survivors(node, rows, self.salt)
        self._prune(own, node, kept)
        return kept

    async def _work_on(
        self, job: Job, call: str, node: NodeId, attempt: int, work: Callable[[Held], Any]
    ) -> AsyncIterator[Any]:
        """Run `work`, an async generator, one event after the other, as a job of its own."""
        held = self._begin(job, call, node)
        self._check_attempt(held, node, attempt)
        running = self.in_call.get(job.request_id, 0) + 1
        self.in_call[job.request_id] = running
        events: asyncio.Queue[Any] = asyncio.Queue()

        async def job_of_its_own() -> None:
            try:
                async for event in work(held):
                    events.put_nowait(event)
            finally:
                self.in_call[job.request_id] -= 1

        task = asyncio.create_task(job_of_its_own())
        held.jobs[node] = (attempt, task)
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await self._answer_event(events)) is not None:
                yield event
            if task.cancelled():
                raise WorkerCallError("the work was stopped", "ABORTED")
            task.result()
        finally:
            if not task.done():
                asyncio.get_running_loop().call_later(self.rng.uniform(0, 3), task.cancel)
            task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _answer_event(self, events: asyncio.Queue[Any]) -> Any:
        return await self._answer(events.get())

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        async def work(held: Held) -> AsyncIterator[NodeDone]:
            top = job.plan.by_id[node]
            self._reserve(top.context_out * top.layer_end)
            own: set[tuple[int, int]] = set()
            done: dict[NodeId, list[int]] = {}
            for part in job.plan.subtree(node):
                await self._step(part.context_in * (part.layer_end - part.layer_start))
                rows = (
                    list(range(part.context_start, part.context_end))
                    if part.is_leaf
                    else [row for child in part.children for row in done.pop(child)]
                )
                done[part.id] = self._compute_node(part, rows, own)
                if part.id == node:
                    held.states[node], held.rows[node] = done[node], own
                runs = write_runs(done[part.id], part.context_start) if job.with_evidence else ()
                yield NodeDone(part.id, part.context_in, part.context_out, 0.0, kept_runs=runs)

        async with aclosing(
            cast(Any, self._work_on(job, "subtree", node, attempt, work))
        ) as events:
            async for event in events:
                yield event

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        part = job.plan.by_id[node]
        assert tuple(child for child, _ in children) == part.children

        async def work(held: Held) -> AsyncIterator[MergeDone]:
            self._reserve(part.context_out * (part.layer_end - part.layer_start))
            received, rows = 0, []
            for child, address in children:
                state = await self._fetch(job, child, address)
                received += len(state) if address else 0
                rows += state
            await self._step(part.context_in * (part.layer_end - part.layer_start))
            own: set[tuple[int, int]] = set()
            kept = self._compute_node(part, rows, own)
            for below in job.plan.subtree(node)[:-1]:
                self._prune(held.rows.get(below.id, set()), part, kept)
            held.states[node], held.rows[node] = kept, own
            self.received += received
            runs = write_runs(kept, part.context_start) if job.with_evidence else ()
            yield MergeDone(node, len(rows), len(kept), 0.0, 0.0, received, kept, kept_runs=runs)

        async with aclosing(cast(Any, self._work_on(job, "merge", node, attempt, work))) as events:
            done: list[MergeDone] = [event async for event in events]
        return done[-1]

    async def _fetch(self, job: Job, child: NodeId, address: str) -> list[int]:
        if not address:
            held = self.held.get(job.request_id)
            if held is None or child not in held.states:
                raise WorkerCallError(f"{child} is not here", "NOT_FOUND")
            return held.states[child]
        peer = await self._reach(address)
        if job.request_id not in peer.held or child not in peer.held[job.request_id].states:
            raise PeerCallError(f"{child} is not at {address}", "NOT_FOUND", address)
        return peer.held[job.request_id].states[child]

    async def _reach(self, address: str) -> FakeWorker:
        await asyncio.sleep(0.01)
        peer = self.pool.get(address)
        if peer is None or address in self.cut_off_from:
            raise PeerCallError(f"{address} does not answer", "UNAVAILABLE", address)
        await peer.goes_on.wait()
        return peer

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None:
        held = self._begin(job, "prune", node)

        async def work() -> None:
            await asyncio.sleep(self.rng.uniform(0, 0.1))
            for below in job.plan.subtree(node)[:-1]:
                rows = held.rows.get(below.id, set())
                self._prune(rows, job.plan.by_id[node], context_indices)

        await self._answer(work())

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        delivered: Sequence[Sequence[int] | None] = (),
    ) -> AsyncIterator[GenerateEvent]:
        held = self._begin(job, "generate", job.plan.root.id)
        if job.plan.root.id not in held.states:
            raise WorkerCallError("the root is not here", "NOT_FOUND")
        kept = held.states[job.plan.root.id]
        assert self.address not in shard_addresses
        self.decoding += 1
        try:
            rows = await self._answer(self._gather(job, shard_addresses, set(kept)))
            if len(rows) != len(set(rows)) or len(rows) != len(kept) * job.plan.num_layers:
                raise WorkerCallError("rows do not match", "FAILED_PRECONDITION")
            yield CacheReady(job.plan.kept_len, 0.0, 0.0, 0, kept)
            known = [*delivered, *[()] * (job.answers - len(delivered))]
            held.ended = {answer for answer, tokens in enumerate(known) if tokens is None}
            for place in range(job.sampling.max_new_tokens):
                await self._answer(self._step(4))
                for answer, tokens in enumerate(known):
                    if answer in held.ended or tokens is None:
                        continue
                    self.decoded += 1
                    if place < len(tokens):
                        assert tokens[place] == token_at(place, kept)
                    else:
                        yield TokenOut(token_at(place, kept), answer)
            for answer in set(range(job.answers)) - held.ended:
                yield GenerateDone(job.sampling.max_new_tokens, "length", 0.0, answer=answer)
        finally:
            self.decoding -= 1

    async def _gather(
        self, job: Job, addresses: Sequence[str], kept: set[int]
    ) -> list[tuple[int, int]]:
        rows = [entry for entry in self.held[job.request_id].all_rows() if entry[1] in kept]
        for address in addresses:
            peer = await self._reach(address)
            if job.request_id not in peer.held:
                raise PeerCallError("unknown request", "NOT_FOUND", address)
            rows += [entry for entry in peer.held[job.request_id].all_rows() if entry[1] in kept]
        return rows

    async def end_answer(self, request_id: str, answer: int) -> None:
        async def work() -> None:
            await asyncio.sleep(self.rng.uniform(0, 0.1))
            if held := self.held.get(request_id):
                held.ended.add(answer)

        await self._answer(work())

    async def drop(self, request_id: str, node: NodeId, attempt: int) -> None:
        async def work() -> None:
            await asyncio.sleep(self.rng.uniform(0, 0.1))
            held = self.held.get(request_id)
            if held is None or (node in held.jobs and held.jobs[node][0] > attempt):
                return
            held.dropped[node] = max(attempt, held.dropped.get(node, 0))
            if node in held.jobs:
                held.jobs[node][1].cancel()
            held.forget(node)

        await self._answer(work())

    async def release(self, request_id: str) -> None:
        async def work() -> None:
            await asyncio.sleep(self.rng.uniform(0, 0.1))
            self.released.add(request_id)
            held = self.held.pop(request_id, None)
            for _, task in held.jobs.values() if held else ():
                task.cancel()

        if request_id in self.released:
            raise AssertionError("released twice")
        await self._answer(work())

    async def reset(self, keep_request_ids: Sequence[str] = ()) -> None:
        self.held.clear()

    async def info(self) -> WorkerInfo:
        return WorkerInfo(
            model="fake",
            model_type="fake",
            num_layers=12,
            vocab_size=10_000,
            max_position_embeddings=4096,
            device="cpu",
            dtype="float32",
            calibrated=False,
            max_distance=0,
        )

    async def stats(self) -> WorkerStats:
        await self._answer(asyncio.sleep(0.001))
        return WorkerStats(len(self.held), 0, 0, 0, 0, 0)

    async def close(self) -> None:
        return None


def make_pool(
    count: int, seed: int = 0, *, jitter: float = 0.0, speeds: Sequence[float] = ()
) -> list[FakeWorker]:
    """`count` fakes that know each other."""
    pool: dict[str, FakeWorker] = {}
    rng = random.Random(seed)
    workers = [FakeWorker(f"worker-{number}", pool, rng, jitter) for number in range(count)]
    for worker, speed in zip(workers, speeds, strict=False):
        worker.speed = speed
    return workers


def make_job(
    context_len: int,
    *,
    request_id: str = "r",
    fan_in: int | None = None,
    layers: int = 12,
    new_tokens: int = 16,
    priority: int = 0,
    with_evidence: bool = False,
) -> Job:
    """A job of chunks of 16 tokens."""
    config = HomerConfig(max_chunk_len=16, target_len=12, warmup_layers=1, fan_in=fan_in)
    plan = MergePlan.build(2, context_len, 3, layers, config)
    return Job(
        request_id,
        plan,
        [1, 2],
        list(range(context_len)),
        [3, 4, 5],
        sampling=Sampling(max_new_tokens=new_tokens),
        priority=priority,
        with_evidence=with_evidence,
    )
