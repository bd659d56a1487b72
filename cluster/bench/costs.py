"""Measures what `cluster.sim` needs to know of a machine, and puts it into a file of costs.

Knows nothing about simulations.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from cluster.sim.costs import CostPoint, Costs
from homer.bench.node_times import NodeTime, measure_side_by_side
from homer.config import HomerConfig
from homer.plan import MergePlan
from homer.shape import ModelShape

# Processor time of the coordinator for one event of a worker, from message to client: `homer bench
# scaling` prints it.
EVENT_SECONDS = 0.0007


def measure_costs(
    model: Path,
    config: HomerConfig,
    *,
    about: str,
    processes: int = 1,
    threads: int = 1,
    rounds: int = 3,
    event_seconds: float = EVENT_SECONDS,
    details: dict[str, Any] | None = None,
) -> Costs:
    """The costs of a model on this machine's CPU, with `processes` running at once."""
    times = measure_side_by_side(str(model), config, processes, rounds=rounds, threads=threads)
    return Costs(
        about=about,
        measured=True,
        shape=ModelShape.load(model),
        settings={
            "max_chunk_len": config.max_chunk_len,
            "target_len": config.target_len,
            "warmup_layers": config.warmup_layers,
        },
        points=medians(times),
        event_seconds=event_seconds,
        node_plan_seconds=measure_planning(config, ModelShape.load(model).num_layers),
        details={"processes": processes, "threads": threads, **(details or {})},
    )


def medians(times: Sequence[NodeTime]) -> tuple[CostPoint, ...]:
    """One point for all times of the same work."""
    same: dict[NodeTime, list[float]] = defaultdict(list)
    for one in times:
        same[replace(one, seconds=0.0)].append(one.seconds)
    return tuple(
        CostPoint(**{**asdict(work), "seconds": statistics.median(seconds)})
        for work, seconds in sorted(same.items(), key=lambda pair: astuple(pair[0]))
    )


def measure_planning(config: HomerConfig, layers: int, leaves: int = 500) -> float:
    """Seconds to plan a request, for each node of its tree."""
    context = leaves * (config.max_chunk_len // 2)
    started = time.perf_counter()
    plan = MergePlan.build(1, context, 1, layers, config)
    plan.subtree(plan.root.id)
    return (time.perf_counter() - started) / len(plan.nodes)
