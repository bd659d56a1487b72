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
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from cluster.cut import cut_plan
from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import (
    CacheReady,
    GenerateDone,
    Job,
    JobEvent,
    JobSummary,
    SchedulerLoad,
    StageSeconds,
    TokenOut,
    WorkerClient,
)
from cluster.observer import Observer
from cluster.run import JobRun, Merge, Piece
from cluster.scheduler_options import SchedulerOptions
from homer.errors import PromptError
from homer.plan import MergePlan, NodeId
from workers.logs import log_about

_log = logging.getLogger(__name__)


class _Active:
    """A job on its way to the root: its bookkeeping, its events, its running calls."""

    def __init__(self, run: JobRun) -> None:
        self.run = run
        self.events: asyncio.Queue[JobEvent | BaseException | None] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.ending = False
        self.told = False


class Scheduler:
    """Runs any number of jobs over `workers`.

    Parameters
    ----------
    workers : sequence of WorkerClient
        With distinct names; others may join later.
    options : SchedulerOptions
    observer : Observer
        Told of everything that happens.

    Attributes
    ----------
    on_worker_lost : callable or None
        Called once with a worker's name and the reason when the scheduler has given it up.
    """

    def __init__(
        self,
        workers: Sequence[WorkerClient] = (),
        *,
        options: SchedulerOptions | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.options = options or SchedulerOptions()
        self.observer = observer or Observer()
        self.on_worker_lost: Callable[[str, str], None] | None = None
        self._workers: dict[str, WorkerClient] = {}
        self._draining: dict[str, WorkerClient] = {}
        self._busy: set[str] = set()
        self._active: dict[str, _Active] = {}
        self._background: set[asyncio.Task[Any]] = set()
        for worker in workers:
            self.add_worker(worker)

    @property
    def workers(self) -> list[WorkerClient]:
        """The workers that may get work."""
        return list(self._workers.values())

    def add_worker(self, client: WorkerClient) -> None:
        """Let a worker take work from now on. It must hold nothing: reset one that did."""
        if client.name in self._workers or client.name in self._draining:
            raise ValueError(f"a worker named {client.name} is there already")
        self._workers[client.name] = client
        self.observer.worker_joined(client.name)
        self._pump()

    def lose_worker(self, name: str, reason: str) -> None:
        """Give a worker up: nothing that comes from it counts any more."""
        gone = self._workers.pop(name, None) or self._draining.pop(name, None)
        if gone is None:
            return
        _log.warning("%s is lost: %s", name, reason)
        self.observer.worker_lost(name, reason)
        if self.on_worker_lost is not None:
            self.on_worker_lost(name, reason)
        self._pump()

    async def drain_worker(self, name: str, timeout_seconds: float) -> bool:
        """Give a worker nothing new, and remove it when it holds nothing any more.

        Returns whether that came about in time. Where not, it stays, without new work.
        """
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._draining[name] = worker
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        before = list(self._active.values())
        while any(self._active.get(active.run.job.request_id) is active for active in before):
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(0.05)
        self._draining.pop(name, None)
        return True

    @property
    def load(self) -> SchedulerLoad:
        """What there is to do now."""
        queued = [a.run.job for a in self._active.values() if a.run.started is None]
        return SchedulerLoad(
            running_jobs=len(self._active) - len(queued),
            queued_jobs=len(queued),
            queued_tokens=sum(job.plan.prompt_len for job in queued),
            busy_workers=tuple(name for name in self._workers if name in self._busy),
            idle_workers=tuple(name for name in self._workers if name not in self._busy),
            draining_workers=tuple(self._draining),
        )

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
        return len(cut_plan(plan, len(self._workers), self.options.pieces_per_worker))

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
        active = _Active(JobRun(job, len(self._workers), self.options.pieces_per_worker))
        self._active[job.request_id] = active
        self.observer.job_queued(job)
        outcome: Any = "cancelled"
        summary: JobSummary | None = None
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
                if isinstance(event, JobSummary):
                    outcome, summary = "finished", event
                yield event
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.observer.job_ended(job, outcome, summary)
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
                    self.observer.cache_ready(job, worker.name, event)
                    yield event
                case TokenOut():
                    first_at = first_at or time.perf_counter()
                    self.observer.token(job)
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
        workers = [*self._workers.values(), *self._draining.values()]
        results = await asyncio.gather(
            *(
                asyncio.wait_for(
                    worker.release(job.request_id), self.options.release_timeout_seconds
                )
                for worker in workers
            ),
            return_exceptions=True,
        )
        for worker, result in zip(workers, results, strict=True):
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
        if not active.told:
            active.told = True
            self.observer.job_started(active.run.job)

        async def call() -> None:
            log_about(request_id=active.run.job.request_id, worker=worker.name)
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
                    self.observer.node_done(run.job, worker.name, done, done.node.height)
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
            self.observer.node_done(run.job, worker.name, done, done.node.height)
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
