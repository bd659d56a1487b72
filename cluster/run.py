"""One pass of a job from its pieces to its root: what is done, where it lies, what is next.

A unit's result lies on its *home*, the worker that ran it: the state stays there until the job
ends, so when a worker is lost exactly the units whose home it was are run again, in dependency
order. Pure bookkeeping by workers' names. Knows nothing about asyncio, and calls no worker.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import log2

from cluster.cut import Pace, PieceQueue, PlanIndex, cut_plan
from cluster.job import Job
from cluster.units import Started, Try, Unit
from homer.plan import NodeId, PlanNode


class JobRun:
    """Follows `job` through its tree.

    Parameters
    ----------
    job : Job
        As the workers know it: each pass has a request id of its own.
    workers, pieces_per_worker : int
        For how many workers the plan is cut, and how finely.
    answers : callable
        How many answers a worker is decoding: the root goes where there are fewest.
    fits : callable
        Whether a worker has the layers that a node runs.
    speed : callable
        Work per second of a worker.
    """

    def __init__(
        self,
        job: Job,
        workers: int,
        pieces_per_worker: int,
        answers: Callable[[str], int] = lambda _: 0,
        fits: Callable[[str, PlanNode], bool] = lambda *_: True,
        speed: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        self.job = job
        self._plan = job.plan
        self._speed = speed
        self._answers = answers
        self._fits = fits
        pieces = cut_plan(job.plan, workers, pieces_per_worker)
        cut_height = pieces[0].height
        self.index = PlanIndex(job.plan)
        self.units = {
            node.id: Unit(
                node,
                order,
                piece=node.id.height == cut_height,
                waiting=0 if node.id.height == cut_height else len(node.children),
            )
            for order, node in enumerate(job.plan.nodes)
            if node.id.height >= cut_height
        }
        self._queue = PieceQueue(
            self.index,
            pieces,
            workers,
            self._split,
            lambda name, node: fits(name, job.plan.by_id[node]),
        )
        # Pieces that some workers should not get again, beside the queue.
        self._again: list[Unit] = []
        # Whether pieces have become free since that was last asked for.
        self._freed = True
        # Merges whose children are done, each with the workers under which it is listed: "" where
        # none of those that have a child has its layers.
        self._ready: dict[NodeId, tuple[str, ...]] = {}
        self._ready_at: defaultdict[str, set[NodeId]] = defaultdict(set)
        # Those that have become so since they were last asked for.
        self._fresh: list[Unit] = []
        self._at: defaultdict[str, set[NodeId]] = defaultdict(set)
        self.tries: dict[str, Try] = {}
        self.missing = len(self.units)
        # Work of pieces that is not done; merges above them come on top.
        self.work_left = sum(self.index.spans[piece].work for piece in pieces)
        # Calls on their way that drop what was made twice: until then rows may be there twice.
        self.drops = 0
        # The final cache is there: nothing that is lost is needed, unless that is.
        self.parked = False
        # Workers that get nothing more of this pass, and on which nothing counts.
        self.banned: set[str] = set()
        self.touched: set[str] = set()

    @property
    def root_home(self) -> str | None:
        """The worker that holds the root's state, once it is done."""
        return self.units[self._plan.root.id].home

    @property
    def complete(self) -> bool:
        """Whether everything that an answer needs is there, once."""
        return not self.missing and not self.drops

    @property
    def has_pieces(self) -> bool:
        return not self.parked and bool(self._queue or self._again)

    @property
    def ready(self) -> list[Unit]:
        """Merges whose children are all done."""
        return [] if self.parked else [self.units[node] for node in self._ready]

    def homes(self) -> set[str]:
        """The workers that hold KV rows of the pass."""
        return {unit.home for unit in self.units.values() if unit.home is not None}

    def take_fresh(self) -> list[Unit]:
        """Merges that have become ready since the last time."""
        if self.parked:
            return []
        fresh, self._fresh = self._fresh, []
        return [unit for unit in fresh if unit.node.id in self._ready]

    def take_freed(self) -> bool:
        """Whether pieces have become free since the last time; at first all have."""
        freed, self._freed = self._freed, False
        return freed

    def ready_at(self, worker: str) -> list[Unit]:
        """Ready merges of which `worker` has a child, the first in the tree first.

        Those that none may run who has a child are anybody's.
        """
        at = self._ready_at.get(worker, set()) | self._ready_at.get("", set())
        if self.parked or not at:
            return []
        return sorted((self.units[node] for node in at), key=lambda unit: unit.order)

    def best_homes(self, unit: Unit) -> list[str]:
        """Where a ready merge's children are, and it may run: first where most of its rows are.

        Before that count workers' speeds, where one is about twice that of another. The root goes
        first where fewest answers are decoded, so that answers spread over the pool.
        """
        rows: Counter[str] = Counter()
        for child in unit.node.children:
            home = self.units[child].home
            if home and self._fits(home, unit.node):
                rows[home] += self._plan.by_id[child].context_out
        if len(rows) <= 1:
            return list(rows)
        is_root = unit.node.id == self._plan.root.id
        fastest = max(map(self._speed, rows))

        def rank(home: str) -> tuple[int, int, int]:
            times_slower = round(log2(fastest / self._speed(home)))
            return (self._answers(home) if is_root else 0, times_slower, -rows[home])

        ranks = {home: rank(home) for home in rows}
        first = min(ranks.values())
        return sorted(
            ranks,
            key=lambda home: (
                ranks[home],
                self._leaves_beside(unit, home) if ranks[home] == first else (),
            ),
        )

    def _leaves_beside(self, unit: Unit, home: str) -> tuple[int, ...]:
        """Leaves of other nodes on a worker, by how soon they will be merged with this; negative.

        Where a merge's result is needed next is a good place for it.
        """
        spans = self.index.spans
        inside = spans[unit.node.id]
        beside = [
            span
            for span in (spans[node] for node in self._at[home])
            if not inside.first <= span.first < inside.end
        ]
        return tuple(
            -sum(
                span.end - span.first
                for span in beside
                if spans[above.node.id].first <= span.first < spans[above.node.id].end
            )
            for above in self._above(unit)
        )

    def start_piece(
        self, worker: str, pace: Pace, now: float, allowed: Callable[[Unit], bool]
    ) -> Started | None:
        """Give `worker` the next piece, if there is one for it."""
        if self.parked or worker in self.tries:
            return None
        unit = next((unit for unit in self._again if allowed(unit)), None)
        if unit is not None:
            self._again.remove(unit)
        else:
            node = self._queue.take(worker, pace)
            if node is None:
                return None
            unit = self.units[node]
        return self.start(unit, worker, now)

    def start(self, unit: Unit, worker: str, now: float) -> Started:
        """Run a free or ready unit on `worker`, or a running one a second time."""
        self._ready_remove(unit)
        unit.attempt += 1
        attempt = Try(unit, worker, unit.attempt, now)
        unit.tries[worker] = self.tries[worker] = attempt
        self.touched.add(worker)
        children = () if unit.piece else unit.node.children
        homes = ((child, self.units[child].home or "") for child in children)
        return Started(attempt, tuple(homes))

    def is_current(self, attempt: Try) -> bool:
        """Whether the outcome of a try still counts."""
        return attempt.unit.tries.get(attempt.worker) is attempt

    def progressed(self, attempt: Try, node: NodeId) -> None:
        """A try has finished one node of its piece."""
        if attempt.unit.piece:
            work = self.index.node_work[node]
            attempt.work_done += work
            self.work_left -= work

    def done(self, attempt: Try, kept: Sequence[int] | None = None) -> list[Try] | None:
        """A unit's result is on the worker of `attempt`; None where that does not count any more.

        Returns the tries that came too late: what they may leave is to be dropped.
        """
        if not self.is_current(attempt):
            return None
        unit = attempt.unit
        losers = [other for other in unit.tries.values() if other is not attempt]
        for other in (attempt, *losers):
            del self.tries[other.worker]
        self._count_again(losers)
        if unit.piece:
            self.work_left -= self.index.spans[unit.node.id].work - attempt.work_done
        unit.tries.clear()
        unit.home, unit.kept = attempt.worker, kept
        unit.holders = {attempt.worker}.union(
            *(() if unit.piece else (self.units[child].holders for child in unit.node.children))
        )
        self._at[attempt.worker].add(unit.node.id)
        self.missing -= 1
        if parent := self._parent(unit):
            parent.waiting -= 1
            self._update_ready(parent)
        for above in self._above(unit):
            if above.home is not None:
                above.holders.add(attempt.worker)
        return losers

    def failed(self, attempt: Try) -> None:
        """A try came to nothing: its unit is free again, unless it runs elsewhere too."""
        if not self.is_current(attempt):
            return
        unit = attempt.unit
        del unit.tries[attempt.worker], self.tries[attempt.worker]
        self._count_again([attempt])
        if not unit.tries:
            self._free(unit)

    def lose(self, worker: str) -> list[NodeId]:
        """Everything that `worker` held or ran has to be done again; returns which nodes."""
        lost = sorted(self._at.pop(worker, set()), key=lambda node: self.units[node].order)
        for node in lost:
            self.undo(self.units[node])
        if attempt := self.tries.get(worker):
            attempt.unit.losses += 1
            lost.append(attempt.node)
            self.failed(attempt)
        self.retire(worker)
        return lost

    def retire(self, worker: str) -> None:
        """`worker` takes nothing more; what it holds stays."""
        self._queue.forget(worker)

    def undo(self, unit: Unit) -> None:
        """A done unit's result is gone, or not to be trusted."""
        self._at[unit.home or ""].discard(unit.node.id)
        unit.home = None
        self.missing += 1
        if unit.piece:
            self.work_left += self.index.spans[unit.node.id].work
        if parent := self._parent(unit):
            parent.waiting += 1
            self._update_ready(parent)
        self._free(unit)

    def holders_below(self, node: NodeId) -> set[str]:
        """Workers that hold, or held, KV rows made below a done merge."""
        return self.units[node].holders

    def survivors(self, node: NodeId) -> tuple[NodeId, Sequence[int]] | None:
        """The highest done merge above `node`, and the context indices that survived it."""
        found = None
        for above in self._above(self.units[node]):
            if above.home is not None and above.kept is not None:
                found = (above.node.id, above.kept)
        return found

    def work_of(self, unit: Unit) -> int:
        """Context tokens times layers: of a piece its whole subtree's."""
        node = unit.node.id
        return self.index.spans[node].work if unit.piece else self.index.node_work[node]

    def _split(self, piece: NodeId) -> None:
        """A free piece is cut: from now on its children are pieces, and it merges them."""
        unit = self.units[piece]
        unit.piece, unit.waiting = False, len(unit.node.children)
        self.missing += len(unit.node.children)
        self.work_left -= self.index.node_work[piece]
        for child in unit.node.children:
            # Orders only break ties among merges; a child goes before its parent.
            self.units[child] = Unit(self._plan.by_id[child], unit.order - 1, piece=True, waiting=0)

    def _free(self, unit: Unit) -> None:
        if not unit.piece:
            self._update_ready(unit)
            return
        self._freed = True
        if unit.avoid:
            self._again.append(unit)
        else:
            self._queue.put_back(unit.node.id)

    def _update_ready(self, unit: Unit) -> None:
        self._ready_remove(unit)
        if unit.home is None and not unit.tries and not unit.waiting:
            at = (self.units[child].home or "" for child in unit.node.children)
            homes = {home for home in at if self._fits(home, unit.node)} or {""}
            self._ready[unit.node.id] = tuple(homes)
            self._fresh.append(unit)
            for home in homes:
                self._ready_at[home].add(unit.node.id)

    def _ready_remove(self, unit: Unit) -> None:
        for home in self._ready.pop(unit.node.id, ()):
            self._ready_at[home].discard(unit.node.id)

    def _count_again(self, tries: Iterable[Try]) -> None:
        """What tries had done of their pieces is to be done again, or was done elsewhere."""
        for attempt in tries:
            self.work_left += attempt.work_done

    def _parent(self, unit: Unit) -> Unit | None:
        node = self._plan.parents.get(unit.node.id)
        return None if node is None else self.units[node]

    def _above(self, unit: Unit) -> Iterable[Unit]:
        while parent := self._parent(unit):
            yield parent
            unit = parent
