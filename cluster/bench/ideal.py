"""How fast a tree could be: work, critical path, and the best time on a number of workers.

Pure Python over a plan and the seconds of its nodes. Knows nothing about how they were measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from homer.plan import MergePlan, NodeId


@dataclass(frozen=True)
class TreeTime:
    """Seconds of a tree.

    Attributes
    ----------
    work : float
        All nodes, and what follows the root.
    critical_path : float
        The longest way from a leaf to the first token: no number of workers is faster.
    best : float
        The end of a schedule that always runs the ready nodes with the longest way ahead of them,
        where moving states costs nothing and workers never wait for orders.
    """

    workers: int
    work: float
    critical_path: float
    best: float

    @property
    def ideal_speedup(self) -> float:
        """How many times faster than one worker these could be."""
        return self.work / self.best

    @classmethod
    def of(
        cls,
        plan: MergePlan,
        seconds: Mapping[NodeId, float],
        workers: int,
        after_root: float = 0.0,
    ) -> TreeTime:
        """The times of `plan` with these `seconds` for its nodes.

        `after_root` is what follows the root on one worker: the suffix that is run once more.
        """
        ahead = _ways_ahead(plan, seconds)
        return cls(
            workers=workers,
            work=sum(seconds[node.id] for node in plan.nodes) + after_root,
            critical_path=max(ahead.values()) + after_root,
            best=_list_schedule(plan, seconds, ahead, workers) + after_root,
        )


def _ways_ahead(plan: MergePlan, seconds: Mapping[NodeId, float]) -> dict[NodeId, float]:
    """For each node, the seconds from its start to the root's end, if nothing waits."""
    ahead: dict[NodeId, float] = {}
    for node in reversed(plan.nodes):
        parent = plan.parents.get(node.id)
        ahead[node.id] = seconds[node.id] + (ahead[parent] if parent is not None else 0.0)
    return ahead


def _list_schedule(
    plan: MergePlan,
    seconds: Mapping[NodeId, float],
    ahead: Mapping[NodeId, float],
    workers: int,
) -> float:
    """When the root is done (Hu's algorithm: optimal for trees of equal nodes)."""
    missing = {node.id: len(node.children) for node in plan.merges}
    ready = [(-ahead[leaf.id], leaf.id) for leaf in plan.leaves]
    heapq.heapify(ready)
    running: list[tuple[float, NodeId]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, node = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[node], node))
        now, done = heapq.heappop(running)
        parent = plan.parents.get(done)
        if parent is not None:
            missing[parent] -= 1
            if not missing[parent]:
                heapq.heappush(ready, (-ahead[parent], parent))
    return now
