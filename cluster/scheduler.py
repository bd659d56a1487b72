"""Runs jobs on a pool of workers: subtrees to idle ones, merges where children live, the answer.

Plain asyncio over `WorkerClient`. One piece of work per worker at a time; merges go before new
subtrees, so that memory is freed early; older jobs merge first, and new subtrees come from the job
with the least work in hand. Whatever way a job ends, it is released on every worker. Knows nothing
about Ray, gRPC or tensors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from cluster.cut import PIECES_PER_WORKER, cut_plan
from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import (
    CacheReady,
    GenerateDone,
    Job,
    JobEvent,
    JobSummary,
    StageSeconds,
    TokenOut,
    WorkerClient,
)
from cluster.run import JobRun, Merge, Piece
from homer.errors import PromptError
from homer.plan import MergePlan, NodeId

_log = logging.getLogger(__name__)

RELEASE_TIMEOUT_SECONDS = 10.0


class _Active:
    """A job on its way to the root: its bookkeeping, its events, its running calls."""

    def __init__(self, run: JobRun) -> None:
        self.run = run
        self.events: asyncio.Queue[JobEvent | BaseException | None] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.ending = False


class Scheduler:
    """Runs any number of jobs over `workers`.

    Parameters
    ----------
    workers : sequence of WorkerClient
        With distinct names. At least one.
    pieces_per_worker : int
        The least number of subtrees per worker into which a plan is cut, where it has as many
        leaves.
    """

    def __init__(
        self, workers: Sequence[WorkerClient], *, pieces_per_worker: int = PIECES_PER_WORKER
    ) -> None:
        if not workers:
            raise ValueError("a scheduler needs at least one worker")
        self.workers = list(workers)
        self._pieces_per_worker = pieces_per_worker
        self._busy: set[str] = set()
        self._active: dict[str, _Active] = {}
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def running_jobs(self) -> int:
        """Jobs of which something has started."""
        return sum(active.run.started is not None for active in self._active.values())

    @property
    def queued_jobs(self) -> int:
        """Jobs of which nothing has started."""
        return len(self._active) - self.running_jobs

    def subtrees(self, plan: MergePlan) -> int:
        """The number of subtrees into which a plan is cut."""
        return len(cut_plan(plan, len(self.workers), self._pieces_per_worker))

    async def run(self, job: Job) -> AsyncIterator[JobEvent]:
        """Run `job`: progress events, the cache, tokens, then one `JobSummary`.

        Close the iterator to cancel. When it has ended, in whatever way, no worker holds anything
        of the job.

        Raises
        ------
        WorkerLostError
            When a worker died with parts of the job that are needed.
        WorkerCallError
            When a worker failed.
        PromptError
            When a job with this request id is running.
        """
        if job.request_id in self._active:
            raise PromptError(
                f"request id {job.request_id!r} is in use by a running request; choose another or "
                "leave it out"
            )
        active = _Active(JobRun(job, len(self.workers), self._pieces_per_worker))
        self._active[job.request_id] = active
        try:
            self._pump()
            while True:
                event = await active.events.get()
                if event is None:
                    break
                if isinstance(event, BaseException):
                    raise event
                yield event
            async for event in self._answer(active.run):
                yield event
        finally:
            ending = asyncio.create_task(self._end(active))
            self._keep(ending)
            await asyncio.shield(ending)

    async def drain(self) -> None:
        """Wait for what goes on behind ended jobs."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def _answer(self, run: JobRun) -> AsyncIterator[JobEvent]:
        job, worker = run.job, run.root_worker
        if worker is None or run.started is None or run.leaves_ended is None or run.ended is None:
            raise RuntimeError(f"{job.request_id}: no answer before the root is done")
        shards = [w.address for w in run.holders(job.plan.root.id) if w.name != worker.name]
        cache: CacheReady | None = None
        cache_at = first_at = 0.0
        async for event in worker.generate(job, 0, shards):
            match event:
                case CacheReady():
                    cache, cache_at = event, time.perf_counter()
                    run.moved_bytes += event.received_bytes
                    yield event
                case TokenOut():
                    first_at = first_at or time.perf_counter()
                    yield event
                case GenerateDone():
                    ended = time.perf_counter()
                    if cache is None:
                        break
                    # Where the answer is empty its end is the first that is heard of it.
                    first_at = first_at or ended
                    yield JobSummary(
                        generated_tokens=event.generated_tokens,
                        finish_reason=event.finish_reason,
                        kept_tokens=cache.cache_tokens,
                        context_indices=cache.context_indices,
                        seconds=StageSeconds(
                            queue=run.started - run.submitted,
                            leaves=run.leaves_ended - run.started,
                            merges=run.ended - run.leaves_ended,
                            gather=cache_at - run.ended,
                            time_to_first_token=first_at - run.submitted,
                            decode=ended - first_at,
                            total=ended - run.submitted,
                        ),
                        moved_bytes=run.moved_bytes,
                        nodes_by_worker=dict(run.nodes_by_worker),
                    )
                    return
        raise WorkerCallError(f"{worker.name} ended an answer before it was complete")

    async def _end(self, active: _Active) -> None:
        """Stop a job's calls and drop what is held for it everywhere."""
        job = active.run.job
        active.ending = True
        for task in active.tasks:
            task.cancel()
        await asyncio.gather(*active.tasks, return_exceptions=True)
        results = await asyncio.gather(
            *(
                asyncio.wait_for(worker.release(job.request_id), RELEASE_TIMEOUT_SECONDS)
                for worker in self.workers
            ),
            return_exceptions=True,
        )
        for worker, result in zip(self.workers, results, strict=True):
            if isinstance(result, BaseException):
                _log.warning("%s: not released on %s: %r", job.request_id, worker.name, result)
        del self._active[job.request_id]
        self._pump()

    def _pump(self) -> None:
        """Give every idle worker something to do, if there is anything."""
        for worker in self.workers:
            if worker.name not in self._busy:
                self._assign(worker)

    def _assign(self, worker: WorkerClient) -> None:
        by_age = [active for active in self._active.values() if not active.ending]
        by_load = sorted(by_age, key=lambda active: active.run.running)
        for active in by_age:
            if merge := active.run.take_merge(worker, most=True):
                return self._start(active, worker, self._run_merge(active, worker, merge))
        for active in by_load:
            if piece := active.run.take_piece(worker):
                return self._start(active, worker, self._run_piece(active, worker, piece))
        for active in by_age:
            if merge := active.run.take_merge(worker, most=False):
                return self._start(active, worker, self._run_merge(active, worker, merge))
        return None

    def _start(
        self, active: _Active, worker: WorkerClient, work: Coroutine[Any, Any, None]
    ) -> None:
        self._busy.add(worker.name)
        active.run.running += 1

        async def call() -> None:
            try:
                await work
            except Exception as error:
                active.events.put_nowait(error)

        def ended(task: asyncio.Task[None]) -> None:
            active.tasks.discard(task)
            active.run.running -= 1
            self._busy.discard(worker.name)
            self._pump()

        task = asyncio.create_task(call())
        active.tasks.add(task)
        # Also called for a task that is cancelled before its first step.
        task.add_done_callback(ended)
        task.add_done_callback(lambda _: work.close())

    async def _run_piece(self, active: _Active, worker: WorkerClient, piece: Piece) -> None:
        run = active.run
        try:
            async for done in worker.run_subtree(run.job, piece.node, piece.attempt):
                if progress := run.node_done(done, worker):
                    active.events.put_nowait(progress)
        except (WorkerLostError, WorkerCallError) as error:
            _log.warning("%s: %s on %s failed: %s", run.job.request_id, piece, worker.name, error)
            run.piece_failed(piece, worker, error)
            if not run.can_go_on(self.workers):
                raise
            return
        run.piece_done(piece, worker)
        self._check_root(active)

    async def _run_merge(self, active: _Active, worker: WorkerClient, merge: Merge) -> None:
        run = active.run
        children = [
            (child, "" if home.name == worker.name else home.address)
            for child, home in merge.children
        ]
        done = await worker.merge(run.job, merge.node, 0, children)
        run.moved_bytes += done.received_bytes
        run.merge_done(merge, worker)
        if progress := run.node_done(done, worker):
            active.events.put_nowait(progress)
        for holder in run.holders(merge.node):
            if holder.name != worker.name:
                self._prune(active, holder, merge.node, done.context_indices)
        self._check_root(active)

    def _prune(
        self, active: _Active, holder: WorkerClient, node: NodeId, context_indices: Sequence[int]
    ) -> None:
        """Let `holder` drop used states and lost rows; only its memory depends on it."""

        async def call() -> None:
            try:
                await holder.prune(active.run.job, node, 0, context_indices)
            except Exception as error:
                _log.warning(
                    "%s: not pruned on %s: %s", active.run.job.request_id, holder.name, error
                )

        task = asyncio.create_task(call())
        active.tasks.add(task)
        task.add_done_callback(active.tasks.discard)

    def _check_root(self, active: _Active) -> None:
        if active.run.root_worker is not None:
            active.events.put_nowait(None)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._background.add(task)
        task.add_done_callback(self._background.discard)
