"""Runs jobs on a pool of workers: pieces to those with room, merges where children live, answers.

Plain asyncio over `WorkerClient`. This module takes requests from submission to release and keeps
the membership; who gets which work is in `dispatch` and `assign`, what a call does and what its
failure means in `node_calls` and `answers`.
Whatever way a job ends, it is released on every worker that had a part of it. Knows nothing about
Ray, gRPC or tensors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import Context

from cluster.active import Active
from cluster.admission import Admission
from cluster.answers import Answers
from cluster.core import Core
from cluster.cut import cut_plan
from cluster.dispatch import Dispatcher
from cluster.errors import OverloadedError, RequestAbortedError, WorkerLostError
from cluster.heartbeat import Heartbeat
from cluster.job import Job, JobEvent, JobSummary, Outcome, SchedulerLoad, WorkerClient
from cluster.members import Member
from cluster.node_calls import NodeCalls
from cluster.observer import Observer
from cluster.patience import Patience
from cluster.run import JobRun
from cluster.scheduler_options import SchedulerOptions
from homer.errors import HomerError, PromptError
from homer.plan import MergePlan

_log = logging.getLogger(__name__)

TICK_SECONDS = 1.0


class Scheduler:
    """Runs any number of jobs over `workers`. Make it, and use it, in one event loop.

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
        self._core = core = Core(self.options, self.observer)
        self._members, self._actives = core.members, core.actives
        self._heartbeat = Heartbeat(self.options, self.lose_worker)
        self._admission = Admission(self.options, core.members)
        self._nodes = NodeCalls(core, self._admission)
        self._answers = Answers(core, self._nodes)
        self._dispatcher = Dispatcher(core, self._nodes, self._answers)
        self._patience = Patience(core)
        core.changed, core.has_room = self._dispatcher.changed, self._dispatcher.fill
        core.suspect, core.lose_worker = self._heartbeat.suspect, self.lose_worker
        core.restart = self._restart
        self._ticker: asyncio.Task[None] | None = None
        for worker in workers:
            self.add_worker(worker)

    @property
    def workers(self) -> list[WorkerClient]:
        """The workers that may get work."""
        return [member.client for member in self._members]

    @property
    def running_jobs(self) -> int:
        """Jobs of which something has started."""
        return sum(active.times.started is not None for active in self._actives.values())

    @property
    def queued_jobs(self) -> int:
        """Jobs of which nothing has started."""
        return len(self._actives) - self.running_jobs

    @property
    def load(self) -> SchedulerLoad:
        """What there is to do now."""
        queued = [a.job for a in self._actives.values() if a.times.started is None]
        return SchedulerLoad(
            running_jobs=len(self._actives) - len(queued),
            queued_jobs=len(queued),
            queued_tokens=sum(job.plan.prompt_len for job in queued),
            busy_workers=tuple(m.name for m in self._members if m.load),
            idle_workers=tuple(m.name for m in self._members if not m.load),
            draining_workers=tuple(m.name for m in self._members.everybody if m.draining),
            growing_jobs=len(self._admission.growing),
        )

    @property
    def deserted(self) -> bool:
        """Whether requests are given up for want of a worker, those that come now included."""
        return self._patience.deserted

    def expect_workers(self, most: int) -> None:
        """So many workers there could be: what needs more than there are waits for them."""
        self._admission.most_workers = most

    def subtrees(self, plan: MergePlan) -> int:
        """The number of pieces into which a plan is cut at first."""
        return len(cut_plan(plan, max(1, len(self._members)), self.options.pieces_per_worker))

    def add_worker(self, client: WorkerClient, layers: int | None = None) -> None:
        """Let a worker take work from now on. It must hold nothing: reset one that did.

        With `layers` it has only so many of the lowest, and gets nodes that need no more.

        Raises
        ------
        ValueError
            When a worker of this name is there.
        """
        if self._members.get(client.name) is not None:
            raise ValueError(f"a worker named {client.name} is there already")
        member = Member(client, layers)
        self._members.add(member)
        self._heartbeat.watch(member, self._admit)
        self._admission.worker_joined(self._core.now())
        self._patience.worker_joined()
        self.observer.worker_joined(client.name)
        self._admit()
        self._dispatcher.fill(member)

    def lose_worker(self, name: str, reason: str) -> None:
        """Give a worker up: nothing that comes from it counts, what it held is run again."""
        member = self._members.get(name)
        if member is None:
            return
        _log.warning("%s is lost: %s", name, reason)
        member.lost = True
        self._members.remove(member)
        self._heartbeat.forget(member)
        self.observer.worker_lost(name, reason)
        touched = [a for a in self._actives.values() if name in a.run.touched]
        for active in touched:
            self._lose_parts(active, name, reason)
        member.empty.set()
        if self.on_worker_lost is not None:
            self.on_worker_lost(name, reason)
        for active in touched:
            self._dispatcher.changed(active)

    async def drain_worker(self, name: str, timeout_seconds: float) -> bool:
        """Give a worker nothing new, and remove it when it holds nothing any more.

        Returns whether that came about in time. Where not, it stays, without new work: lose it, or
        drain it again.
        """
        member = self._members.get(name)
        if member is None:
            return True
        self._members.drain(member)
        for active in self._actives.values():
            active.run.retire(name)
        self._dispatcher.offer_adrift()
        try:
            async with asyncio.timeout(timeout_seconds):
                await member.empty.wait()
        except TimeoutError:
            return False
        self._members.remove(member)
        self._heartbeat.forget(member)
        return True

    async def run(self, job: Job) -> AsyncIterator[JobEvent]:
        """Run `job`: progress events, the cache, tokens, then one `JobSummary`.

        Close the iterator to cancel. When it has ended, in whatever way, no worker holds anything
        of the job.

        Raises
        ------
        OverloadedError
            At once, when too much waits already.
        CapacityError
            When all workers together have not the memory for it.
        NoWorkersError
            When no worker is left, and none has joined in time.
        WorkerLostError, WorkerCallError
            When workers were lost, or failed, over the same part of the job too often.
        PromptError
            When the request is wrong, or one with this request id is running.
        """
        if job.request_id in self._actives:
            raise PromptError(
                f"request id {job.request_id!r} is in use by a running request; choose another or "
                "leave it out"
            )
        active = Active(job, self._core.make_run, self._core.now())
        self._actives[job.request_id] = active
        self.observer.job_queued(job)
        outcome: Outcome = "cancelled"
        summary: JobSummary | None = None
        try:
            self._enter(active)
            while summary is None:
                event = await active.events.get()
                if isinstance(event, BaseException):
                    raise event
                summary = event if isinstance(event, JobSummary) else None
                outcome = "finished" if summary else outcome
                yield event
        except OverloadedError:
            outcome = "refused"
            raise
        except RequestAbortedError:
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.observer.job_ended(job, outcome, summary)
            ending = self._core.keep(self._end(active))
            await asyncio.shield(ending)

    def stop_answer(self, request_id: str, answer: int = 0) -> None:
        """An answer is long enough. With the last one the job ends: its summary comes next."""
        active = self._actives.get(request_id)
        if active is None or active.cache is None or active.ending:
            return
        if active.answer_ended(answer, "stop"):
            active.events.put_nowait(active.summary(active.cache, self._core.now()))
        else:
            self._answers.end(active, answer)

    def abort(self, request_id: str, error: RequestAbortedError) -> None:
        """End a job, wherever it is, with `error`; nothing where it does not run."""
        active = self._actives.get(request_id)
        if active is not None and not active.ending:
            active.fail(error)

    async def drain(self) -> None:
        """Wait for what goes on behind ended jobs."""
        while self._core.background:
            await asyncio.gather(*self._core.background, return_exceptions=True)

    async def close(self) -> None:
        """Wait for what goes on behind ended jobs, and stop watching the workers."""
        await self.drain()
        if self._ticker is not None:
            self._ticker.cancel()
        await self._heartbeat.close()

    def _enter(self, active: Active) -> None:
        now = self._core.now()
        self._admission.enter(active)
        self._admit()
        self._admission.check_bounds(active, self._actives.values(), now)
        if self._ticker is None or self._ticker.done():
            self._core.last_progress = now
            # It outlives this request, and is about all: nothing of what it logs is this one's.
            self._ticker = asyncio.create_task(self._tick(), context=Context())

    def _admit(self) -> None:
        for active in self._admission.admit(self._core.now()):
            if not active.run.touched:
                active.recut()
            self._dispatcher.changed(active)

    def _lose_parts(self, active: Active, name: str, reason: str) -> None:
        run = active.run
        for node in run.lose(name):
            self.observer.retried(active.job, node, "lost")
            if run.units[node].losses >= self.options.max_losses:
                active.fail(
                    WorkerLostError(
                        f"{self.options.max_losses} workers were lost while they ran node "
                        f"{tuple(node)}; the last: {name}: {reason}"
                    )
                )
        self._answers.worker_lost(active, name)
        for task, worker in list(active.tasks.items()):
            if worker == name:
                task.cancel()

    def _restart(self, active: Active) -> None:
        """Run a request again from the start, under a new id."""
        if active.open:
            active.admitted = False
            self._core.keep(self._begin_again(active))

    async def _begin_again(self, active: Active) -> None:
        _log.warning("%s: everything is run again", active.run.job.request_id)
        await self._stop_calls(active)
        await self._release(active)
        if not active.ending:
            active.begin_pass()
            self._admission.hold_back(active)
            self._admit()

    async def _end(self, active: Active) -> None:
        """Stop a job's calls and drop what is held for it everywhere."""
        active.ending = True
        await self._stop_calls(active)
        await self._release(active)
        self._admission.leave(active)
        del self._actives[active.request_id]
        self._admit()

    async def _stop_calls(self, active: Active) -> None:
        current = asyncio.current_task()
        while tasks := [task for task in active.tasks if task is not current]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _release(self, active: Active) -> None:
        run = active.run
        await asyncio.gather(
            *(
                self._release_on(member, run)
                for n in run.touched
                if (member := self._members.get(n))
            )
        )
        for name in run.touched:
            if (gone := self._members.get(name)) is not None:
                gone.released(active.request_id)

    async def _release_on(self, member: Member, run: JobRun) -> None:
        request_id = run.job.request_id
        try:
            async with asyncio.timeout(self.options.release_timeout_seconds):
                await member.client.release(request_id)
        except (HomerError, TimeoutError) as error:
            _log.warning("%s: not released on %s: %r", request_id, member.name, error)

    async def _tick(self) -> None:
        """While there are jobs: what comes about by waiting alone."""
        while self._actives:
            await asyncio.sleep(TICK_SECONDS)
            self._admit()
            self._dispatcher.offer_adrift()
            self._dispatcher.use_idle()
            self._patience.check_workers()
            self._patience.check_memory()
