"""The fewest bytes of states that travel when workers share a tree evenly.

Pure Python over a plan and the bytes of its states. Knows nothing about schedulers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from homer.plan import MergePlan, NodeId

# So much more than an even share a worker may get, where that saves bytes.
UNEVEN = 0.03


def least_bytes(plan: MergePlan, state_bytes: Mapping[NodeId, int], workers: int) -> int:
    """The fewest bytes of states that go from one worker to another.

    Each of `workers` runs neighbouring leaves, at most 3% (`UNEVEN`) more of their work than where
    shares are as even as whole leaves allow. All such shares are tried, and each merge runs where
    that moves the fewest bytes.

    Parameters
    ----------
    plan : MergePlan
    state_bytes : mapping of NodeId to int
        What travels where a node's parent runs elsewhere.
    workers : int
        Those that there are; no more are used than the plan has leaves.
    """
    workers = min(workers, len(plan.leaves))
    if workers == 1:
        return 0
    work = [leaf.context_in * (leaf.layer_end - leaf.layer_start) for leaf in plan.leaves]
    done = [0, *accumulate(work)]
    most = int((1 + UNEVEN) * _least_largest(work, workers))
    return min(_placed(plan, state_bytes, ends) for ends in _shares(done, workers, most))


def _least_largest(work: Sequence[int], workers: int) -> int:
    """The largest share where the shares are as even as whole leaves allow."""

    def needed(most: int) -> int:
        shares, filled = 1, 0
        for leaf in work:
            if filled + leaf > most:
                shares, filled = shares + 1, 0
            filled += leaf
        return shares

    low, high = max(work), sum(work)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= workers else (middle + 1, high)
    return low


def _shares(done: Sequence[int], workers: int, most: int, first: int = 0) -> Iterator[list[int]]:
    """All ways to cut the leaves from `first` on into shares: the end of each share."""
    leaves = len(done) - 1
    if workers == 1:
        if done[-1] - done[first] <= most:
            yield [leaves]
        return
    for end in range(first + 1, leaves - workers + 2):
        if done[end] - done[first] > most:
            return
        if done[-1] - done[end] > (workers - 1) * most:
            continue
        for others in _shares(done, workers - 1, most, end):
            yield [end, *others]


def _placed(plan: MergePlan, state_bytes: Mapping[NodeId, int], ends: Sequence[int]) -> int:
    """The bytes that travel with these shares, where each merge runs in the best place."""
    starts = [0, *ends]
    owner = [share for share, end in enumerate(ends) for _ in range(starts[share], end)]
    # By node: what travels below it, by the worker that it runs on.
    costs: dict[NodeId, dict[int, int]] = {}
    leaf = 0
    for node in plan.nodes:
        if node.is_leaf:
            costs[node.id] = {owner[leaf]: 0}
            leaf += 1
            continue
        below = [(state_bytes[child], costs.pop(child)) for child in node.children]
        where = {worker for _, cost in below for worker in cost}
        costs[node.id] = {
            worker: sum(
                min(cost.get(worker, min(cost.values()) + moved), min(cost.values()) + moved)
                for moved, cost in below
            )
            for worker in where
        }
    return min(costs[plan.root.id].values())
