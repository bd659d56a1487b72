"""Facts of every node of a running Ray cluster, gathered by a task on each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.machine import MachineFacts

TASK_SECONDS = 120.0
_ASKS = 3


@dataclass(frozen=True)
class ClusterFacts:
    """The nodes of a cluster that answered, by how much their clocks are ahead, and the others."""

    nodes: list[MachineFacts] = field(default_factory=list)
    clock_offsets: dict[str, float] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def gather_nodes() -> ClusterFacts:
    """Facts of each living node of the cluster that this process has joined."""
    facts = ClusterFacts()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        address = str(node["NodeManagerAddress"])
        try:
            found, offset = _ask(node["NodeID"], address)
        except (RayError, TimeoutError) as error:
            facts.silent[address] = " ".join(str(error).split())[:300]
            continue
        facts.nodes.append(found)
        facts.clock_offsets[address] = offset
    return facts


def _tell(address: str) -> MachineFacts:
    return MachineFacts.here(address)


def _clock() -> float:
    return time.time()


def _ask(node_id: str, address: str) -> tuple[MachineFacts, float]:
    """What a node says, and its clock less ours by the quickest of a few answers."""
    there = {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    tell: Any = ray.remote(_tell)
    facts: MachineFacts = ray.get(tell.options(**there).remote(address), timeout=TASK_SECONDS)
    clock: Any = ray.remote(_clock).options(**there)
    quickest, offset = float("inf"), 0.0
    for _ in range(_ASKS):
        asked = time.time()
        says = ray.get(clock.remote(), timeout=TASK_SECONDS)
        answered = time.time()
        if answered - asked < quickest:
            quickest, offset = answered - asked, says - (asked + answered) / 2
    return facts, offset
