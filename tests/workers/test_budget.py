"""A worker refuses work that its memory does not hold, and stays within its budget."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
import torch

from homer import MergePlan
from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.errors import ConfigError
from homer.footprint import Footprint
from homer.memory import DeviceMemory, device_memory
from homer.plan import NodeId
from tests.golden_cases import GoldenCase
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    running_workers,
)
from tests.workers.test_across import plan_of
from tests.workers.test_calls import LEAF, PARENT, refusal, run_subtree
from workers.budget import Budget, automatic_bytes, parse_bytes
from workers.errors import MemoryBudgetError, is_out_of_memory, status_code

MIB = 1 << 20


def test_amounts_of_memory_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("0", "512", "4GiB", "1.5 MiB", "2gb", "3KB")] == [
        0, 512, 4 << 30, 3 << 19, 2 * 10**9, 3000,
    ]  # fmt: skip
    for wrong in ("", "-1", "4 apples", "GiB"):
        with pytest.raises(ConfigError, match="4GiB"):
            parse_bytes(wrong)


def test_a_budget_counts_what_is_held_reserved_and_spared() -> None:
    held = [30 * MIB]
    budget = Budget(lambda: held[0], 100 * MIB)
    with budget.reserve(50 * MIB, "this"):
        assert budget.reserved_bytes == 50 * MIB
        with pytest.raises(MemoryBudgetError, match=r"30.0 MiB are held and 50.0 MiB reserved"):
            budget.reserve(21 * MIB, "that").__enter__()
        with pytest.raises(MemoryBudgetError, match="left free for merges"):
            budget.reserve(10 * MIB, "that", spare_bytes=11 * MIB).__enter__()
        with budget.reserve(20 * MIB, "that"):
            pass
    with pytest.raises(MemoryBudgetError, match="fits on no worker"):
        budget.reserve(101 * MIB, "that").__enter__()
    assert budget.reserved_bytes == 0
    budget.total_bytes = 0
    with budget.reserve(1 << 60, "anything, where there is no limit"):
        pass


def test_a_budget_of_its_own_is_most_of_what_is_free() -> None:
    assert automatic_bytes(DeviceMemory(1000, 600, 300)) == 480
    assert automatic_bytes(DeviceMemory(0, 0, 300)) == 0
    here = device_memory(torch.device("cpu"))
    assert 50 * MIB < here.own_bytes < here.total_bytes
    assert 0 < here.free_bytes < here.total_bytes


@pytest.mark.parametrize("others", [0, 1000])
@pytest.mark.parametrize("workers", [2, 5])
def test_workers_that_share_memory_do_not_promise_the_same_twice(workers: int, others: int) -> None:
    total, model = 16000, 1500
    # Each looks when it has loaded, while those after it have not begun.
    budgets = [
        automatic_bytes(DeviceMemory(total, total - others - loaded * model, model), 1 / workers)
        for loaded in range(1, workers + 1)
    ]
    assert sum(budgets) <= total - others - workers * model
    assert min(budgets) > 0.4 * (total - others - workers * model) / workers


def test_a_model_that_does_not_fit_into_its_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="put fewer workers on a node or GPU"):
        automatic_bytes(DeviceMemory(8000, 6000, 2000), 0.25)


def test_memory_that_the_system_refuses_is_no_fault_of_the_code() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert status_code(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not is_out_of_memory(RuntimeError("something else"))


@pytest.fixture(scope="module")
def narrow() -> Iterator[WorkerProcess]:
    """A worker that has room for two leaves of case a_4c_full and a merge beside them."""
    case = GoldenCase.load("a_4c_full")
    with running_workers(case.model_dir, "--memory-budget", "1800KiB") as (worker,):
        yield worker


def test_work_that_does_not_fit_is_refused_before_it_takes_memory(narrow: WorkerProcess) -> None:
    case = GoldenCase.load("a_4c_full")
    prompts = [Prompt.of(f"narrow/{number}", case.plan, case.parts) for number in range(40)]
    taken = 0
    try:
        for prompt in prompts:
            for leaf in prompt.plan.leaves:
                run_subtree(narrow, prompt.subtree(leaf.id))
            taken += 1
    except grpc.RpcError:
        pass
    code, message = refusal(lambda: run_subtree(narrow, prompt.subtree(leaf.id, attempt=1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "are held" in message
    assert "--memory-budget" in message
    stats = narrow.stats()
    assert 0 < taken < len(prompts) - 1
    assert stats.reserved_bytes == 0
    assert stats.memory_budget_bytes == 1800 << 10
    # Merges have the room that was left for them: they give memory back.
    done = prompts[0]
    for node in done.plan.merges:
        merged = narrow.stub.Merge(
            done.merge(node.id, [""] * len(node.children)), timeout=CALL_SECONDS
        )
        assert len(merged.context_indices) == node.context_out
    # An answer with more room than there is, and then one that fits.
    code, message = refusal(
        lambda: list(narrow.stub.GenerateTokens(done.generate([], 1_000_000), timeout=CALL_SECONDS))
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "lower max_chunk_len" in message
    answered = list(
        narrow.stub.GenerateTokens(done.generate([], 4, attempt=1), timeout=CALL_SECONDS)
    )
    assert answered[-1].summary.generated_tokens == 4
    for one in prompts[: taken + 1]:
        release(one, [narrow])
    run_subtree(narrow, prompts[-1].subtree(LEAF))
    release(prompts[-1], [narrow])
    eventually(narrow.holds_nothing)


def test_a_worker_is_usable_after_the_system_had_no_memory_for_a_step(tmp_path: Path) -> None:
    # One tensor of a leaf's MLP takes 128 MiB, a hundred times the model's other tensors.
    size = BenchSize(layers=4, hidden=64, intermediate=32768, vocab=256, heads=4, chunk=1024)
    save_bench_model(tmp_path, size)
    prefix, context, suffix = random_prompt(900, size.vocab)
    plan = MergePlan.build(len(prefix), len(context), len(suffix), size.layers, size.config)
    with running_workers(tmp_path, "--memory-budget", "0") as (worker,):
        pid = worker.process.pid
        prompt = Prompt.of("large", plan, (prefix, context, suffix))
        unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
        taken = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (taken + 64 * MIB, unlimited[1]))
        code, message = refusal(lambda: run_subtree(worker, prompt.subtree(plan.root.id)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, message
        assert worker.stats().reserved_bytes == 0
        assert worker.stats().kv_shard_bytes == worker.stats().state_bytes == 0
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        # The same process does the same work when there is memory again.
        run_subtree(worker, prompt.subtree(plan.root.id, attempt=1))
        events = list(worker.stub.GenerateTokens(prompt.generate([], 4), timeout=CALL_SECONDS))
        assert events[-1].summary.generated_tokens == 4
        release(prompt, [worker])
        eventually(worker.holds_nothing)
        assert worker.process.poll() is None


def test_a_request_that_nobody_asks_about_any_more_is_dropped() -> None:
    case = GoldenCase.load("a_4c_full")
    with running_workers(case.model_dir, "--idle-seconds", "0.5") as (worker,):
        prompt = Prompt.of("orphan", case.plan, case.parts)
        run_subtree(worker, prompt.subtree(PARENT))
        assert worker.stats().requests == 1
        eventually(worker.holds_nothing)


@pytest.mark.parametrize("mode", ["paper", "refreshed"])
def test_estimates_of_a_subtree_grow_with_its_height(mode: str) -> None:
    plan = plan_of(GoldenCase.load("a_16c"), mode)
    footprint = Footprint(kv_row_bytes=512, hidden_row_bytes=256, running_row_bytes=4096)
    by_height = [footprint.subtree(plan, NodeId(height, 0)) for height in range(plan.height + 1)]
    assert by_height == sorted(by_height)
    # Twice as many leaves with each level, but no more than a half chunk.
    steps = [high - low for low, high in pairwise(by_height)]
    half_chunk = (plan.config.max_chunk_len // 2 + 64) * plan.num_layers * 512
    assert max(steps) < 2 * half_chunk


def peak_bytes(worker: WorkerProcess) -> int:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return next(
        int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")
    )


def test_resident_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """As much as a worker takes on, with what it keeps until release, by the kernel's count."""
    size = BenchSize(layers=8, hidden=256, intermediate=688, vocab=512, heads=4)
    save_bench_model(tmp_path, size)
    prefix, context, suffix = random_prompt(8192, size.vocab)
    plan = MergePlan.build(len(prefix), len(context), len(suffix), size.layers, size.config)
    with running_workers(tmp_path, "--memory-budget", "96MiB") as (worker,):
        # Everything that a process sets up once; then the peak counts from here.
        first = Prompt.of("first", plan, (prefix, context, suffix))
        run_subtree(worker, first.subtree(PARENT))
        release(first, [worker])
        Path(f"/proc/{worker.process.pid}/clear_refs").write_text("5")
        before = peak_bytes(worker)
        kept: list[Prompt] = []
        refused = False
        while not refused:
            prompt = Prompt.of(f"rss/{len(kept)}", plan, (prefix, context, suffix))
            kept.append(prompt)
            try:
                run_subtree(worker, prompt.subtree(plan.root.id))
                list(worker.stub.GenerateTokens(prompt.generate([], 8), timeout=CALL_SECONDS))
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
                refused = True
        stats = worker.stats()
        taken = peak_bytes(worker) - before
        for prompt in kept:
            release(prompt, [worker])
    held = stats.state_bytes + stats.kv_shard_bytes
    # Most of it was used, and the kernel saw no more than the budget.
    assert 96 * MIB // 3 < held <= taken <= 96 * MIB
