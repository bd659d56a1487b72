"""Many scenarios beside each other, and what holds each of them back.

A cell is run three times: as it is, with a coordinator that takes no time, and with a network that
takes none either. What is left then is the tree and the hand-out of its pieces, which are compared
with the best schedule there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.bench.ideal import TreeTime
from cluster.sim.costs import Costs
from cluster.sim.network import NetworkOptions
from cluster.sim.simulate import Scenario, SimResult, make_plan, simulate
from homer.plan import MergePlan

Bottleneck = Literal["critical path", "coordinator", "network", "planning", "hand-out"]

NO_NETWORK = NetworkOptions(
    latency_seconds=0.0,
    local_latency_seconds=0.0,
    call_seconds=0.0,
    bytes_per_second=1e18,
    local_bytes_per_second=1e18,
)


@dataclass(frozen=True)
class Cell:
    """One number of workers and one length.

    `result` is the scenario as it is; `free_coordinator` and `free_network` are the seconds to the
    first token without what takes time there, the second without either. `tree` is the best that
    the tree allows, `alone` the seconds of one worker.
    """

    result: SimResult
    tree: TreeTime
    alone: float
    plan_seconds: float
    free_coordinator: float
    free_network: float

    @property
    def first_token(self) -> float:
        return self.result.first_token

    @property
    def efficiency(self) -> float:
        """The part of all workers' time that one worker alone would have taken."""
        return self.alone / (self.result.scenario.workers * self.first_token)

    @property
    def of_ideal(self) -> float:
        """The part of the best time that the tree allows."""
        return self.tree.best / self.first_token

    @property
    def losses(self) -> dict[Bottleneck, float]:
        """Seconds beyond an even share of the work, by what takes them."""
        even = self.tree.work / self.result.scenario.workers
        return {
            "critical path": self.tree.best - even,
            "coordinator": self.first_token - self.free_coordinator,
            "network": self.free_coordinator - self.free_network,
            "planning": 2 * self.plan_seconds,
            "hand-out": self.free_network - 2 * self.plan_seconds - self.tree.best,
        }

    @property
    def bottleneck(self) -> Bottleneck:
        """What takes the most of the time that is not an even share of the work."""
        losses = self.losses
        return max(losses, key=lambda name: losses[name])


def simulate_grid(
    costs: Costs,
    workers: Sequence[int],
    lengths: Sequence[int],
    network: NetworkOptions,
    *,
    on_cell: Callable[[Cell], None] | None = None,
) -> list[Cell]:
    """One request on an idle pool, for each length and number of workers."""
    cells = []
    for tokens in lengths:
        plan = make_plan(costs, tokens)
        alone = simulate(costs, _scenario(1, tokens, network), plan).first_token
        for count in workers:
            cells.append(_cell(costs, _scenario(count, tokens, network), plan, alone))
            if on_cell is not None:
                on_cell(cells[-1])
    return cells


def simulate_failures(
    costs: Costs,
    scenario: Scenario,
    failures_per_hour: Sequence[float],
    *,
    on_result: Callable[[SimResult], None] | None = None,
) -> list[SimResult]:
    """The same requests with more and more workers dying."""
    plan = make_plan(costs, scenario.prompt_tokens)
    results = []
    for rate in failures_per_hour:
        results.append(simulate(costs, replace(scenario, failures_per_hour=rate), plan))
        if on_result is not None:
            on_result(results[-1])
    return results


def _scenario(workers: int, tokens: int, network: NetworkOptions) -> Scenario:
    return Scenario(workers=workers, prompt_tokens=tokens, network=network)


def _cell(costs: Costs, scenario: Scenario, plan: MergePlan, alone: float) -> Cell:
    seconds = {node.id: costs.node_seconds(plan, node) for node in plan.nodes}
    # Every worker runs the prefix before its first node.
    besides = costs.prefix_seconds(plan) + costs.refresh_seconds(plan)
    free_coordinator = replace(costs, event_seconds=0.0)
    free_network = replace(scenario, network=NO_NETWORK)
    return Cell(
        result=simulate(costs, scenario, plan),
        tree=TreeTime.of(plan, seconds, scenario.workers, besides),
        alone=alone,
        plan_seconds=costs.plan_seconds(plan),
        free_coordinator=simulate(free_coordinator, scenario, plan).first_token,
        free_network=simulate(free_coordinator, free_network, plan).first_token,
    )
