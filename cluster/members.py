"""The workers of a scheduler: who they are, what they run now, how fast they are.

Knows nothing about jobs but their request ids, and calls nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice

from cluster.job import WorkerClient, WorkerInfo, WorkerStats
from homer.plan import PlanNode

SPEED_WEIGHT = 0.3


class Member:
    """One worker, from the time it joins until it is lost or has left.

    Attributes
    ----------
    layers : int or None
        How many of the lowest layers it has: it runs nodes that need no more, and never a root.
        None is all.
    running : set of str
        Requests of which it runs a piece or a merge, one of each.
    answers : int
        Answers that it gathers or decodes.
    held : set of str
        Requests of which it may hold something.
    info, stats
        What it last said about itself; None before.
    """

    def __init__(self, client: WorkerClient, layers: int | None = None) -> None:
        self.client = client
        self.layers = layers
        self.name = client.name
        self.running: set[str] = set()
        self.answers = 0
        self.held: set[str] = set()
        self.draining = False
        self.lost = False
        self.info: WorkerInfo | None = None
        self.stats: WorkerStats | None = None
        self.empty = asyncio.Event()
        self.empty.set()
        # Work per second of one piece, as it comes out beside whatever else runs here.
        self.speed: float | None = None

    @property
    def load(self) -> int:
        """How much it does at once: fewer is better for new work."""
        return len(self.running) + self.answers

    def fits(self, node: PlanNode) -> bool:
        """Whether it has the layers that `node` runs."""
        return self.layers is None or node.layer_end <= self.layers

    def room(self, slots: int) -> int:
        """How many pieces or merges it may take beside what it runs; answers take places too."""
        return max(1, slots - self.answers) - len(self.running)

    def measured(self, work: float, seconds: float) -> None:
        """It did `work` in `seconds`."""
        if seconds > 0:
            speed = work / seconds
            before = self.speed if self.speed is not None else speed
            self.speed = before + SPEED_WEIGHT * (speed - before)

    def holds(self, request_id: str) -> None:
        self.held.add(request_id)
        self.empty.clear()

    def released(self, request_id: str) -> None:
        self.held.discard(request_id)
        if not self.held:
            self.empty.set()


class Members:
    """All workers by name; those that may get work also by load, and their speeds together."""

    def __init__(self) -> None:
        self._all: dict[str, Member] = {}
        self._usable: dict[str, Member] = {}
        self._by_load: dict[int, dict[str, Member]] = {}
        self._load_of: dict[str, int] = {}
        self._speeds: dict[str, float] = {}
        self._speed_sum = 0.0

    def __len__(self) -> int:
        """The number of those that may get work."""
        return len(self._usable)

    def __iter__(self) -> Iterator[Member]:
        """Those that may get work, in the order in which they joined."""
        return iter(list(self._usable.values()))

    @property
    def everybody(self) -> list[Member]:
        """Draining ones too."""
        return list(self._all.values())

    def get(self, name: str | None) -> Member | None:
        return self._all.get(name) if name is not None else None

    def usable(self, name: str) -> bool:
        """Whether this worker may get work."""
        return name in self._usable

    def fits(self, name: str, node: PlanNode) -> bool:
        """Whether this worker has the layers that `node` runs."""
        member = self._all.get(name)
        return member is not None and member.fits(node)

    def fitting(self, node: PlanNode) -> list[Member]:
        """Those that may get work and have the layers that `node` runs."""
        return [member for member in self if member.fits(node)]

    @property
    def has_full(self) -> bool:
        """Whether any that may get work has all layers."""
        return any(member.layers is None for member in self._usable.values())

    def at(self, address: str) -> Member | None:
        """Whose address this is."""
        return next((m for m in self._all.values() if m.client.address == address), None)

    def add(self, member: Member) -> None:
        self._all[member.name] = self._usable[member.name] = member
        self.update(member)

    def remove(self, member: Member) -> None:
        self._all.pop(member.name, None)
        self._retire(member)

    def drain(self, member: Member) -> None:
        """It gets nothing more."""
        member.draining = True
        self._retire(member)

    def update(self, member: Member) -> None:
        """Its load or speed may have changed."""
        if member.name not in self._usable:
            return
        before = self._load_of.get(member.name)
        if before != member.load:
            if before is not None:
                del self._by_load[before][member.name]
            self._by_load.setdefault(member.load, {})[member.name] = member
            self._load_of[member.name] = member.load
        speed = self._speeds.pop(member.name, None)
        self._speed_sum -= speed or 0.0
        if member.speed is not None:
            self._speeds[member.name] = member.speed
            self._speed_sum += member.speed

    def by_load(self) -> Iterator[Member]:
        """Those that may get work, the least busy first; may be changed on the way."""
        for load in sorted(self._by_load):
            yield from list(self._by_load[load].values())

    def idle(self, most: int) -> list[Member]:
        """Some of those that do nothing."""
        return list(islice(self._by_load.get(0, {}).values(), most))

    def speed(self, name: str) -> float:
        """Work per second of a worker; the mean of the others where it is not known yet."""
        return self._speeds.get(name) or self.mean_speed

    @property
    def mean_speed(self) -> float:
        return self._speed_sum / len(self._speeds) if self._speeds else 1.0

    @property
    def total_speed(self) -> float:
        """Work per second of all together."""
        return self.mean_speed * max(1, len(self._usable))

    def _retire(self, member: Member) -> None:
        self._usable.pop(member.name, None)
        load = self._load_of.pop(member.name, None)
        if load is not None:
            del self._by_load[load][member.name]
        self._speed_sum -= self._speeds.pop(member.name, 0.0)
