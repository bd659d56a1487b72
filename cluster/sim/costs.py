"""What work costs on a machine: a file of measured seconds, and lines fitted through them.

A point says: work of this kind, of so many layers and floating-point operations, took so long.
The seconds of a node are then a fixed part, a part for each layer (launching it, norms, moving
rows) and a part for each operation. Knows nothing about scheduling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from homer.cost import node_flops, suffix_flops
from homer.errors import ConfigError
from homer.plan import MergePlan, PlanNode
from homer.shape import ModelShape

Kind = Literal["leaf", "merge", "suffix", "decode"]
KINDS: tuple[Kind, ...] = ("leaf", "merge", "suffix", "decode")


@dataclass(frozen=True)
class CostPoint:
    """Seconds of one piece of work.

    `kind` is a leaf, a merge, a short run through all layers ("suffix": the refreshed suffix, or
    the prefix), or the decoding of one token. `tokens` are those that run, `past` the rows that
    they see before themselves: of a decoded token, the cache.
    """

    kind: Kind
    tokens: int
    past: int
    layers: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """The costs of one model on one kind of worker.

    Attributes
    ----------
    about : str
        What was measured on what, or how it was derived.
    measured : bool
        False for figures from data sheets.
    shape : ModelShape
    settings : mapping
        Fields of `HomerConfig` for this model.
    points : sequence of CostPoint
    event_seconds : float
        Processor time of the coordinator for each event of a worker.
    node_plan_seconds : float
        Time to plan a request, for each node of its tree.
    details : mapping
        Hardware, versions, command.
    """

    about: str
    measured: bool
    shape: ModelShape
    settings: Mapping[str, Any]
    points: tuple[CostPoint, ...]
    event_seconds: float
    node_plan_seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read a file of costs.

        Raises
        ------
        ConfigError
            When it is no such file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            content["shape"] = ModelShape(**content["shape"])
            content["points"] = tuple(CostPoint(**point) for point in content["points"])
            costs = cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is no file of costs ({error!r}); make one with homer bench costs"
            ) from error
        if missing := set(KINDS) - {point.kind for point in costs.points}:
            raise ConfigError(f"{path} has no points of kind {', '.join(sorted(missing))}")
        return costs

    def save(self, path: Path) -> None:
        """Write a file of costs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def node_seconds(self, plan: MergePlan, node: PlanNode) -> float:
        """One leaf or merge."""
        layers = node.layer_end - node.layer_start
        flops = node_flops(plan, self.shape, node)
        return self._seconds("leaf" if node.is_leaf else "merge", layers, flops)

    def prefix_seconds(self, plan: MergePlan) -> float:
        """The prefix, once on each worker that runs parts of a request."""
        if not plan.prefix_len or not plan.height:
            return 0.0
        flops = suffix_flops(self.shape, plan.prefix_len, 0, plan.num_layers)
        return self._seconds("suffix", plan.num_layers, flops)

    def refresh_seconds(self, plan: MergePlan) -> float:
        """The suffix once more at the root."""
        if not plan.refreshes_suffix:
            return 0.0
        past = plan.prefix_len + plan.root.context_out
        flops = suffix_flops(self.shape, plan.suffix_len, past, plan.num_layers)
        return self._seconds("suffix", plan.num_layers, flops)

    def decode_seconds(self, plan: MergePlan) -> float:
        """One token of an answer."""
        flops = suffix_flops(self.shape, 1, plan.kept_len, plan.num_layers)
        return self._seconds("decode", plan.num_layers, flops)

    def plan_seconds(self, plan: MergePlan) -> float:
        """Planning a request, on every machine that has to do with it."""
        return self.node_plan_seconds * len(plan.nodes)

    @property
    def largest_error(self) -> float:
        """Of the fitted seconds, as a part of the measured ones."""
        return max(
            abs(self._seconds(p.kind, p.layers, p.flops) - p.seconds) / p.seconds
            for p in self.points
        )

    def _seconds(self, kind: Kind, layers: int, flops: int) -> float:
        fixed, per_layer, per_flop = self._lines[kind]
        return fixed + per_layer * layers + per_flop * flops

    @cached_property
    def _lines(self) -> dict[Kind, tuple[float, float, float]]:
        return {kind: _fit([p for p in self.points if p.kind == kind]) for kind in KINDS}


def _fit(points: Sequence[CostPoint]) -> tuple[float, float, float]:
    """Seconds as fixed + per layer + per operation, by least squares of the relative error.

    No part may be negative: what would be is left out.
    """
    seconds = np.array([point.seconds for point in points])
    columns = np.array([[1.0, point.layers, point.flops] for point in points]) / seconds[:, None]
    # Operations come in billions: bring the columns to one scale.
    scale = columns.max(axis=0)
    used = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(
            columns[:, used] / scale[used], np.ones(len(points)), rcond=None
        )
        if (found >= 0).all():
            break
        del used[int(found.argmin())]
    line = np.zeros(3)
    line[used] = found / scale[used]
    fixed, per_layer, per_flop = (float(part) for part in line)
    return fixed, per_layer, per_flop
