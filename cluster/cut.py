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
from math import isfinite
from operator import mul
from typing import NamedTuple, Protocol

from homer.plan import MergePlan, NodeId

# What one worker alone gets in one piece.
ALONE_PIECE_LEAVES = 8
# A worker helps with a stretch that others come to only where it is then done earlier, by this part
# of the time that all together take for everything: else that saves little, and more states travel.
WORTH_HELPING = 0.06
# How far from its even place a cut may lie, as a part of one worker's share, to be at a high node.
SLACK = 0.05
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

    @property
    def total_speed(self) -> float:
        """Work per second of all together."""
        ...

    def speed(self, worker: str) -> float:
        """Work per second."""
        ...

    def busy_seconds(self, worker: str) -> float:
        """How long `worker` will be at what it has; infinite where it may not come back at all."""
        ...

    def largest(self, worker: str) -> float:
        """The most work that `worker` may take at once without making the others wait."""
        ...


class _Front(NamedTuple):
    """Where a worker goes on: from leaf `place` to the right (1), or up to it to the left (-1)."""

    place: int
    step: int


@dataclass(eq=False)
class _Gap:
    """A stretch of free pieces, neighbours in the document: leaves `start` up to `end`."""

    pieces: deque[NodeId]
    start: int
    end: int
    work: int

    def first(self, step: int) -> NodeId:
        """What a worker takes that goes in this direction."""
        return self.pieces[0 if step > 0 else -1]

    @property
    def fronts(self) -> tuple[_Front, _Front]:
        """From where workers come to it."""
        return _Front(self.start, 1), _Front(self.end, -1)


class PieceQueue:
    """Hands out pieces, so that each worker gets a stretch of neighbours.

    Parameters
    ----------
    index : PlanIndex
    pieces : sequence of NodeId
        The pieces in context order.
    workers : int
        How many will share them.
    on_split : callable
        Told of each piece that is cut into its children, which are pieces from then on.
    fits : callable
        Whether a worker has the layers that a piece runs. What fits no leaf gets nothing; what fits
        only leaves gets pieces cut down to them.

    Notes
    -----
    At first the pieces are cut into a stretch for every two workers. These begin at its two ends
    and meet, wherever their pace lets them. So neighbours tend to be merged where they were made,
    and few states travel. A worker without work helps with the longest stretch, where that saves
    time.
    Near the end pieces that would keep one worker busy for longer than the others are cut into
    their children, so that workers of unequal speed finish together. Each call costs about the
    logarithm of the number of pieces.
    """

    def __init__(
        self,
        index: PlanIndex,
        pieces: Sequence[NodeId],
        workers: int,
        on_split: Callable[[NodeId], None],
        fits: Callable[[str, NodeId], bool] = lambda *_: True,
    ) -> None:
        self._index = index
        self._on_split = on_split
        self._fits = fits
        self._starts: dict[int, _Gap] = {}
        self._ends: dict[int, _Gap] = {}
        # By work for each worker that comes, the most first; entries that have changed are stale.
        self._longest: list[tuple[float, int]] = []
        self._fronts: dict[str, _Front] = {}
        self._coming: dict[_Front, set[str]] = {}
        self.free_work = 0
        self._all_work = sum(index.spans[piece].work for piece in pieces)
        self._slack = SLACK * self._all_work / workers
        if pieces:
            self._share_out(self._add(deque(pieces)), workers)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def take(self, worker: str, pace: Pace) -> NodeId | None:
        """The next piece for `worker`; None when there is none, or it had better wait."""
        if not self._fits(worker, self._index.plan.nodes[0].id):
            return None
        front = self._fronts.get(worker)
        gap = self._gap_at(front) if front else None
        if front is None or gap is None:
            found = self._other(worker, pace)
            if found is None:
                return None
            gap, front = found
        while (
            not self._fits(worker, piece := gap.first(front.step))
            or self._work(piece) > pace.largest(worker)
        ) and self._split(gap, front.step):
            pass
        self._remove(gap)
        piece = gap.pieces.popleft() if front.step > 0 else gap.pieces.pop()
        span = self._index.spans[piece]
        self.forget(worker)
        front = _Front(span.end if front.step > 0 else span.first, front.step)
        self._fronts[worker] = front
        self._coming.setdefault(front, set()).add(worker)
        if gap.pieces:
            self._add(gap.pieces, gap.work - span.work)
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
        """This worker goes on nowhere."""
        front = self._fronts.pop(worker, None)
        if front is None:
            return
        self._coming[front].discard(worker)
        if not self._coming[front]:
            del self._coming[front]
        if gap := self._gap_at(front):
            self._rank(gap)

    def _gap_at(self, front: _Front) -> _Gap | None:
        return (self._starts if front.step > 0 else self._ends).get(front.place)

    def _share_out(self, gap: _Gap, workers: int) -> None:
        """Cut a stretch into one for every two workers."""
        if workers <= 2 or len(gap.pieces) == 1:
            return
        left = 2 * round(workers / 4)
        one, other = self._cut(gap, left / workers * gap.work)
        self._share_out(one, left)
        self._share_out(other, workers - left)

    def _other(self, worker: str, pace: Pace) -> tuple[_Gap, _Front] | None:
        """A stretch to begin, and where: the longest, else any that is worth helping with."""
        while self._longest:
            rank, start = self._longest[0]
            gap = self._starts.get(start)
            if gap is None or self._rank_of(gap) != rank:
                heapq.heappop(self._longest)
                continue
            if begun := self._begin(gap, worker, pace):
                return begun
            break
        # The longest stretch is better left alone, as most of the others are.
        for gap in list(islice(self._starts.values(), LOOKS)):
            if begun := self._begin(gap, worker, pace):
                return begun
        return None

    def _begin(self, gap: _Gap, worker: str, pace: Pace) -> tuple[_Gap, _Front] | None:
        """Where to begin a stretch: where nobody comes from, else between those that come."""
        at_start, at_end = (
            [other for other in self._coming.get(front, ()) if isfinite(pace.busy_seconds(other))]
            for front in gap.fronts
        )
        if not at_start and not at_end:
            return gap, _Front(gap.start, 1)
        if not self._is_worth_it(gap, worker, [*at_start, *at_end], pace):
            return None
        if not at_start:
            return gap, _Front(gap.start, 1)
        if not at_end:
            return gap, _Front(gap.end, -1)
        # Those from the left have what is left of the cut, the others share the rest with this one.
        speeds, ahead = self._strength(at_start, pace)
        other_speeds, other_ahead = self._strength(at_end, pace)
        together = speeds + other_speeds + pace.speed(worker)
        left = speeds * (gap.work + ahead + other_ahead) / together - ahead
        while len(gap.pieces) == 1 and self._split(gap, 1):
            pass
        if len(gap.pieces) > 1 and left > self._work(gap.pieces[0]) / 2:
            _, gap = self._cut(gap, left)
        return gap, _Front(gap.start, 1)

    def _is_worth_it(self, gap: _Gap, worker: str, others: Sequence[str], pace: Pace) -> bool:
        """Whether a stretch that others come to is done much earlier with `worker`'s help."""
        ours, leaf = pace.speed(worker), self._index.node_work[self._index.plan.nodes[0].id]
        speeds, ahead = self._strength(others, pace)
        if gap.work <= leaf:
            alone = min(pace.busy_seconds(other) + gap.work / pace.speed(other) for other in others)
            together = gap.work / ours
        else:
            alone = (gap.work + ahead) / speeds
            together = max(leaf / ours, (gap.work + ahead) / (speeds + ours))
        return alone - together >= WORTH_HELPING * self._all_work / pace.total_speed

    @staticmethod
    def _strength(workers: Sequence[str], pace: Pace) -> tuple[float, float]:
        """The speed of workers together, and the work that they have to do before."""
        speeds = [pace.speed(worker) for worker in workers]
        busy = [pace.busy_seconds(worker) for worker in workers]
        return sum(speeds), sum(map(mul, speeds, busy))

    def _cut(self, gap: _Gap, left: float) -> tuple[_Gap, _Gap]:
        """Cut a stretch in two, near `left` of its work: where the highest node begins."""
        pieces = list(gap.pieces)
        spans, boundaries = self._index.spans, self._index.boundaries
        done = list(accumulate(self._work(piece) for piece in pieces))
        off = [abs(work - left) for work in done[:-1]]
        near = max(self._slack, min(off))
        place = 1 + max(
            (place for place in range(len(off)) if off[place] <= near),
            key=lambda place: (boundaries[spans[pieces[place + 1]].first], -off[place]),
        )
        self._remove(gap)
        return self._add(deque(pieces[:place])), self._add(deque(pieces[place:]))

    def _split(self, gap: _Gap, step: int) -> bool:
        """Cut the piece that comes next in this direction into its children."""
        piece = gap.first(step)
        children = self._index.plan.by_id[piece].children
        if not children:
            return False
        self._remove(gap)
        if step > 0:
            gap.pieces.popleft()
            gap.pieces.extendleft(reversed(children))
        else:
            gap.pieces.pop()
            gap.pieces.extend(children)
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
        self._rank(gap)

    def _remove(self, gap: _Gap) -> None:
        del self._starts[gap.start]
        del self._ends[gap.end]
        self.free_work -= gap.work

    def _rank(self, gap: _Gap) -> None:
        heapq.heappush(self._longest, (self._rank_of(gap), gap.start))

    def _rank_of(self, gap: _Gap) -> float:
        coming = sum(len(self._coming.get(front, ())) for front in gap.fronts)
        return -gap.work / max(1, coming)
