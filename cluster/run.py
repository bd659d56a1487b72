"""One job between submission and root: what is done, where it lies, what is next.

Pure bookkeeping. Knows nothing about asyncio, and calls no worker.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from dataclasses import dataclass

from cluster.cut import PieceQueue, boundary_heights, cut_plan
from cluster.errors import WorkerLostError
from cluster.job import Job, JobProgress, NodeDone, WorkerClient
from homer.plan import NodeId

MAX_ATTEMPTS = 2


@dataclass(frozen=True)
class Piece:
    """A subtree to run."""

    number: int
    node: NodeId
    attempt: int


@dataclass(frozen=True)
class Merge:
    """A merge to run, with the workers that hold its children, in context order."""

    node: NodeId
    children: tuple[tuple[NodeId, WorkerClient], ...]


class JobRun:
    """Follows `job` through the tree for a pool of `workers`."""

    def __init__(self, job: Job, workers: int, pieces_per_worker: int) -> None:
        self.job = job
        self.pieces = cut_plan(job.plan, workers, pieces_per_worker)
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.leaves_ended: float | None = None
        self.ended: float | None = None
        self.running = 0
        self.moved_bytes = 0
        self.nodes_by_worker: Counter[str] = Counter()
        self._queue = PieceQueue(boundary_heights(job.plan, self.pieces))
        self._attempts: Counter[int] = Counter()
        self._avoid: set[str] = set()
        self._order = {node.id: number for number, node in enumerate(job.plan.nodes)}
        self._finished: set[NodeId] = set()
        self._leaves_done = 0
        self._leaves_total = len(job.plan.leaves)
        self._merges_total = len(job.plan.nodes) - self._leaves_total
        self._ready: list[tuple[int, NodeId]] = []
        self._home: dict[NodeId, WorkerClient] = {}
        self._holders: dict[NodeId, dict[str, WorkerClient]] = {}

    @property
    def root_worker(self) -> WorkerClient | None:
        """The worker that holds the root's state, once it is done."""
        return self._home.get(self.job.plan.root.id)

    def holders(self, node: NodeId) -> list[WorkerClient]:
        """The workers that hold KV rows made below `node`."""
        return list(self._holders[node].values())

    def take_piece(self, worker: WorkerClient) -> Piece | None:
        """The next subtree for `worker`."""
        if worker.name in self._avoid:
            return None
        number = self._queue.take(worker.name)
        if number is None:
            return None
        if self.started is None:
            self.started = time.perf_counter()
        return Piece(number, self.pieces[number], self._attempts[number])

    def take_merge(self, worker: WorkerClient, *, most: bool) -> Merge | None:
        """The first ready merge of a child on `worker`; with `most`, of most of its rows."""
        for entry in self._ready:
            node = self.job.plan.by_id[entry[1]]
            rows: Counter[str] = Counter()
            for child in node.children:
                rows[self._home[child].name] += self.job.plan.by_id[child].context_out
            if worker.name in rows and (not most or rows[worker.name] == max(rows.values())):
                self._ready.remove(entry)
                return Merge(node.id, tuple((child, self._home[child]) for child in node.children))
        return None

    def node_done(self, done: NodeDone, worker: WorkerClient) -> JobProgress | None:
        """Count a finished node; None where it was counted before, by an earlier attempt."""
        if done.node in self._finished:
            return None
        self._finished.add(done.node)
        self.nodes_by_worker[worker.name] += 1
        if done.node.height == 0:
            self._leaves_done += 1
            if self._leaves_done == self._leaves_total:
                self.leaves_ended = time.perf_counter()
        return JobProgress(
            done=done,
            worker=worker.name,
            leaves_done=self._leaves_done,
            leaves_total=self._leaves_total,
            merges_done=len(self._finished) - self._leaves_done,
            merges_total=self._merges_total,
        )

    def piece_done(self, piece: Piece, worker: WorkerClient) -> None:
        """A subtree's state is on `worker`."""
        self._placed(piece.node, worker, {worker.name: worker})

    def merge_done(self, merge: Merge, worker: WorkerClient) -> None:
        """A merged state is on `worker`; the children's are used up."""
        holders = {worker.name: worker}
        for child, _ in merge.children:
            holders |= self._holders.pop(child)
            del self._home[child]
        self._placed(merge.node, worker, holders)

    def piece_failed(self, piece: Piece, worker: WorkerClient, error: Exception) -> None:
        """Give a subtree to another worker, or raise `error`.

        Raises
        ------
        WorkerLostError
            When the worker held other parts of the job, which are lost with it.
        """
        if isinstance(error, WorkerLostError) and any(
            worker.name in holders for holders in self._holders.values()
        ):
            raise error
        self._avoid.add(worker.name)
        self._queue.forget(worker.name)
        self._attempts[piece.number] += 1
        if self._attempts[piece.number] >= MAX_ATTEMPTS:
            raise error
        self._queue.put_back(piece.number)

    def can_go_on(self, workers: list[WorkerClient]) -> bool:
        """Whether some worker may still take pieces, if there are any left."""
        return not self._queue or any(worker.name not in self._avoid for worker in workers)

    def _placed(self, node: NodeId, worker: WorkerClient, holders: dict[str, WorkerClient]) -> None:
        self._home[node] = worker
        self._holders[node] = holders
        parent = self.job.plan.parents.get(node)
        if parent is None:
            self.ended = time.perf_counter()
        elif all(child in self._home for child in self.job.plan.by_id[parent].children):
            insort(self._ready, (self._order[parent], parent))
