"""A request from submission to its end: its present pass, what was delivered, what runs for it.

Knows nothing about workers but their names.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.job import (
    CacheReady,
    Job,
    JobEvent,
    JobProgress,
    JobSummary,
    NodeDone,
    StageSeconds,
    Stop,
)
from cluster.run import JobRun
from homer.plan import NodeId

PACES = 64


@dataclass
class Times:
    """When each stage of a request ended, by the event loop's clock."""

    submitted: float
    started: float | None = None
    leaves: float | None = None
    root: float | None = None
    cache: float | None = None
    first_token: float | None = None


class Active:
    """One request.

    Attributes
    ----------
    run : JobRun
        The present pass. A request that is run again from the start has a new one, under a request
        id that no worker has seen.
    events : queue
        What its caller gets; an exception ends it.
    tasks : dict of Task to worker name
        Calls that go on; "" for those that belong to no worker.
    """

    def __init__(self, job: Job, make_run: Callable[[Job], JobRun], now: float) -> None:
        self.job = job
        self.times = Times(now)
        self.events: asyncio.Queue[JobEvent | BaseException] = asyncio.Queue()
        self.tasks: dict[asyncio.Task[None], str] = {}
        self.admitted = False
        self.ending = False
        self.estimate_bytes = 0.0
        # Its estimated tokens of KV by the number of pieces into which it is cut.
        self.footprints: dict[int, float] = {}
        self.passes = 0
        # Of each answer: the tokens that its caller has, and why it ended.
        self.delivered: list[list[int]] = [[] for _ in range(job.answers)]
        self.finish_reasons: dict[int, Stop] = {}
        self.cache: CacheReady | None = None
        self.answer: asyncio.Task[None] | None = None
        self.answer_attempt = 0
        self.answer_faults = 0
        self.mismatches = 0
        self.peer_faults: Counter[str] = Counter()
        # Workers that had no memory for work: until when they are not asked, and how often it was.
        self.refused_until: dict[str, float] = {}
        self.refusals = 0
        # Requests that are to end before this one, which gave way to them, is run again.
        self.yields_to: set[str] = set()
        # Seconds per work of the pieces (True) and merges that were done: what is usual.
        self.paces: dict[bool, deque[float]] = {
            piece: deque(maxlen=PACES) for piece in (True, False)
        }
        self.moved_bytes = 0
        self.nodes_by_worker: Counter[str] = Counter()
        self.evidence: dict[NodeId, tuple[str, NodeDone]] = {}
        self._make_run = make_run
        self._finished: set[NodeId] = set()
        self._leaves_done = 0
        self._leaves_total = len(job.plan.leaves)
        self.run = make_run(job)

    @property
    def open(self) -> bool:
        """Whether it may get workers now."""
        return self.admitted and not self.ending

    @property
    def request_id(self) -> str:
        return self.job.request_id

    def refused_since(self, moment: float) -> bool:
        """Whether a worker that refused a part for want of memory is left in peace until later."""
        latest = max(self.refused_until.values(), default=0.0)
        return self.refusals > 0 and latest > moment

    def begin_pass(self) -> None:
        """Everything is run from the start, under a new id; only delivered tokens stay."""
        self.passes += 1
        wire_job = replace(self.job, request_id=f"{self.request_id}~{self.passes}")
        self.run = self._make_run(wire_job)
        self.answer = None
        self.answer_attempt = 0
        self.peer_faults.clear()
        self.refused_until.clear()
        self.refusals = 0

    def recut(self) -> None:
        """Cut the plan anew, for the workers that there are now; nothing has started."""
        self.run = self._make_run(self.run.job)

    def fail(self, error: BaseException) -> None:
        """End the request with `error`."""
        self.ending = True
        self.events.put_nowait(error)

    def node_done(self, done: NodeDone, worker: str, now: float) -> None:
        """Report a finished node, unless it was finished before by an earlier try."""
        if done.node in self._finished:
            return
        self._finished.add(done.node)
        self.nodes_by_worker[worker] += 1
        if done.node.height == 0:
            self._leaves_done += 1
            if self._leaves_done == self._leaves_total:
                self.times.leaves = now
        if done.node == self.job.plan.root.id:
            self.times.root = now
        node = self.job.plan.by_id[done.node]
        self.events.put_nowait(
            JobProgress(
                done=done,
                worker=worker,
                context_start=node.context_start,
                context_end=node.context_end,
                leaves_done=self._leaves_done,
                leaves_total=self._leaves_total,
                merges_done=len(self._finished) - self._leaves_done,
                merges_total=len(self.job.plan.nodes) - self._leaves_total,
            )
        )

    def answer_ended(self, answer: int, reason: Stop) -> bool:
        """An answer has all its tokens; whether all answers have."""
        self.finish_reasons.setdefault(answer, reason)
        return len(self.finish_reasons) == self.job.answers

    def summary(self, cache: CacheReady, ended: float) -> JobSummary:
        """The last event, when all answers have ended.

        Stages that had to be run again count into those that came after.
        """
        times = self.times
        started = times.started or times.submitted
        leaves = times.leaves or started
        root = times.root or leaves
        ready = times.cache or root
        # Where the answer is empty its end is the first that is heard of it.
        first = times.first_token or ended
        return JobSummary(
            generated_tokens=sum(map(len, self.delivered)),
            finish_reasons=[self.finish_reasons[answer] for answer in range(self.job.answers)],
            kept_tokens=cache.cache_tokens,
            context_indices=cache.context_indices,
            seconds=StageSeconds(
                queue=started - times.submitted,
                leaves=leaves - started,
                merges=root - leaves,
                gather=ready - root,
                time_to_first_token=first - times.submitted,
                decode=ended - first,
                total=ended - times.submitted,
            ),
            moved_bytes=self.moved_bytes,
            nodes_by_worker=dict(self.nodes_by_worker),
            evidence=self.evidence,
        )
