"""The merge plan: equal to the authors' on every golden case, sound on every other input."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from homer import HomerConfig, MergePlan
from homer.errors import ConfigError, PlanError
from homer.plan import NodeId
from tests.golden_cases import (
    DEVIATING,
    GoldenCase,
    crash_cases,
    faithful_names,
    paper_config,
    read_num_layers,
)


@pytest.mark.parametrize("name", faithful_names())
def test_golden_tree_is_the_authors(name: str) -> None:
    golden = GoldenCase.load(name)
    case, plan = golden.case, golden.plan
    affix_len = case["prefix_len"] + case["suffix_len"]
    assert [
        {
            "height": node.id.height,
            "index": node.id.index,
            "layers": list(range(node.layer_start, node.layer_end)),
            "target_len": node.target_len,
            "tokens_in": node.context_in + affix_len,
            "tokens_out": node.context_out + affix_len,
            "context_in": node.context_in,
            "context_out": node.context_out,
        }
        for node in plan.nodes
    ] == [{k: v for k, v in node.items() if k != "margin"} for node in case["nodes"]]
    assert plan.fan_in == 2
    assert plan.height == case["tree_height"]
    assert len(plan.leaves) == case["num_leaves"]
    assert plan.chunk_context_len == case["eff_chunk_len"]
    assert plan.leaves[-1].context_in == case["last_leaf_context"]
    assert plan.kept_len == case["num_retained_tokens"]
    assert plan.next_position == case["last_position_id"] + 1


def test_more_levels_than_merging_layers_widens_the_fan_in() -> None:
    golden = GoldenCase.load("a_lpc0")
    plan = golden.plan
    assert golden.case["num_retained_tokens"] > golden.case["target_len"], (
        "what the authors' code does"
    )
    assert plan.fan_in == 4
    assert all(node.layer_end > node.layer_start for node in plan.nodes)
    assert plan.kept_len <= golden.case["target_len"]
    check_plan(plan)


def test_no_layer_left_for_merging_is_refused() -> None:
    golden = GoldenCase.load("a_warmup_all")
    assert golden.name in DEVIATING
    with pytest.raises(PlanError, match=r"0 of 8 layers are left.*lower warmup_layers to 6"):
        _ = golden.plan


WORKING_CRASHES = (
    "negative_last_leaf",
    "negative_last_leaf_8",
    "one_context_token",
    "empty_prefix",
    "bias_none_reduce",
    "bias_none_no_reduce",
    "gqa_multi_node",
    "init_neg_target",
    "visualize_2c_tgt",
)

REFUSED_CRASHES = {
    "empty_context": (PlanError, "the context is empty"),
    "empty_suffix": (PlanError, "the suffix is empty"),
    "affix_equals_chunk": (PlanError, "raise max_chunk_len above 20"),
    "affix_exceeds_chunk": (PlanError, "raise max_chunk_len above 20"),
    "init_affix_equals_chunk": (PlanError, "raise max_initial_chunk_len above 20"),
    "warmup_gt_layers_multi": (PlanError, "the model has 8 layers"),
    "warmup_gt_layers_one": (PlanError, "the model has 8 layers"),
    "target_zero": (ConfigError, "target_len is 0"),
    "target_lt_affix": (PlanError, "raise target_len"),
}


def plan_of_crash(crash: dict[str, Any]) -> MergePlan:
    return MergePlan.build(
        crash["prefix_len"],
        crash["context_len"],
        crash["suffix_len"],
        read_num_layers(crash["model"]),
        paper_config(crash["homer_args"] | {"layers_warmup": crash["homer_args"]["layers_warmup"]}),
    )


@pytest.mark.parametrize("name", WORKING_CRASHES)
def test_lengths_that_crash_the_authors_code_have_a_plan(name: str) -> None:
    crash = crash_cases()[name]
    plan = plan_of_crash(crash)
    check_plan(plan)
    if "result" in crash:
        assert plan.kept_len == crash["result"]["retained"]
        assert plan.next_position == crash["result"]["last_position_id"] + 1


@pytest.mark.parametrize("name", REFUSED_CRASHES)
def test_impossible_lengths_are_refused_with_the_setting_to_change(name: str) -> None:
    error, message = REFUSED_CRASHES[name]
    with pytest.raises(error, match=message):
        plan_of_crash(crash_cases()[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_chunk_len": 1}, "max_chunk_len is 1; set it to 2 or more"),
        ({"target_len": 0}, "target_len is 0; set it to 1 or more"),
        ({"warmup_layers": -1}, "warmup_layers is -1; set it to 0 or more"),
        ({"max_initial_chunk_len": 1}, "max_initial_chunk_len is 1"),
        ({"plan": "tidy"}, "plan is 'tidy'; set it to one of"),
        ({"fan_in": 1}, "fan_in is 1; set it to 2 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"max_chunk_len": 64, "target_len": 64, "warmup_layers": 2}
    with pytest.raises(ConfigError, match=message):
        HomerConfig(**(good | settings))


def test_a_fan_in_too_wide_for_the_chunk_is_refused() -> None:
    config = HomerConfig(max_chunk_len=12, target_len=12, warmup_layers=0, fan_in=8)
    with pytest.raises(PlanError, match="too few to merge 8 children; raise max_chunk_len"):
        MergePlan.build(4, 100, 4, 8, config)


def test_a_fan_in_too_narrow_for_the_layers_is_refused() -> None:
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=0, fan_in=2)
    with pytest.raises(
        PlanError, match=r"30 leaves with a fan-in of 2 make 6 levels.*leave fan_in out"
    ):
        MergePlan.build(2, 1800, 2, 4, config)


def test_paper_mode_differs_from_the_default_in_the_plan_and_the_suffix_alone() -> None:
    settings: dict[str, Any] = {"max_chunk_len": 64, "target_len": 64, "warmup_layers": 4}
    default, paper = HomerConfig(**settings), HomerConfig.paper(**settings)
    assert default.replace(plan="paper", refresh_suffix=False) == paper
    # Eight full chunks: the two plans are one.
    ours, theirs = (MergePlan.build(2, 8 * 60, 2, 8, config) for config in (default, paper))
    assert ours.nodes == theirs.nodes
    assert (ours.refreshes_suffix, theirs.refreshes_suffix) == (True, False)


def test_a_balanced_plan_takes_no_more_leaves_than_the_context_needs() -> None:
    settings: dict[str, Any] = {"max_chunk_len": 64, "target_len": 64, "warmup_layers": 2}
    lengths = (2, 8 * 59 + 1, 3, 12)
    ours = MergePlan.build(*lengths, HomerConfig(**settings))
    theirs = MergePlan.build(*lengths, HomerConfig.paper(**settings))
    assert (len(ours.leaves), len(theirs.leaves)) == (9, 16)
    assert max(leaf.context_in for leaf in ours.leaves) <= 59
    assert {leaf.context_in for leaf in ours.leaves} == {52, 53}
    check_plan(ours)


@pytest.mark.parametrize("leaves", [3, 5, 9, 17, 33, 47])
@pytest.mark.parametrize("fan_in", [2, 3, 4])
def test_a_balanced_plan_gives_every_part_of_the_context_its_share(
    leaves: int, fan_in: int
) -> None:
    """No leaf climbs alone and then takes as much of the root as all others together."""
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=2, fan_in=fan_in)
    plan = MergePlan.build(2, leaves * 59, 3, 12, config)
    assert len(plan.leaves) == leaves
    for node in plan.merges:
        spans = [plan.by_id[child] for child in node.children]
        sizes = [child.context_end - child.context_start for child in spans]
        assert max(sizes) - min(sizes) <= 59 + leaves


def test_a_prompt_that_fits_is_one_leaf_with_every_layer_and_no_refresh() -> None:
    plan = MergePlan.build(
        2, 59, 3, 8, HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=2)
    )
    assert plan.nodes == plan.leaves == (plan.root,)
    assert (plan.root.layer_start, plan.root.layer_end) == (0, 8)
    assert plan.kept_len == plan.next_position == 64
    assert not plan.refreshes_suffix


def test_plan_needs_no_torch_and_no_third_party_package() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from homer import HomerConfig, MergePlan\n"
        "config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=0)\n"
        "MergePlan.build(1, 500, 2, 8, config)\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['homer']"


def check_plan(plan: MergePlan) -> None:
    """Every promise that a plan makes, whatever the lengths."""
    affix_len = plan.prefix_len + plan.suffix_len
    config = plan.config

    # The leaves cover the context once, in order; none is longer than allowed.
    spans = [(leaf.context_start, leaf.context_end) for leaf in plan.leaves]
    assert spans[0][0] == 0
    assert spans[-1][1] == plan.context_len
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [end - start for start, end in spans]
    assert min(lengths) >= 0
    assert max(lengths) == plan.chunk_context_len
    assert max(lengths) + affix_len <= (config.max_initial_chunk_len or config.max_chunk_len)

    # Post-order, one root, every node below exactly one parent, spans made of the children's.
    seen: set[NodeId] = set()
    for node in plan.nodes:
        assert set(node.children) <= seen
        seen.add(node.id)
        if node.is_leaf:
            assert node.id.height == 0
            assert node.context_in == node.context_end - node.context_start
        else:
            children = [plan.by_id[child] for child in node.children]
            assert 1 <= len(children) <= plan.fan_in
            assert all(plan.parents[child.id] == node.id for child in children)
            assert node.context_start == children[0].context_start
            assert node.context_end == children[-1].context_end
            assert all(a.context_end == b.context_start for a, b in itertools.pairwise(children))
            assert node.context_in == sum(child.context_out for child in children)
            assert node.context_in + affix_len <= config.max_chunk_len
            assert node.layer_start == children[0].layer_end
        # Every node runs a layer, so that every node can prune, and keeps to its target.
        assert node.layer_end > node.layer_start
        assert 0 <= node.context_out <= node.context_in
        assert node.context_out + affix_len <= node.target_len
        assert node.prunes == (node.context_out < node.context_in)
    assert len(seen) == len(plan.nodes)
    assert set(plan.by_id) - set(plan.parents) == {plan.root.id}
    assert plan.leaves + plan.merges != ()
    assert plan.subtree(plan.root.id) == plan.nodes

    # On the way from any leaf to the root every layer runs once.
    for leaf in plan.leaves:
        node, layers = leaf, list(range(leaf.layer_start, leaf.layer_end))
        while node.id in plan.parents:
            node = plan.by_id[plan.parents[node.id]]
            layers += range(node.layer_start, node.layer_end)
        assert layers == list(range(plan.num_layers))

    assert plan.kept_len <= min(config.target_len, plan.prompt_len)
    assert plan.next_position <= affix_len + plan.chunk_context_len


@st.composite
def plan_inputs(draw: st.DrawFn) -> tuple[int, int, int, int, HomerConfig]:
    prefix_len = draw(st.integers(0, 20))
    suffix_len = draw(st.integers(1, 20))
    affix_len = prefix_len + suffix_len
    num_layers = draw(st.integers(1, 40))
    config = HomerConfig(
        max_chunk_len=affix_len + draw(st.integers(1, 100)),
        target_len=affix_len + draw(st.integers(0, 150)),
        warmup_layers=draw(st.integers(0, num_layers - 1)),
        max_initial_chunk_len=draw(st.none() | st.integers(1, 100).map(lambda n: n + affix_len)),
        plan=draw(st.sampled_from(["balanced", "paper"])),
        fan_in=draw(st.sampled_from([None, None, 2, 3, 4, 8])),
    )
    return prefix_len, draw(st.integers(1, 5000)), suffix_len, num_layers, config


def build_or_none(inputs: tuple[int, int, int, int, HomerConfig]) -> MergePlan | None:
    try:
        return MergePlan.build(*inputs)
    except PlanError:
        return None


@given(plan_inputs())
@example((5, 1815, 4, 12, HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=4)))
@example((0, 1, 1, 1, HomerConfig(max_chunk_len=2, target_len=2, warmup_layers=0)))
def test_every_plan_keeps_its_promises(inputs: tuple[int, int, int, int, HomerConfig]) -> None:
    plan = build_or_none(inputs)
    assume(plan is not None)
    assert plan is not None
    check_plan(plan)


@given(plan_inputs())
def test_only_a_lack_of_layers_or_of_room_is_refused(
    inputs: tuple[int, int, int, int, HomerConfig],
) -> None:
    """Where no plan exists, doing what the message says helps: more room, or another fan-in."""
    prefix_len, context_len, suffix_len, num_layers, config = inputs
    if build_or_none(inputs) is not None:
        return
    roomy = config.replace(
        max_chunk_len=prefix_len + suffix_len + context_len, max_initial_chunk_len=None, fan_in=None
    )
    check_plan(MergePlan.build(prefix_len, context_len, suffix_len, num_layers, roomy))


@given(plan_inputs())
def test_the_same_inputs_give_the_same_plan(inputs: tuple[int, int, int, int, HomerConfig]) -> None:
    plan = build_or_none(inputs)
    assume(plan is not None)
    again = MergePlan.build(*inputs[:4], dataclasses.replace(inputs[4]))
    assert again == plan


@given(plan_inputs(), st.data())
def test_a_subtree_is_a_node_and_all_below_it(
    inputs: tuple[int, int, int, int, HomerConfig], data: st.DataObject
) -> None:
    plan = build_or_none(inputs)
    assume(plan is not None)
    assert plan is not None
    node = data.draw(st.sampled_from(plan.nodes))
    below = {node.id}
    for other in reversed(plan.nodes):
        if other.id in plan.parents and plan.parents[other.id] in below:
            below.add(other.id)
    subtree = plan.subtree(node.id)
    assert [n.id for n in subtree] == [n.id for n in plan.nodes if n.id in below]
    leaves = [n for n in subtree if n.is_leaf]
    assert (leaves[0].context_start, leaves[-1].context_end) == (
        node.context_start,
        node.context_end,
    )


def test_a_plan_of_far_too_many_leaves_is_refused_before_it_is_made() -> None:
    config = HomerConfig(max_chunk_len=4, target_len=4, warmup_layers=1)
    with pytest.raises(PlanError, match=r"takes 33554432 leaves of 2 tokens.*raise max_chunk_len"):
        MergePlan.build(1, 1 << 26, 1, 12, config)
