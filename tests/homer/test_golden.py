"""Paper mode against the authors' code: every recorded case, node by node and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from homer import HomerModel
from homer.context import CompressedContext
from homer.encode import NodeReport, TreeEncoder
from homer.plan import NodeId
from homer.state import NodeState
from tests.golden_cases import GoldenCase, case_names, faithful_names

TOLERANCE = 1e-4


@cache
def load_case(name: str) -> tuple[GoldenCase, HomerModel]:
    golden = GoldenCase.load(name)
    model = HomerModel.from_pretrained(
        golden.model_dir,
        golden.config,
        bias=golden.bias,
        device="cpu",
        dtype="float32",
        **golden.model_options,
    )
    return golden, model


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", faithful_names())
def test_compressed_context_is_the_authors(name: str) -> None:
    golden, model = load_case(name)
    expected = golden.expected
    reports: list[NodeReport] = []
    context = model.compress(*golden.parts, on_node=reports.append)

    assert context.context_indices.tolist() == expected["kept_context_index"].tolist()
    assert context.position_ids.tolist() == expected["position_ids"].tolist()
    assert context.next_position == golden.case["last_position_id"] + 1
    assert_close(context.logits, expected["logits_last"])

    tokens = golden.case["num_retained_tokens"]
    for side, rows in (
        ("k", torch.stack([keys for keys, _ in context.layers])),
        ("v", torch.stack([values for _, values in context.layers])),
    ):
        assert rows.shape[2] == tokens
        flat = rows.permute(0, 2, 1, 3).reshape(len(context.layers), tokens, -1)
        assert_close(flat @ golden.projection, expected[f"{side}_proj4"])
        assert_close(rows[:, :, 0], expected[f"{side}_first"])
        assert_close(rows[:, :, -1], expected[f"{side}_last"])
        if golden.case["full_kv"]:
            assert_close(rows, expected[side.upper()])

    assert [tuple(report.node) for report in reports] == [
        (node["height"], node["index"]) for node in golden.case["nodes"]
    ]
    assert [(report.context_in, report.context_out) for report in reports] == [
        (node["context_in"], node["context_out"]) for node in golden.case["nodes"]
    ]


@pytest.mark.parametrize("name", faithful_names())
def test_answer_and_continuation_are_the_authors(name: str) -> None:
    golden, model = load_case(name)
    context = model.compress(*golden.parts)
    expected = golden.expected["greedy_forward"].tolist()
    tokens = model.generate(context, max_new_tokens=len(expected), ignore_eos=True)
    assert tokens.tolist() == expected

    # Row i of theirs follows the i-th token; row i of ours predicts it.
    follow = golden.inputs["follow_ids"][0]
    scores = model.score(context, torch.cat((follow, follow[:1])))
    assert_close(scores[0], golden.expected["logits_last"])
    assert_close(scores[1:], golden.expected["follow_logits"])


@pytest.mark.parametrize("name", faithful_names())
def test_every_node_keeps_what_the_authors_keep(name: str) -> None:
    golden, model = load_case(name)
    expected = golden.expected
    kept, offsets = expected["node_kept_index"].tolist(), expected["node_kept_offsets"].tolist()
    number = {node.id: i for i, node in enumerate(golden.plan.nodes)}

    def check(state: NodeState) -> None:
        i = number[state.node]
        assert state.context_indices.tolist() == kept[offsets[i] : offsets[i + 1]]
        if golden.case["full_kv"]:
            positions = expected[f"node{i}_position_ids_in"]
            if f"node{i}_keep_mask" in expected:
                positions = positions[expected[f"node{i}_keep_mask"].bool()]
            assert state.position_ids.tolist() == positions.tolist()[golden.plan.prefix_len :]

    context = run_node_by_node(golden, model, check)
    assert context.context_indices.tolist() == expected["kept_context_index"].tolist()
    assert_close(context.logits, expected["logits_last"])


@pytest.mark.parametrize("name", [name for name in case_names() if "yarn" in name])
def test_yarn_is_transformers_own_to_the_last_bit(name: str) -> None:
    golden, model = load_case(name)
    rotary = model.model.get_decoder().rotary_emb
    assert torch.equal(rotary.inv_freq, golden.expected["yarn_inv_freq"])
    assert rotary.attention_scaling == golden.case["yarn_mscale"]


def test_where_the_authors_ignore_the_target_ours_holds() -> None:
    golden, model = load_case("a_lpc0")
    context = model.compress(*golden.parts)
    assert len(golden.expected["position_ids"]) > golden.config.target_len
    assert context.cache_len <= golden.config.target_len
    assert context.cache_len == golden.plan.kept_len
    assert torch.isfinite(context.logits).all()


def run_node_by_node(
    golden: GoldenCase, model: HomerModel, check: Callable[[NodeState], None]
) -> CompressedContext:
    """What a cluster does: every leaf and every merge on its own."""
    prefix_ids, context_ids, suffix_ids = golden.parts
    plan = model.plan(prefix_ids.numel(), context_ids.numel(), suffix_ids.numel())
    encoder = TreeEncoder(model.stack, plan, prefix_ids, suffix_ids, model.bias)
    done: dict[NodeId, NodeState] = {}
    for node in plan.nodes:
        if node.is_leaf:
            ids = context_ids[0, node.context_start : node.context_end]
            state = encoder.run_subtree(node.id, ids)
        else:
            state = encoder.merge(node.id, [done.pop(child) for child in node.children])
        check(state)
        done[node.id] = state
    return encoder.finish(done[plan.root.id])
