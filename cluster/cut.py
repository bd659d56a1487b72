"""Cuts a plan into subtrees, and says which worker takes which next.

Pure Python over a plan. Knows nothing about workers but their names, and nothing about how work
runs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence

from homer.plan import MergePlan, NodeId

ALONE_PIECE_LEAVES = 8


def cut_plan(plan: MergePlan, workers: int, pieces_per_worker: int) -> tuple[NodeId, ...]:
    """The roots of the subtrees that are handed out, in context order.

    All of one height: the highest that gives each of `workers` at least `pieces_per_worker` pieces,
    else the leaves. Several pieces per worker let unequal workers finish together; large ones cost
    few calls, each some milliseconds. One worker has nobody to wait for and gets large ones.
    """
    wanted = workers * pieces_per_worker
    if workers == 1:
        wanted = min(wanted, max(1, len(plan.leaves) // ALONE_PIECE_LEAVES))
    heights: dict[int, list[NodeId]] = {}
    for node in plan.nodes:
        heights.setdefault(node.id.height, []).append(node.id)
    for height in sorted(heights, reverse=True):
        if len(heights[height]) >= wanted:
            return tuple(heights[height])
    return tuple(heights[0])


def boundary_heights(plan: MergePlan, cut: Sequence[NodeId]) -> list[int]:
    """For each piece of a cut, the height of the highest node whose span begins with it."""
    heights: list[int] = []
    for piece in cut:
        node = piece
        while (parent := plan.parents.get(node)) and plan.by_id[parent].children[0] == node:
            node = parent
        heights.append(node.height)
    return heights


class PieceQueue:
    """Hands out pieces, so that each worker gets a stretch of neighbours.

    Parameters
    ----------
    boundaries : sequence of int
        One per piece: how well a stretch may begin there, higher is better (`boundary_heights`).

    Notes
    -----

    A worker goes on to the right of its last piece. A worker without such a piece starts near the
    middle of the longest free stretch, or at its start where nobody works towards it. So neighbours
    tend to be merged where they were made, few states travel, and workers of unequal speed finish
    together.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self._boundaries = boundaries
        self._gaps: list[tuple[int, int]] = [(0, len(boundaries))] if boundaries else []
        self._next: dict[Hashable, int] = {}

    def __bool__(self) -> bool:
        return bool(self._gaps)

    def take(self, worker: Hashable) -> int | None:
        """The next piece for `worker`, or None when all are taken."""
        if not self._gaps:
            return None
        own = self._next.get(worker)
        for start, end in self._gaps:
            if start == own:
                return self._take(worker, start, end, start)
        start, end = max(self._gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        approached = start in self._next.values()
        return self._take(worker, start, end, self._middle(start, end) if approached else start)

    def put_back(self, piece: int) -> None:
        """Make a piece free again."""
        insort(self._gaps, (piece, piece + 1))

    def forget(self, worker: Hashable) -> None:
        """`worker` takes no more pieces: nobody works towards what lies to its right."""
        self._next.pop(worker, None)

    def _middle(self, start: int, end: int) -> int:
        """A good place to cut a stretch in two: the highest boundary near its middle."""
        middle, slack = start + (end - start) // 2, (end - start) // 8
        return max(
            range(middle - slack, middle + slack + 1),
            key=lambda piece: (self._boundaries[piece], -abs(piece - middle)),
        )

    def _take(self, worker: Hashable, start: int, end: int, piece: int) -> int:
        self._gaps.remove((start, end))
        for gap in ((start, piece), (piece + 1, end)):
            if gap[0] < gap[1]:
                insort(self._gaps, gap)
        self._next[worker] = piece + 1
        return piece
