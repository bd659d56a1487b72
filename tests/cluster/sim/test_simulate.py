"""The simulator: plain sums where nothing is to be scheduled, and the scheduler where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.ideal import TreeTime
from cluster.sim.costs import CostPoint, Costs
from cluster.sim.derive import GpuSheet, derive_costs
from cluster.sim.grid import NO_NETWORK, simulate_grid
from cluster.sim.network import NetworkOptions
from cluster.sim.simulate import Scenario, make_plan, simulate
from homer.errors import ConfigError
from homer.plan import MergePlan
from homer.shape import ModelShape

SHAPE = ModelShape(
    num_layers=12,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=256,
    window=256,
    value_bytes=4,
)


def made_costs(event_seconds: float = 0.0) -> Costs:
    """A second for each GFLOP, half a second for a short run, and a hundredth for a token."""
    points = [
        CostPoint(kind, 1, 0, layers, flops, flops / 1e9)
        for kind in ("leaf", "merge")
        for layers, flops in ((1, 10**9), (2, 3 * 10**9), (4, 5 * 10**9))
    ]
    points += [CostPoint("suffix", 1, 0, 12, flops, 0.5) for flops in (10**6, 10**9)]
    points += [CostPoint("decode", 1, 0, 12, flops, 0.01) for flops in (10**6, 10**9)]
    return Costs(
        about="made up",
        measured=False,
        shape=SHAPE,
        settings={"max_chunk_len": 128, "target_len": 128, "warmup_layers": 4},
        points=tuple(points),
        event_seconds=event_seconds,
        node_plan_seconds=0.0,
    )


def work_of(costs: Costs, plan: MergePlan) -> float:
    return sum(costs.node_seconds(plan, node) for node in plan.nodes)


def test_one_worker_takes_the_sum_of_its_work() -> None:
    costs = made_costs()
    plan = make_plan(costs, 4000)
    result = simulate(costs, Scenario(workers=1, prompt_tokens=4000, network=NO_NETWORK))
    short_runs = costs.prefix_seconds(plan) + costs.refresh_seconds(plan)
    assert result.first_token == pytest.approx(work_of(costs, plan) + short_runs, rel=1e-6)
    assert result.work_seconds == pytest.approx(result.first_token, rel=1e-6)
    assert result.moved_bytes == 0


def test_costs_that_follow_a_line_are_fitted_exactly() -> None:
    costs = made_costs()
    assert costs.largest_error < 1e-9
    plan = make_plan(costs, 4000)
    assert work_of(costs, plan) > 0
    assert costs.decode_seconds(plan) > 0


@pytest.mark.parametrize("workers", [2, 3, 8, 40])
def test_more_workers_are_between_one_and_the_best_schedule(workers: int) -> None:
    costs = made_costs()
    plan = make_plan(costs, 16000)
    alone = simulate(costs, Scenario(workers=1, prompt_tokens=16000)).first_token
    result = simulate(costs, Scenario(workers=workers, prompt_tokens=16000))
    seconds = {node.id: costs.node_seconds(plan, node) for node in plan.nodes}
    best = TreeTime.of(plan, seconds, workers).best
    assert best < result.first_token < alone
    assert result.moved_bytes > 0


def test_a_slow_network_and_a_slow_coordinator_show() -> None:
    scenario = Scenario(workers=4, prompt_tokens=16000, network=NO_NETWORK)
    fast = simulate(made_costs(), scenario)
    slow_network = NetworkOptions(bytes_per_second=1e5, workers_per_host=1)
    slow = simulate(made_costs(), replace(scenario, network=slow_network))
    assert slow.moved_bytes == fast.moved_bytes
    # The root's worker takes in at least its three peers' part of the cache.
    assert slow.first_token > fast.first_token + 0.5 * slow.moved_bytes / 1e5
    busy = simulate(made_costs(event_seconds=0.2), scenario)
    assert busy.first_token > fast.first_token + 0.2
    assert busy.coordinator_busy_seconds == pytest.approx(0.2 * busy.events)


def test_the_same_seed_gives_the_same_result() -> None:
    scenario = Scenario(workers=5, prompt_tokens=8000, requests=6, concurrent=3, new_tokens=4)
    first, second = simulate(made_costs(), scenario), simulate(made_costs(), scenario)
    assert replace(first, real_seconds=0) == replace(second, real_seconds=0)
    assert len(first.first_token_seconds) == 6


def test_a_grid_names_what_holds_each_cell_back() -> None:
    cells = simulate_grid(made_costs(event_seconds=0.02), [1, 64], [16000], NetworkOptions())
    assert [cell.result.scenario.workers for cell in cells] == [1, 64]
    assert cells[0].efficiency == pytest.approx(1.0)
    assert cells[1].efficiency < 0.8
    for cell in cells:
        lost = cell.first_token - cell.tree.work / cell.result.scenario.workers
        assert sum(cell.losses.values()) == pytest.approx(lost)
    assert cells[1].bottleneck in ("critical path", "coordinator")


def test_costs_are_saved_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    costs = made_costs()
    costs.save(file)
    loaded = Costs.load(file)
    assert (loaded.shape, loaded.points) == (costs.shape, costs.points)
    file.write_text('{"about": "nothing"}')
    with pytest.raises(ConfigError, match="homer bench costs"):
        Costs.load(file)


def test_the_files_that_ship_can_be_simulated() -> None:
    machines = Path(__file__).parents[3] / "cluster" / "sim" / "machines"
    files = {file.name: Costs.load(file) for file in machines.glob("*.json")}
    assert files["bench-cpu.json"].measured
    assert files["bench-cpu.json"].largest_error < 0.5
    # What it is said to be made by is what makes it.
    assert files["llama-7b-h100-derived.json"] == replace(
        derive_costs(GpuSheet(), ModelShape()), details=files["llama-7b-h100-derived.json"].details
    )
    for costs in files.values():
        result = simulate(costs, Scenario(workers=2, prompt_tokens=32768))
        assert 0 < result.first_token < 60
