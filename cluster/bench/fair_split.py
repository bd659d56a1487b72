"""The fewest bytes of states that travel when workers share a tree.

Pure Python over a plan and the bytes of its states. Knows nothing about schedulers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from homer.plan import MergePlan, NodeId

# So much more than its part a worker may get, where that saves bytes.
UNEVEN = 0.03
# How far the room for each worker is widened at a time, until whole leaves fit.
STEP = 0.01


def least_bytes(plan: MergePlan, state_bytes: Mapping[NodeId, int], parts: Sequence[float]) -> int:
    """The fewest bytes of states that go from one worker to another.

    Each worker runs neighbouring leaves, at most 3% (`UNEVEN`) more of their work than where the
    shares are as near to `parts` as whole leaves allow. All such shares are tried, with the workers
    in every order, and each merge runs where that moves the fewest bytes.

    Parameters
    ----------
    plan : MergePlan
    state_bytes : mapping of NodeId to int
        What travels where a node's parent runs elsewhere.
    parts : sequence of float
        What each worker does in relation to the others: their speeds, or the work that each did.
        More workers than leaves leave the rest idle.
    """
    work = [leaf.context_in * (leaf.layer_end - leaf.layer_start) for leaf in plan.leaves]
    parts = [part for part in sorted(parts, reverse=True) if part > 0][: len(work)]
    if len(parts) == 1:
        return 0
    done = [0, *accumulate(work)]
    even = [done[-1] * part / sum(parts) for part in parts]
    orders = list(_orders(even))
    room = 1.0
    while not any(_fits(done, [room * most for most in order]) for order in orders):
        room += STEP
    room *= 1 + UNEVEN
    return min(
        _placed(plan, state_bytes, ends)
        for order in orders
        for ends in _shares(done, [room * most for most in order])
    )


def _orders(parts: Sequence[float]) -> Iterator[list[float]]:
    """All different orders."""
    if not parts:
        yield []
    for first in sorted(set(parts)):
        rest = list(parts)
        rest.remove(first)
        for others in _orders(rest):
            yield [first, *others]


def _fits(done: Sequence[int], rooms: Sequence[float]) -> bool:
    """Whether all leaves have a place where each worker in turn takes what it has room for."""
    first = 0
    for room in rooms:
        first = bisect_right(done, done[first] + room) - 1
    return first == len(done) - 1


def _shares(done: Sequence[int], rooms: Sequence[float], first: int = 0) -> Iterator[list[int]]:
    """All ways to cut the leaves from `first` on into a share for each room: their ends."""
    leaves = len(done) - 1
    if len(rooms) == 1:
        if done[-1] - done[first] <= rooms[0]:
            yield [leaves]
        return
    for end in range(first + 1, leaves - len(rooms) + 2):
        if done[end] - done[first] > rooms[0]:
            return
        if done[-1] - done[end] > sum(rooms[1:]):
            continue
        for others in _shares(done, rooms[1:], end):
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
