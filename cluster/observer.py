"""Who watches the scheduler: metrics, logs, traces. The base class does nothing.

The scheduler calls these methods from the event loop, synchronously: they must not block and must
not raise. Knows nothing about what watchers do with what they hear.
"""

from __future__ import annotations

from typing import Literal

from cluster.job import CacheReady, Job, JobSummary, NodeDone
from homer.plan import NodeId

Outcome = Literal["finished", "failed", "cancelled", "refused"]


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
