"""Which workers a service has and what each needs of a node of the cluster.

Plain data. Knows nothing about Ray, which places them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.errors import PlacementError

Placement = Literal["pack", "spread", "strict-pack", "strict-spread"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What one worker computes on, and what it takes of a node.

    Parameters
    ----------
    gpus : float
        GPUs; below 1 is a share of one, 0 is a worker on the CPU.
    cpus : int
        Processors that are set aside; a worker on the CPU computes with as many threads.
    resources : mapping
        Further resources of the node, by Ray's names, and how much of each.
    labels : mapping
        Labels that the node must have, in the words of Ray's label selectors.
    leaf : bool
        It loads only the layers that leaves run.
    """

    gpus: float = 0.0
    cpus: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    leaf: bool = False

    @property
    def bundle(self) -> dict[str, float]:
        """Resources by Ray's names."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": float(self.cpus), **gpus, **self.resources}


@dataclass(frozen=True)
class Place:
    """Where a worker goes: bundle `index` of a group of `specs` that are placed together.

    Workers of the same `group` share it. Without `specs` the worker is placed for itself, away from
    others where that is possible.
    """

    group: str = ""
    index: int = 0
    specs: Sequence[WorkerSpec] = ()
    placement: Placement = "pack"


def total(specs: Sequence[WorkerSpec]) -> dict[str, float]:
    """What all of `specs` take together."""
    summed: Counter[str] = Counter()
    for spec in specs:
        summed.update(spec.bundle)
    return dict(summed)


def placement_problem(
    specs: Sequence[WorkerSpec],
    placement: Placement,
    has: Mapping[str, float],
    free: Mapping[str, float],
    nodes: int,
) -> PlacementError:
    """Says what is missing for the workers; `has` and `free` are the whole cluster's."""
    kinds: dict[str, int] = {}
    for spec in specs:
        need = ", ".join(f"{amount:g} {kind}" for kind, amount in spec.bundle.items())
        if spec.labels:
            need += f" on a node with {', '.join(f'{k}={v}' for k, v in spec.labels.items())}"
        kinds[need] = kinds.get(need, 0) + 1
    needs = " and ".join(f"{count} worker(s) of {need} each" for need, count in kinds.items())
    together = {"strict-pack": ", all on one node", "strict-spread": ", each on a node of its own"}
    there = ", ".join(
        f"{has.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in total(specs)
    )
    only_cpu = not any(spec.gpus for spec in specs)
    fewer = "--workers or --threads" if only_cpu else "--workers"
    advice = "" if only_cpu or has.get("GPU") else ", or use --cpu"
    return PlacementError(
        f"no room for {needs}{together.get(placement, '')}: the Ray cluster of {nodes} node(s) has "
        f"{there}. Add nodes, or lower {fewer}{advice}"
    )
