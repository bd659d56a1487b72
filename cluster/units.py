"""Units: the nodes of a plan as the scheduler sees them, and their tries.

A *unit* is a piece (a subtree that is handed out whole) or a merge above the pieces; a *try* is one
run of it on a worker. Nouns only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from homer.plan import NodeId, PlanNode


@dataclass(eq=False)
class Try:
    """One run of a unit on a worker; it counts as long as it is among the unit's tries."""

    unit: Unit
    worker: str
    attempt: int
    started: float
    work_done: int = 0

    @property
    def node(self) -> NodeId:
        return self.unit.node.id


@dataclass(eq=False)
class Unit:
    """A piece or a merge. `waiting` counts the children that are not done."""

    node: PlanNode
    order: int
    piece: bool
    waiting: int
    home: str | None = None
    kept: Sequence[int] | None = None
    holders: set[str] = field(default_factory=set)
    attempt: int = 0
    tries: dict[str, Try] = field(default_factory=dict)
    # Where it failed, and how often; how many workers were lost while they ran it.
    avoid: set[str] = field(default_factory=set)
    faults: int = 0
    losses: int = 0


@dataclass(frozen=True)
class Started:
    """A try, and where a merge's children are."""

    attempt: Try
    children: tuple[tuple[NodeId, str], ...] = ()
