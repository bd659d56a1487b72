"""Measurements of real workers on sizes that take no time, and the simulator beside them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.bench import local_workers as starter
from cluster.bench.local_workers import LocalWorker, connected, local_workers
from cluster.bench.scaling import JobTimes, make_job, measure_scaling, time_job
from cluster.bench.show import scaling_table, wire_table, worker_memory_table
from cluster.bench.wire import measure_model_wire
from cluster.bench.worker_memory import LogFit, WorkerMemory, measure_worker_memory
from cluster.errors import PlacementError
from cluster.sim.costs import CostPoint, Costs
from cluster.sim.network import NetworkOptions
from cluster.sim.simulate import Scenario, simulate
from homer.bench.bench_model import BenchSize, save_bench_model
from homer.cost import node_flops, suffix_flops
from homer.shape import ModelShape
from tests.forked import ForkedProgram

SMALL = BenchSize(
    layers=8, hidden=256, intermediate=512, heads=4, vocab=256, chunk=256, warmup_layers=3
)
RUNS = 20


@pytest.fixture(scope="module", autouse=True)
def workers_start_at_once() -> Iterator[None]:
    """`python -m workers …` is forked from a process that has torch."""

    class Popen(ForkedProgram):
        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            super().__init__("workers.__main__", command[3:], env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Popen}))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-model")
    save_bench_model(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[list[LocalWorker]]:
    with local_workers(model, 2) as started:
        yield started


def test_scaling_times_every_number_of_workers_in_turn(model: Path) -> None:
    order: list[tuple[int, int]] = []
    rows = measure_scaling(
        model, SMALL, [2000], runs=2, on_run=lambda tokens, run: order.append((tokens, run.workers))
    )
    assert order == [(2000, 1), (2000, 2)] * 2
    one, two = rows
    assert (one.speedup, one.ideal_speedup, one.slowdown) == (1, 1, 1)
    assert 1.5 < two.ideal_speedup < 2
    assert set(two.runs[0].node_workers.values()) == {"worker-0", "worker-1"}
    assert two.runs[0].moved_bytes > one.runs[0].moved_bytes == 0
    assert scaling_table(rows, {1: 1.0, 2: 1.0}, {(2000, 1): 1.0, (2000, 2): 1.0}).row_count == 2


def costs_of(run: JobTimes, model: Path, tokens: int) -> Costs:
    """What the nodes of a real run took, as a file of costs."""
    plan, shape = make_job(tokens, SMALL).plan, ModelShape.load(model)
    points = [
        CostPoint(
            "leaf" if node.is_leaf else "merge",
            node.context_in + plan.suffix_len,
            plan.prefix_len,
            node.layer_end - node.layer_start,
            node_flops(plan, shape, node),
            run.node_seconds[node.id],
        )
        for node in plan.nodes
    ]
    past = plan.prefix_len + plan.root.context_out
    flops = suffix_flops(shape, plan.suffix_len, past, plan.num_layers)
    # The workers count the prefix to the node with which they ran it.
    points.append(CostPoint("suffix", plan.suffix_len, past, plan.num_layers, flops, run.refresh))
    points.append(CostPoint("decode", 1, past, plan.num_layers, 1, 0.001))
    config = SMALL.config
    settings = {
        "max_chunk_len": config.max_chunk_len,
        "target_len": config.target_len,
        "warmup_layers": config.warmup_layers,
    }
    return Costs("a real run", True, shape, settings, tuple(points), 0.0007, 5e-6)


@contextmanager
def first_in_line(pids: Sequence[int]) -> Iterator[None]:
    """Where this user may, these processes and this one come before all others."""

    def give(nice: int) -> None:
        for pid in (os.getpid(), *pids):
            for thread in Path(f"/proc/{pid}/task").glob("*"):
                with suppress(PermissionError, ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)

    give(-10)
    try:
        yield
    finally:
        give(0)


@pytest.mark.parametrize("count", [1, 2])
def test_the_simulator_is_within_15_percent_of_real_workers(
    workers: list[LocalWorker], model: Path, count: int
) -> None:
    """Given the node times of a run it must foretell the run's length.

    What else the machine does only makes a run longer than foretold, so the best of a few counts.
    """
    tokens = 6_000

    async def run(turn: int) -> JobTimes:
        async with connected(workers[:count]) as clients:
            return await time_job(clients, make_job(tokens, SMALL, seed=turn))

    asyncio.run(run(0))
    ratios: list[float] = []
    with first_in_line([worker.pid for worker in workers]):
        while not ratios or abs(ratios[-1] - 1) > 0.15:
            assert len(ratios) < RUNS, ratios
            real = asyncio.run(run(len(ratios) + 1))
            scenario = Scenario(workers=count, prompt_tokens=tokens, network=NetworkOptions())
            simulated = simulate(costs_of(real, model, tokens), scenario)
            ratios.append(simulated.first_token / real.first_token)


def test_few_bytes_travel(model: Path) -> None:
    (two,) = measure_model_wire(str(model), 6000, [2], "balanced")
    assert two.states_moved >= 1
    # How many states move depends on how fast each worker happened to be; each travels but once.
    # That few do is tested in virtual time (`test_bytes.py`).
    needed = two.moved_state_bytes + two.row_least
    assert needed < two.sent <= 1.01 * needed
    assert wire_table([two]).row_count == 1


def test_memory_is_that_of_each_worker() -> None:
    results = measure_worker_memory([1000, 8000], size=SMALL)
    assert [len(result.above_bytes) for result in results] == [2, 2]
    # At least the chunk that runs: its hidden states in a few copies.
    assert all(above > 256 * 256 * 4 for result in results for above in result.above_bytes)
    assert worker_memory_table(results, LogFit.of(results)).row_count == 2


def test_a_logarithm_is_recognised() -> None:
    def memory(tokens: int, above: int) -> WorkerMemory:
        return WorkerMemory(tokens, 1, 1, (10, 10), (10 + above, 10 + above))

    grown = [memory(1000, 100), memory(2000, 110), memory(4000, 120)]
    fit = LogFit.of(grown)
    assert (fit.at_first, fit.per_doubling) == pytest.approx((100, 10))
    assert fit.largest_error == pytest.approx(0)
    linear = [memory(1000, 100), memory(2000, 200), memory(4000, 400)]
    assert LogFit.of(linear).largest_error > 0.1


def test_a_worker_that_does_not_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="cannot load the model"), local_workers(tmp_path, 1):
        pass
