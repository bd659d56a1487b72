"""The best that a tree allows."""

from __future__ import annotations

import pytest

from cluster.bench.ideal import TreeTime
from homer import HomerConfig, MergePlan


def plan_of_four_leaves() -> MergePlan:
    config = HomerConfig(max_chunk_len=16, target_len=16, warmup_layers=1)
    plan = MergePlan.build(2, 4 * 11, 3, 12, config)
    assert len(plan.leaves) == 4
    assert len(plan.merges) == 3
    return plan


def test_equal_nodes_take_the_levels_that_are_left() -> None:
    plan = plan_of_four_leaves()
    seconds = {node.id: 1.0 for node in plan.nodes}
    found = {n: TreeTime.of(plan, seconds, n) for n in (1, 2, 4, 100)}
    assert [found[n].best for n in (1, 2, 4, 100)] == [7, 4, 3, 3]
    assert all(time.work == 7 and time.critical_path == 3 for time in found.values())
    assert found[2].ideal_speedup == pytest.approx(7 / 4)


def test_what_follows_the_root_is_on_every_path() -> None:
    plan = plan_of_four_leaves()
    seconds = {node.id: 1.0 for node in plan.nodes}
    time = TreeTime.of(plan, seconds, 4, after_root=2.0)
    assert (time.work, time.critical_path, time.best) == (9, 5, 5)


def test_the_longest_way_goes_first() -> None:
    plan = plan_of_four_leaves()
    seconds = {node.id: 1.0 for node in plan.nodes}
    seconds[plan.leaves[3].id] = 4.0
    # The long leaf beside the other three, then its merge and the root.
    assert TreeTime.of(plan, seconds, 2).best == 6
