"""What happened when and where, for each request: those that run, and the last that ended.

An observer of the scheduler. Workers' times are put on the coordinator's clock when a timeline is
read: then all that its messages tell of the clocks is known. Knows nothing about how it is shown.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.clocks import Bounds, Clocks
from cluster.job import CacheReady, Job, JobSummary, MergeDone, NodeDone, Outcome
from cluster.observer import Observer
from homer.plan import NodeId

# How much is kept of requests that have ended.
KEPT_REQUESTS = 256
KEPT_SLICES = 100_000

Kind = Literal["leaf", "merge", "transfer", "gather", "refresh", "decode"]
Stage = Literal["queued", "tree", "gather", "decode"]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Something that a worker did; `started` in unix seconds of the coordinator's clock."""

    kind: Kind
    worker: str
    node: NodeId
    children: Sequence[NodeId] = ()
    started: float
    seconds: float
    tokens_in: int = 0
    tokens_out: int = 0
    received_bytes: int = 0
    # The node was run again later, because this result was lost.
    lost: bool = False

    @property
    def ended(self) -> float:
        return self.started + self.seconds

    @property
    def step(self) -> Literal["node", "gather", "refresh", "decode"]:
        """What is done again when it is lost."""
        return self.kind if self.kind in ("gather", "refresh", "decode") else "node"


@dataclass
class Timeline:
    """One request. Times are unix seconds of the coordinator's clock; 0 for what was not yet."""

    job: Job
    queued: float
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    ended: float = 0.0
    outcome: Outcome | None = None
    generated_tokens: int = 0
    cache_worker: str = ""
    # Slices by their workers' clocks.
    raw: list[Slice] = field(default_factory=list)
    done: dict[NodeId, float] = field(default_factory=dict)
    bounds: dict[str, Bounds] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """Where a running request is."""
        if not self.started:
            return "queued"
        if self.job.plan.root.id not in self.done:
            return "tree"
        return "decode" if self.first_token else "gather"

    @property
    def leaves_done(self) -> int:
        return sum(node.height == 0 for node in self.done)

    def slices(self, clocks: Clocks) -> list[Slice]:
        """What workers did, on the coordinator's clock, in the order in which it was heard of."""
        ahead = {
            worker: bounds.within(clocks.bounds(worker)).ahead
            for worker, bounds in self.bounds.items()
        }
        last = {(one.node, one.step): number for number, one in enumerate(self.raw)}
        out = [
            replace(
                one,
                started=one.started - ahead[one.worker],
                # A transfer is followed by the merge that it is for.
                lost=last[one.node, one.step] > number + (one.kind == "transfer"),
            )
            for number, one in enumerate(self.raw)
        ]
        if self.first_token:
            begin = max((one.ended for one in out if one.kind == "refresh"), default=0.0)
            out.append(
                Slice(
                    kind="decode",
                    worker=self.cache_worker,
                    node=self.job.plan.root.id,
                    started=begin,
                    seconds=max(self.last_token - begin, 0.0),
                    tokens_out=self.generated_tokens,
                )
            )
        return out

    def add(self, one: Slice, after: float, heard: float) -> None:
        """Add what was heard of at `heard`, and cannot have begun before `after`."""
        low, high = one.started + one.seconds - heard, one.started - after
        known = self.bounds.get(one.worker)
        # Few messages tell more than those before.
        if known is None or low > known.low or high < known.high:
            told = Bounds(low, high)
            self.bounds[one.worker] = told if known is None else told.within(known)
        self.raw.append(one)


class Timelines(Observer):
    """The timelines of all requests.

    Parameters
    ----------
    clocks : Clocks
    kept_requests, kept_slices : int
        How many requests that have ended are kept, and how many slices they may have together.
    """

    def __init__(
        self,
        clocks: Clocks,
        kept_requests: int = KEPT_REQUESTS,
        kept_slices: int = KEPT_SLICES,
    ) -> None:
        self.clocks = clocks
        self._kept_requests = kept_requests
        self._kept_slices = kept_slices
        self._running: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()

    @property
    def running(self) -> list[Timeline]:
        """Requests that wait or run, the oldest first."""
        return list(self._running.values())

    def find(self, request_id: str) -> Timeline | None:
        """The last request that the service or its caller named so."""
        for timelines in (self._running, self._ended):
            for timeline in reversed(timelines.values()):
                job_id = timeline.job.request_id
                # A caller's own name has the service's behind it.
                if request_id in (job_id, job_id.rpartition("-")[0]):
                    return timeline
        return None

    def job_queued(self, job: Job) -> None:
        self._running[job.request_id] = Timeline(job, self.clocks.now())

    def job_started(self, job: Job) -> None:
        if timeline := self._running.get(job.request_id):
            timeline.started = self.clocks.now()

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        timeline = self._running.get(job.request_id)
        if timeline is None or not done.started_unix_seconds:
            return
        now = self.clocks.now()
        node = job.plan.by_id[done.node]
        children = [timeline.done[child] for child in node.children if child in timeline.done]
        after = max(children, default=timeline.started)
        if isinstance(done, MergeDone) and done.received_bytes:
            transfer = Slice(
                kind="transfer",
                worker=worker,
                node=done.node,
                started=done.transfer_started_unix_seconds,
                seconds=done.transfer_seconds,
                received_bytes=done.received_bytes,
            )
            timeline.add(transfer, after, now)
        timeline.add(
            Slice(
                kind="merge" if level else "leaf",
                worker=worker,
                node=done.node,
                children=node.children,
                started=done.started_unix_seconds,
                seconds=done.seconds,
                tokens_in=done.context_in,
                tokens_out=done.context_out,
            ),
            after,
            now,
        )
        timeline.done[done.node] = now

    def cache_ready(self, job: Job, worker: str, ready: CacheReady) -> None:
        timeline = self._running.get(job.request_id)
        if timeline is None:
            return
        timeline.cache_worker = worker
        if not ready.started_unix_seconds:
            return
        now, root = self.clocks.now(), job.plan.root.id
        gather = Slice(
            kind="gather",
            worker=worker,
            node=root,
            started=ready.started_unix_seconds,
            seconds=ready.gather_seconds,
            tokens_out=ready.cache_tokens,
            received_bytes=ready.received_bytes,
        )
        after = timeline.done.get(root, timeline.started)
        timeline.add(gather, after, now)
        refresh = Slice(
            kind="refresh",
            worker=worker,
            node=root,
            started=gather.ended,
            seconds=ready.refresh_seconds,
            tokens_in=job.plan.suffix_len,
        )
        timeline.add(refresh, after, now)

    def token(self, job: Job) -> None:
        if timeline := self._running.get(job.request_id):
            timeline.last_token = self.clocks.now()
            timeline.first_token = timeline.first_token or timeline.last_token
            timeline.generated_tokens += 1

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        timeline = self._running.pop(job.request_id, None)
        if timeline is None:
            return
        timeline.ended, timeline.outcome = self.clocks.now(), outcome
        # Its tokens are the caller's: a timeline keeps none.
        timeline.job = replace(job, prefix_ids=(), context_ids=(), suffix_ids=())
        self._ended[job.request_id] = timeline
        slices = sum(len(kept.raw) for kept in self._ended.values())
        while len(self._ended) > 1 and (
            len(self._ended) > self._kept_requests or slices > self._kept_slices
        ):
            _, dropped = self._ended.popitem(last=False)
            slices -= len(dropped.raw)

    def worker_lost(self, name: str, reason: str) -> None:
        self.clocks.forget(name)
