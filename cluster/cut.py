"""Cuts a plan into pieces (subtrees), and says which worker takes which next.

Pure Python over a plan. Knows nothing about workers but their names and their pace, and nothing
about how work runs.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple, Protocol

from homer.plan import MergePlan, NodeId

# What one worker alone gets in one piece.
ALONE_PIECE_LEAVES = 8
# A worker takes the last leaf from another's stretch only where that one would have it done so many
# times later: else it saves little, and one state more travels.
WORTH_TAKING = 1.5
# So many stretches are looked at in vain before a worker is left idle for now.
LOOKS = 32


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


class Span(NamedTuple):
    """The leaves below a node, `first` up to `end`, and the work of its whole subtree."""

    first: int
    end: int
    work: int


class PlanIndex:
    """Where the nodes of a plan lie among its leaves, and how much work they are.

    Work is counted in context tokens times layers: good enough to compare pieces of one plan.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.spans: dict[NodeId, Span] = {}
        self.node_work: dict[NodeId, int] = {}
        # By leaf: the height of the highest node whose span begins with it.
        self.boundaries: list[int] = []
        for node in plan.nodes:
            work = max(1, node.context_in * (node.layer_end - node.layer_start))
            self.node_work[node.id] = work
            if node.is_leaf:
                leaf = len(self.boundaries)
                self.spans[node.id] = Span(leaf, leaf + 1, work)
                self.boundaries.append(0)
            else:
                below = [self.spans[child] for child in node.children]
                work += sum(span.work for span in below)
                self.spans[node.id] = Span(below[0].first, below[-1].end, work)
                self.boundaries[below[0].first] = node.id.height


class Pace(Protocol):
    """How fast the workers of a job are."""

    def speed(self, worker: str) -> float:
        """Work per second."""
        ...

    def busy_seconds(self, worker: str) -> float:
        """How long `worker` will be at what it has."""
        ...

    def largest(self, worker: str) -> float:
        """The most work that `worker` may take at once without making the others wait."""
        ...


@dataclass(eq=False)
class _Gap:
    """A stretch of free pieces, neighbours in the document: leaves `start` up to `end`."""

    pieces: deque[NodeId]
    start: int
    end: int
    work: int


class PieceQueue:
    """Hands out pieces, so that each worker gets a stretch of neighbours.

    Parameters
    ----------
    index : PlanIndex
    pieces : sequence of NodeId
        The pieces in context order.
    on_split : callable
        Told of each piece that is cut into its children, which are pieces from then on.
    fits : callable
        Whether a worker has the layers that a piece runs. What fits no leaf gets nothing; what fits
        only leaves gets pieces cut down to them.

    Notes
    -----
    A worker goes on to the right of its last piece. A worker without such a piece takes the longest
    free stretch; where another works towards it, the two share it by their pace. So neighbours tend
    to be merged where they were made, and few states travel. Near the end pieces that would keep
    one worker busy for longer than the others are cut into their children, so that workers of
    unequal speed finish together. Each call costs about the logarithm of the number of pieces.
    """

    def __init__(
        self,
        index: PlanIndex,
        pieces: Sequence[NodeId],
        on_split: Callable[[NodeId], None],
        fits: Callable[[str, NodeId], bool] = lambda *_: True,
    ) -> None:
        self._index = index
        self._on_split = on_split
        self._fits = fits
        self._starts: dict[int, _Gap] = {}
        self._ends: dict[int, _Gap] = {}
        # By work, the largest first; entries of gaps that have changed since are stale.
        self._largest: list[tuple[int, int]] = []
        self._next: dict[str, int] = {}
        self._coming: dict[int, set[str]] = {}
        self.free_work = 0
        if pieces:
            self._add(deque(pieces))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def take(self, worker: str, pace: Pace) -> NodeId | None:
        """The next piece for `worker`; None when there is none, or it had better wait."""
        if not self._fits(worker, self._index.plan.nodes[0].id):
            return None
        own = self._next.get(worker)
        gap = self._starts.get(own) if own is not None else None
        if gap is None:
            gap = self._other(worker, pace)
        if gap is None:
            return None
        piece = gap.pieces[0]
        while (
            not self._fits(worker, piece) or self._work(piece) > pace.largest(worker)
        ) and self._split_first(gap):
            piece = gap.pieces[0]
        self._remove(gap)
        gap.pieces.popleft()
        if gap.pieces:
            self._add(gap.pieces, gap.work - self._work(piece))
        self.forget(worker)
        end = self._index.spans[piece].end
        self._next[worker] = end
        self._coming.setdefault(end, set()).add(worker)
        return piece

    def put_back(self, piece: NodeId) -> None:
        """Make a piece free again."""
        span = self._index.spans[piece]
        pieces = deque([piece])
        if before := self._ends.get(span.first):
            self._remove(before)
            pieces.extendleft(reversed(before.pieces))
        if after := self._starts.get(span.end):
            self._remove(after)
            pieces.extend(after.pieces)
        self._add(pieces)

    def forget(self, worker: str) -> None:
        """Nobody works towards what lies to the right of this worker's last piece."""
        place = self._next.pop(worker, None)
        if place is not None:
            self._coming[place].discard(worker)
            if not self._coming[place]:
                del self._coming[place]

    def _other(self, worker: str, pace: Pace) -> _Gap | None:
        """A stretch to begin: the longest, or one that nobody is coming to in time."""
        while self._largest:
            work, start = self._largest[0]
            gap = self._starts.get(start)
            if gap is None or gap.work != -work:
                heapq.heappop(self._largest)
                continue
            if begun := self._begin(gap, worker, pace):
                return begun
            break
        # The longest stretch is one leaf that is better left alone, as most of the others are.
        for gap in list(islice(self._starts.values(), LOOKS)):
            if begun := self._begin(gap, worker, pace):
                return begun
        return None

    def _begin(self, gap: _Gap, worker: str, pace: Pace) -> _Gap | None:
        coming = self._coming.get(gap.start)
        if not coming:
            return gap
        other = max(coming, key=pace.speed)
        while len(gap.pieces) == 1:
            if not self._split_first(gap):
                # One leaf is taken away only from a worker that would be long in coming to it.
                wait = pace.busy_seconds(other) + gap.work / pace.speed(other)
                return gap if wait >= WORTH_TAKING * gap.work / pace.speed(worker) else None
        ours = pace.speed(worker) / (pace.speed(worker) + pace.speed(other))
        return self._cut(gap, self._place_to_cut(gap, 1 - ours))

    def _place_to_cut(self, gap: _Gap, share: float) -> int:
        """A place near `share` of a stretch's work: the one where the highest node begins."""
        done = list(accumulate(self._work(piece) for piece in gap.pieces))
        target = share * gap.work
        best = min(range(1, len(done)), key=lambda place: abs(done[place - 1] - target))
        slack = len(done) // 8
        spans, boundaries = self._index.spans, self._index.boundaries
        pieces = list(gap.pieces)
        return max(
            range(max(1, best - slack), min(len(done) - 1, best + slack) + 1),
            key=lambda place: (boundaries[spans[pieces[place]].first], -abs(place - best)),
        )

    def _cut(self, gap: _Gap, place: int) -> _Gap:
        """Cut a stretch in two; returns the right one."""
        pieces = list(gap.pieces)
        self._remove(gap)
        self._add(deque(pieces[:place]))
        return self._add(deque(pieces[place:]))

    def _split_first(self, gap: _Gap) -> bool:
        piece = gap.pieces[0]
        children = self._index.plan.by_id[piece].children
        if not children:
            return False
        self._remove(gap)
        gap.pieces.popleft()
        gap.pieces.extendleft(reversed(children))
        self._on_split(piece)
        gap.work -= self._index.node_work[piece]
        self._enter(gap)
        return True

    def _work(self, piece: NodeId) -> int:
        return self._index.spans[piece].work

    def _add(self, pieces: deque[NodeId], work: int | None = None) -> _Gap:
        spans = self._index.spans
        if work is None:
            work = sum(spans[piece].work for piece in pieces)
        gap = _Gap(pieces, spans[pieces[0]].first, spans[pieces[-1]].end, work)
        self._enter(gap)
        return gap

    def _enter(self, gap: _Gap) -> None:
        self._starts[gap.start] = self._ends[gap.end] = gap
        self.free_work += gap.work
        heapq.heappush(self._largest, (-gap.work, gap.start))

    def _remove(self, gap: _Gap) -> None:
        del self._starts[gap.start]
        del self._ends[gap.end]
        self.free_work -= gap.work
