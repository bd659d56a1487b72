"""Cutting a plan into pieces, and handing them out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cut import PieceQueue, PlanIndex, cut_plan
from homer import HomerConfig, MergePlan
from homer.plan import NodeId


@given(
    context_len=st.integers(1, 3000),
    workers=st.integers(1, 9),
    pieces=st.integers(1, 9),
    fan_in=st.sampled_from([None, 2, 4, 8]),
)
def test_every_cut_covers_all_leaves_once_and_in_order(
    context_len: int, workers: int, pieces: int, fan_in: int | None
) -> None:
    config = HomerConfig(max_chunk_len=16, target_len=16, warmup_layers=1, fan_in=fan_in)
    plan = MergePlan.build(2, context_len, 3, 16, config)
    cut = cut_plan(plan, workers, pieces)
    covered = [node.id for top in cut for node in plan.subtree(top) if node.is_leaf]
    assert covered == [leaf.id for leaf in plan.leaves]


@given(context_len=st.integers(1, 3000), workers=st.integers(2, 9), pieces=st.integers(1, 9))
def test_a_cut_is_as_coarse_as_its_number_of_pieces_allows(
    context_len: int, workers: int, pieces: int
) -> None:
    plan = MergePlan.build(
        2, context_len, 3, 16, HomerConfig(max_chunk_len=16, target_len=16, warmup_layers=1)
    )
    cut = cut_plan(plan, workers, pieces)
    if len(plan.leaves) >= workers * pieces:
        parents = {plan.parents.get(node) for node in cut}
        assert len(cut) >= workers * pieces > len(parents - {None})
    else:
        assert cut == tuple(leaf.id for leaf in plan.leaves)


class Speeds:
    """The pace of workers that are all at work."""

    def __init__(self, **speeds: float) -> None:
        self.speeds = speeds
        self.limit = float("inf")
        self.busy = 0.0

    @property
    def total_speed(self) -> float:
        return sum(self.speeds.values()) or 2.0

    def speed(self, worker: str) -> float:
        return self.speeds.get(worker, 1.0)

    def busy_seconds(self, worker: str) -> float:
        return self.busy

    def largest(self, worker: str) -> float:
        return self.limit


def leaves(count: int) -> tuple[PlanIndex, list[NodeId]]:
    """A binary tree over `count` leaves of 10 tokens, and its leaves as pieces."""
    config = HomerConfig(max_chunk_len=15, target_len=15, warmup_layers=1, fan_in=2)
    plan = MergePlan.build(2, 10 * count, 3, 16, config)
    assert len(plan.leaves) == count
    return PlanIndex(plan), [leaf.id for leaf in plan.leaves]


def queue_of(count: int, workers: int = 2) -> PieceQueue:
    return PieceQueue(*leaves(count), workers, on_split=lambda _: None)


def numbers(*taken: NodeId | None) -> list[int]:
    """Leaves by their index, -1 for none."""
    return [piece.index if piece is not None else -1 for piece in taken]


@given(
    count=st.integers(1, 70),
    height=st.integers(0, 3),
    order=st.lists(st.integers(0, 4), min_size=300, max_size=300),
    limits=st.lists(st.sampled_from([1.0, 50.0, 1e9]), min_size=300, max_size=300),
    put_back=st.sets(st.integers(0, 40)),
    workers=st.integers(1, 9),
)
def test_every_leaf_is_handed_out_once(
    count: int,
    height: int,
    order: list[int],
    limits: list[float],
    put_back: set[int],
    workers: int,
) -> None:
    index, pieces = leaves(count)
    height = min(height, index.plan.height)
    pieces = [node.id for node in index.plan.nodes if node.id.height == height]
    split: list[NodeId] = []
    queue = PieceQueue(index, pieces, workers, on_split=split.append)
    pace = Speeds(**{"0": 1.0, "1": 3.0, "2": 0.2})
    done: list[int] = []
    for turn, (worker, pace.limit) in enumerate(zip(order, limits, strict=True)):
        piece = queue.take(str(worker), pace)
        if piece is None:
            # What is left is left to the worker that comes to it.
            continue
        if turn in put_back:
            queue.put_back(piece)
            continue
        span = index.spans[piece]
        done += range(span.first, span.end)
    while queue:
        for worker in range(5):
            if piece := queue.take(str(worker), pace):
                span = index.spans[piece]
                done += range(span.first, span.end)
    assert sorted(done) == list(range(count))
    assert queue.free_work == 0
    assert len(split) == len(set(split))


def take_turns(queue: PieceQueue, pace: Speeds, *workers: str) -> dict[str, list[int]]:
    """Let workers take one piece each, turn after turn, until there is none for any of them."""
    taken: dict[str, list[int]] = {worker: [] for worker in workers}
    while pieces := {w: piece for w in workers if (piece := queue.take(w, pace)) is not None}:
        for worker, piece in pieces.items():
            taken[worker] += numbers(piece)
    return taken


def test_two_workers_come_from_both_ends_and_meet() -> None:
    taken = take_turns(queue_of(16), Speeds(), "a", "b")
    assert taken == {"a": list(range(8)), "b": list(range(15, 7, -1))}


def test_every_two_workers_share_a_stretch() -> None:
    taken = take_turns(queue_of(16, 4), Speeds(), *"abcd")
    assert sorted(sorted(stretch) for stretch in taken.values()) == [
        list(range(k, k + 4)) for k in (0, 4, 8, 12)
    ]


def test_three_workers_get_thirds() -> None:
    taken = take_turns(queue_of(24, 3), Speeds(), *"abc")
    assert sorted(map(len, taken.values())) == [8, 8, 8]
    for stretch in taken.values():
        assert abs(stretch[0] - stretch[-1]) == 7


def test_they_meet_where_their_pace_lets_them() -> None:
    queue, pace = queue_of(16), Speeds(fast=3.0)
    taken = take_turns(queue, pace, "fast", "fast", "fast", "slow")
    assert taken["slow"] == [15, 14, 13, 12]


def test_a_worker_that_is_ahead_helps_between_those_that_come_to_a_stretch() -> None:
    queue, pace = queue_of(32, 3), Speeds(a=1.0, b=1.0, fast=2.0)
    first = numbers(queue.take("a", pace), queue.take("b", pace))
    assert first == [0, 20]
    own = [numbers(queue.take("fast", pace))[0] for _ in range(11)]
    assert own == list(range(21, 32))
    # Of the 19 leaves between the two the one from the left keeps a quarter.
    assert numbers(queue.take("fast", pace)) == [6]


def test_the_last_leaf_is_left_to_the_worker_that_comes_to_it() -> None:
    queue, pace = queue_of(4, 3), Speeds(a=1.0, b=1.0)
    assert numbers(queue.take("a", pace), queue.take("a", pace), queue.take("b", pace)) == [0, 1, 3]
    assert queue.take("c", pace) is None
    # Not where it would be long in coming.
    pace.busy = 1e9
    assert numbers(queue.take("c", pace)) == [2]


def test_a_piece_that_takes_too_long_is_cut_into_its_children() -> None:
    index, _ = leaves(16)
    pieces = [node.id for node in index.plan.nodes if node.id.height == 3]
    split: list[NodeId] = []
    queue, pace = PieceQueue(index, pieces, 2, on_split=split.append), Speeds()
    pace.limit = index.spans[NodeId(1, 0)].work
    assert queue.take("a", pace) == NodeId(1, 0)
    assert split == [NodeId(3, 0), NodeId(2, 0)]
    assert queue.take("a", pace) == NodeId(1, 1)


def test_a_piece_that_was_put_back_is_handed_out_again() -> None:
    queue, pace = queue_of(2), Speeds()
    pace.busy = 1e9
    first = queue.take("a", pace)
    assert numbers(first, queue.take("b", pace)) == [0, 1]
    assert first is not None
    queue.put_back(first)
    assert queue.take("b", pace) == first
    assert queue.take("b", pace) is None


@pytest.mark.parametrize(("leaves", "pieces"), [(1, 1), (5, 1), (15, 1), (40, 5), (500, 8)])
def test_one_worker_gets_large_pieces(leaves: int, pieces: int) -> None:
    config = HomerConfig(max_chunk_len=16, target_len=16, warmup_layers=1)
    plan = MergePlan.build(2, leaves * 11, 3, 16, config)
    assert len(plan.leaves) == leaves
    cut = cut_plan(plan, 1, 8)
    assert pieces <= len(cut) <= 2 * pieces
    assert sum(len(plan.subtree(node)) for node in cut) <= len(plan.nodes)
