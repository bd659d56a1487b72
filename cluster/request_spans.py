"""The spans of a request on the coordinator: the request, and the merges above the pieces.

A merge's span holds the whole subtree below it, so it opens with the first piece below. What
workers run becomes a part of it by the metadata of the calls. Knows nothing about gRPC.
"""

from __future__ import annotations

from typing import Any

from cluster.job import Job, JobSummary, NodeDone, Outcome
from cluster.observer import Observer
from homer.plan import MergePlan, NodeId
from workers.tracing import Metadata, Tracing


class RequestSpans:
    """The spans of one request, below the span that the running task follows."""

    def __init__(self, tracing: Tracing, request_id: str, plan: MergePlan) -> None:
        self._tracing = tracing
        self._plan = plan
        self._about = {"request_id": request_id}
        self._open: set[NodeId] = set()
        self._spans: dict[NodeId, Any] = {}
        self._request = tracing.start(
            "request",
            None,
            {
                **self._about,
                "tokens.prompt": plan.prompt_len,
                "leaves": len(plan.leaves),
                "merges": len(plan.merges),
            },
        )

    def below(self, node: NodeId | None) -> Metadata:
        """What a call carries whose spans belong below `node`; None is the request itself."""
        if not self._tracing.on:
            return ()
        return self._tracing.metadata(self._request if node is None else self._span(node))

    def above(self, node: NodeId) -> Metadata:
        """What a call carries that runs the whole subtree under `node`."""
        return self.below(self._plan.parents.get(node))

    def node_done(self, worker: str, done: NodeDone) -> None:
        """A merge above the pieces is done, or something inside a piece, which has its own span."""
        if done.node in self._open:
            self._open.discard(done.node)
            self._tracing.end(
                self._spans[done.node], {"worker": worker, "tokens.out": done.context_out}
            )

    def end(self, outcome: Outcome, summary: JobSummary | None) -> None:
        """End whatever is open, the lowest first."""
        error = None if outcome == "finished" else outcome
        for node in sorted(self._open):
            self._tracing.end(self._spans[node], error=error or "not needed")
        self._open.clear()
        tokens = 0 if summary is None else summary.generated_tokens
        self._tracing.end(
            self._request, {"outcome": outcome, "tokens.generated": tokens}, error=error
        )

    def _span(self, node: NodeId) -> Any:
        # What is run again below a merge that is done still belongs to it.
        if node not in self._spans:
            parent = self._plan.parents.get(node)
            above = self._request if parent is None else self._span(parent)
            planned = self._plan.by_id[node]
            self._spans[node] = self._tracing.start(
                "merge",
                above,
                {
                    **self._about,
                    "node.height": node.height,
                    "node.index": node.index,
                    "tokens.in": planned.context_in,
                },
            )
            self._open.add(node)
        return self._spans[node]


class SpanObserver(Observer):
    """Tells the spans of each job what the scheduler tells it."""

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        if job.spans is not None:
            job.spans.node_done(worker, done)

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        if job.spans is not None:
            job.spans.end(outcome, summary)
