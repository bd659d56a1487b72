"""Cutting a plan into pieces, and handing them out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cut import PieceQueue, cut_plan
from homer import HomerConfig, MergePlan


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


@given(count=st.integers(0, 70), order=st.lists(st.integers(0, 4), min_size=75, max_size=75))
def test_every_piece_is_handed_out_once(count: int, order: list[int]) -> None:
    queue = PieceQueue([0] * count)
    taken = [queue.take(worker) for worker in order]
    assert sorted(piece for piece in taken if piece is not None) == list(range(count))
    assert not queue


def test_equal_workers_get_equal_stretches_of_neighbours() -> None:
    queue = PieceQueue([0] * 16)
    taken = [(queue.take("a"), queue.take("b")) for _ in range(8)]
    assert taken == [(number, number + 8) for number in range(8)]


def test_a_fast_worker_takes_over_half_of_what_a_slow_one_has_left() -> None:
    queue = PieceQueue([0] * 16)
    assert queue.take("fast") == 0
    assert queue.take("slow") == 8
    assert [queue.take("fast") for _ in range(8)] == [1, 2, 3, 4, 5, 6, 7, 12]


def test_a_stretch_is_cut_where_a_large_subtree_begins() -> None:
    queue = PieceQueue([9, 0, 1, 0, 2, 0, 1, 0, 0, 3, 0, 1, 0, 0, 2, 0])
    assert [queue.take("a"), queue.take("b")] == [0, 9]


def test_a_piece_that_was_put_back_is_handed_out_again() -> None:
    queue = PieceQueue([0] * 2)
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    queue.put_back(0)
    assert queue.take("b") == 0
    assert queue.take("b") is None


@pytest.mark.parametrize(("leaves", "pieces"), [(1, 1), (5, 1), (15, 1), (40, 5), (500, 8)])
def test_one_worker_gets_large_pieces(leaves: int, pieces: int) -> None:
    config = HomerConfig(max_chunk_len=16, target_len=16, warmup_layers=1)
    plan = MergePlan.build(2, leaves * 11, 3, 16, config)
    assert len(plan.leaves) == leaves
    cut = cut_plan(plan, 1, 8)
    assert pieces <= len(cut) <= 2 * pieces
    assert sum(len(plan.subtree(node)) for node in cut) <= len(plan.nodes)
