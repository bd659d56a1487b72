"""Who watches the scheduler: metrics, logs, traces. The base class does nothing.

The scheduler calls these methods from the event loop, synchronously: they must not block and must
not raise. Knows nothing about what watchers do with what they hear.
"""

from __future__ import annotations

import logging
from typing import Any

from cluster.job import CacheReady, Job, JobSummary, NodeDone, Outcome
from homer.plan import NodeId

_log = logging.getLogger(__name__)


class Observer:
    """Hears what the scheduler does; override what is of interest.

    `worker` is a worker's name, as in `WorkerClient.name`. A `NodeDone` of a merge across workers
    is a `MergeDone`.
    """

    def job_queued(self, job: Job) -> None:
        """`job` was submitted."""

    def job_started(self, job: Job) -> None:
        """The first piece of `job` was handed to a worker."""

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        """A node of height `level` above the leaves is done; called once for each node and run."""

    def cache_ready(self, job: Job, worker: str, ready: CacheReady) -> None:
        """`worker` has gathered the final cache; again when another had to do so later."""

    def token(self, job: Job) -> None:
        """One token of the answer."""

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        """A node is run again; `cause` is one of "lost", "peer", "fault", "refused", "slow"."""

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        """`job` is over; `summary` where it has finished. Never more than once."""

    def worker_joined(self, name: str) -> None:
        """A worker may get work from now on."""

    def worker_lost(self, name: str, reason: str) -> None:
        """A worker was given up; what it held is run again elsewhere."""


class Observers(Observer):
    """Tells several observers; what one of them raises is logged, and disturbs nobody else."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def job_queued(self, job: Job) -> None:
        self._tell("job_queued", job)

    def job_started(self, job: Job) -> None:
        self._tell("job_started", job)

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        self._tell("node_done", job, worker, done, level)

    def cache_ready(self, job: Job, worker: str, ready: CacheReady) -> None:
        self._tell("cache_ready", job, worker, ready)

    def token(self, job: Job) -> None:
        self._tell("token", job)

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        self._tell("retried", job, node, cause)

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        self._tell("job_ended", job, outcome, summary)

    def worker_joined(self, name: str) -> None:
        self._tell("worker_joined", name)

    def worker_lost(self, name: str, reason: str) -> None:
        self._tell("worker_lost", name, reason)

    def _tell(self, method: str, *what: Any) -> None:
        for observer in self._observers:
            try:
                getattr(observer, method)(*what)
            except Exception:
                _log.exception("%s of %s failed", method, type(observer).__name__)
