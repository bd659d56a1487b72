"""A prompt across two workers equals the same prompt in one process, and few bytes travel."""

from __future__ import annotations

from functools import cache

import pytest

from homer import HomerConfig, HomerModel, MergePlan
from homer.plan import PlanNode
from homer.v1 import worker_pb2
from tests.golden_cases import GoldenCase
from tests.workers.conftest import WorkersOf
from tests.workers.processes import Prompt, WorkerProcess, release, run_across, running_workers

TOKENS = 12


@cache
def local_model(name: str) -> HomerModel:
    case = GoldenCase.load(name)
    return HomerModel.from_pretrained(case.model_dir, case.config, device="cpu", dtype="float32")


def plan_of(case: GoldenCase, mode: str) -> MergePlan:
    paper = case.config
    ours = HomerConfig(
        max_chunk_len=paper.max_chunk_len,
        target_len=paper.target_len,
        warmup_layers=paper.warmup_layers,
        max_initial_chunk_len=paper.max_initial_chunk_len,
    )
    config = {"paper": paper, "refreshed": ours, "wide": ours.replace(fan_in=4)}[mode]
    prefix_len, context_len, suffix_len = (part.numel() for part in case.parts)
    return MergePlan.build(prefix_len, context_len, suffix_len, case.num_layers, config)


@pytest.mark.parametrize("mode", ["paper", "refreshed", "wide"])
@pytest.mark.parametrize(
    ("name", "cut_height"),
    [
        ("a_16c", 0),
        ("a_16c", 2),
        ("a_33c", 3),
        ("a_7c", 1),
        ("a_34c_emptylast", 0),
        ("a_2c_full", 0),
        ("a_prefix0", 0),
        ("a_fit_prune", 0),
        ("g_5c_gqa", 1),
    ],
)
def test_two_workers_equal_one_process(
    workers_of: WorkersOf, name: str, cut_height: int, mode: str
) -> None:
    case = GoldenCase.load(name)
    workers = workers_of(case.case["model"])
    plan = plan_of(case, mode)
    prompt = Prompt.of(f"{name}/{mode}/{cut_height}", plan, case.parts)
    model = HomerModel(local_model(name).model, plan.config, local_model(name).bias)
    context = model.compress(*case.parts)
    expected = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True)

    answer = run_across(prompt, workers, min(cut_height, plan.height), max_tokens=TOKENS)

    assert list(answer.ready.context_indices) == context.context_indices.tolist()
    assert answer.ready.cache_tokens == context.cache_len
    assert answer.tokens == expected.tolist()
    assert answer.summary.generated_tokens == TOKENS
    for node, merged in answer.merges.items():
        assert merged.context_tokens_in == plan.by_id[node].context_in
        assert len(merged.context_indices) == plan.by_id[node].context_out
    if mode == "paper":
        assert list(answer.ready.context_indices) == case.expected["kept_context_index"].tolist()
    release(prompt, workers)
    assert all(worker.holds_nothing() for worker in workers)


def test_half_precision_travels_as_it_is() -> None:
    case = GoldenCase.load("m_3c_mqa")
    plan = plan_of(case, "paper")
    model = HomerModel.from_pretrained(case.model_dir, plan.config, device="cpu", dtype="bfloat16")
    context = model.compress(*case.parts)
    expected = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True)
    with running_workers(case.model_dir, "--dtype", "bfloat16", count=2) as workers:
        answer = run_across(Prompt.of("half", plan, case.parts), workers, 0, max_tokens=TOKENS)
    assert list(answer.ready.context_indices) == context.context_indices.tolist()
    assert answer.tokens == expected.tolist()


def least_state_bytes(plan: MergePlan, node: PlanNode, hidden_size: int, row_bytes: int) -> int:
    """Float32 hidden states, an int32 position and index per row, and averaged suffix rows."""
    rows = node.context_out + plan.suffix_len
    suffix = 0 if plan.refreshes_suffix else node.layer_end * plan.suffix_len * row_bytes
    return rows * (hidden_size * 4 + 4) + node.context_out * 4 + suffix


@pytest.mark.parametrize("mode", ["paper", "refreshed"])
@pytest.mark.parametrize("cut_height", [0, 1])
def test_no_more_bytes_travel_than_needed(
    workers: list[WorkerProcess], mode: str, cut_height: int
) -> None:
    case = GoldenCase.load("a_16c")
    plan = plan_of(case, mode)
    prompt = Prompt.of(f"bytes/{mode}/{cut_height}", plan, case.parts)
    info = workers[0].stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    row_bytes = 2 * info.num_kv_heads * info.head_dim * 4
    before = [worker.stats() for worker in workers]

    answer = run_across(prompt, workers, cut_height)

    after = [worker.stats() for worker in workers]
    release(prompt, workers)
    sent, received = (
        sum(getattr(new, name) - getattr(old, name) for new, old in zip(after, before, strict=True))
        for name in ("sent_bytes", "received_bytes")
    )
    root_place = answer.places[plan.root.id]
    least = 0
    for node in plan.nodes:
        place = answer.places.get(node.id)
        parent = plan.parents.get(node.id)
        if place is None:
            continue
        if parent is not None and answer.places[parent] != place:
            least += least_state_bytes(plan, node, info.hidden_size, row_bytes)
        if place != root_place:
            survivors = sum(
                node.context_start <= index < node.context_end
                for index in answer.ready.context_indices
            )
            first = 0 if node.id.height == cut_height else node.layer_start
            least += survivors * (node.layer_end - first) * row_bytes
    assert sent == received
    assert sent == answer.ready.received_bytes + sum(
        merged.received_bytes for merged in answer.merges.values()
    )
    assert least < sent <= 1.05 * least
