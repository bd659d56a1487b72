"""Log lines about requests and workers: an observer of the scheduler.

Each line names its request. Knows nothing about how lines are written.
"""

from __future__ import annotations

import logging

from cluster.job import CacheReady, Job, JobSummary, NodeDone, Outcome
from cluster.observer import Observer
from homer.plan import NodeId
from workers.logs import logging_about

_log = logging.getLogger(__name__)


class RequestLog(Observer):
    """Says when requests come, go on again after a fault, and end, and which workers there are."""

    def job_queued(self, job: Job) -> None:
        with logging_about(request_id=job.request_id):
            _log.info(
                "queued: %d prompt tokens, %d leaves, %d merges",
                job.plan.prompt_len,
                len(job.plan.leaves),
                len(job.plan.merges),
            )

    def job_started(self, job: Job) -> None:
        with logging_about(request_id=job.request_id):
            _log.info("started")

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        if not _log.isEnabledFor(logging.DEBUG):
            return
        with logging_about(request_id=job.request_id, worker=worker, node=_name(done.node)):
            _log.debug(
                "done in %.3f s: %d tokens in, %d out",
                done.seconds,
                done.context_in,
                done.context_out,
            )

    def cache_ready(self, job: Job, worker: str, ready: CacheReady) -> None:
        with logging_about(request_id=job.request_id, worker=worker):
            _log.info(
                "final cache: %d tokens, gathered in %.3f s, refreshed in %.3f s",
                ready.cache_tokens,
                ready.gather_seconds,
                ready.refresh_seconds,
            )

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        with logging_about(request_id=job.request_id, node=_name(node)):
            _log.warning("run again: %s", cause)

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        with logging_about(request_id=job.request_id):
            if summary is None:
                _log.warning("ended: %s", outcome)
                return
            _log.info(
                "ended: %s (%s), %d tokens, first after %.3f s, all after %.3f s",
                outcome,
                summary.finish_reason,
                summary.generated_tokens,
                summary.seconds.time_to_first_token,
                summary.seconds.total,
            )

    def worker_joined(self, name: str) -> None:
        with logging_about(worker=name):
            _log.info("joined")

    def worker_lost(self, name: str, reason: str) -> None:
        with logging_about(worker=name):
            _log.warning("lost: %s", reason)


def _name(node: NodeId) -> str:
    return f"{node.height}/{node.index}"
