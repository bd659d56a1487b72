"""What the parts of the scheduler share: settings, workers, requests, and the tasks of these.

Knows nothing about what the tasks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

from cluster.active import Active
from cluster.errors import WorkerCallError
from cluster.job import Job
from cluster.members import Member, Members
from cluster.observer import Observer
from cluster.run import JobRun
from cluster.scheduler_options import SchedulerOptions
from workers.logs import log_about

E = TypeVar("E")


class StalledError(WorkerCallError):
    """Nothing was heard from a call for too long."""


class Core:
    """Shared by the scheduler and its calls.

    Attributes
    ----------
    changed : callable
        To be told when something of a request has become free, ready or complete.
    has_room : callable
        To be told when a worker may take more.
    suspect : coroutine function
        Whether a worker to which a call failed is lost.
    lose_worker : callable
    restart : callable
        Run a request again from the start.
    last_progress : float
        When anything was last done anywhere.
    """

    changed: Callable[[Active], None]
    has_room: Callable[[Member], None]
    suspect: Callable[[Member, str], Coroutine[Any, Any, bool]]
    lose_worker: Callable[[str, str], None]
    restart: Callable[[Active], None]

    def __init__(self, options: SchedulerOptions, observer: Observer) -> None:
        self.options = options
        self.observer = observer
        self.members = Members()
        self.actives: dict[str, Active] = {}
        self.background: set[asyncio.Task[Any]] = set()
        self.last_progress = 0.0

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    def make_run(self, job: Job) -> JobRun:
        """A new pass over a job, for the workers that there are now."""

        def answers(name: str) -> int:
            member = self.members.get(name)
            return member.answers if member else 0

        workers = max(1, len(self.members))
        per_worker, members = self.options.pieces_per_worker, self.members
        return JobRun(job, workers, per_worker, answers, members.fits, members.speed)

    def spawn(
        self, active: Active, worker: str, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        """Run a call of a request; what it raises ends the request."""

        async def call() -> None:
            log_about(request_id=active.request_id, **({"worker": worker} if worker else {}))
            try:
                await work
            except Exception as error:
                active.fail(error)

        task = asyncio.create_task(call())
        active.tasks[task] = worker
        # Also called for a task that is cancelled before its first step.
        task.add_done_callback(lambda task: active.tasks.pop(task, None))
        task.add_done_callback(lambda _: work.close())
        return task

    def keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that outlives its request."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    async def heard(self, member: Member, events: AsyncIterator[E]) -> AsyncGenerator[E]:
        """The events of a call.

        Raises
        ------
        StalledError
            When nothing was heard for the stall timeout.
        """
        loop = asyncio.get_running_loop()
        limit = self.options.stall_timeout_seconds
        try:
            async with asyncio.timeout(limit or None) as timeout, aclosing(cast(Any, events)):
                async for event in events:
                    self.last_progress = loop.time()
                    # The time that the receiver takes does not count.
                    timeout.reschedule(None)
                    yield event
                    if limit:
                        timeout.reschedule(loop.time() + limit)
        except TimeoutError as error:
            raise StalledError(
                f"{member.name}: nothing was heard of a call for {limit:g} seconds"
            ) from error
