"""The keeper actor: owns the worker actors and their places, and does nothing else.

Ray ends an actor when its owner ends. So workers outlive a coordinator that dies, which finds them
here again, and end with the service, however that ends. Knows nothing about models or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.options import ServeOptions
from cluster.placement import Place
from cluster.worker_actor import WorkerActor


def keeper_name(service: str) -> str:
    """The name of a service's keeper in Ray's namespace."""
    return f"{service}-keeper"


@dataclass
class _Kept:
    actor: Any = None
    # The processes that this worker has been, in order.
    processes: list[str] = field(default_factory=list)


class Keeper:
    """A Ray actor. Its calls are short and come one at a time; repeating one does no harm."""

    def __init__(self) -> None:
        self._workers: dict[int, _Kept] = {}
        self._groups: dict[str, PlacementGroup] = {}
        self._numbers = 0
        self._door_port: int | None = None

    def numbers(self) -> list[int]:
        """The numbers of the workers that there are."""
        return sorted(self._workers)

    def next_number(self) -> int:
        """A number that no worker ever had."""
        self._numbers += 1
        return self._numbers - 1

    def worker(self, number: int, options: ServeOptions, toward: str) -> Any:
        """The actor of worker `number`; made and placed when there is none.

        Parameters
        ----------
        toward : str
            An address of the coordinator's node, which the worker's own address must reach.
        """
        self._numbers = max(self._numbers, number + 1)
        kept = self._workers.setdefault(number, _Kept())
        if kept.actor is None:
            kept.actor = self._make(number, options, toward)
        return kept.actor

    def name(self, number: int, process: str) -> str:
        """The name of one process of worker `number`: "worker-3", when it is back "worker-3.1"."""
        kept = self._workers[number]
        if process not in kept.processes:
            kept.processes.append(process)
        restarts = kept.processes.index(process)
        return f"worker-{number}.{restarts}" if restarts else f"worker-{number}"

    def drop(self, number: int) -> None:
        """End worker `number` and give back its place, where that is its own."""
        kept = self._workers.pop(number, None)
        if kept is not None and kept.actor is not None:
            ray.kill(kept.actor)
        if group := self._groups.pop(f"worker-{number}", None):
            remove_placement_group(group)

    def replace(self, number: int) -> None:
        """Forget an actor that Ray has given up, so that the next one asked for is a new one."""
        if number in self._workers:
            self._workers[number].actor = None

    def door_port(self) -> int | None:
        """The port on which the service was reached first; None before that."""
        return self._door_port

    def remember_door_port(self, port: int) -> None:
        self._door_port = port

    def close(self) -> None:
        """End all workers at once and give back their places."""
        for number in self.numbers():
            self.drop(number)
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()

    def _make(self, number: int, options: ServeOptions, toward: str) -> Any:
        place, spec = options.place(number), options.spec(number)
        settings: dict[str, Any]
        if place.specs:
            settings = {
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group=self._group(place), placement_group_bundle_index=place.index
                )
            }
        else:
            settings = {"scheduling_strategy": "SPREAD", "label_selector": dict(spec.labels)}
        actor: Any = ray.remote(WorkerActor)
        return actor.options(
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            resources=dict(spec.resources),
            # Its calls are made again by whoever watches the worker, who must know that it is new.
            max_restarts=-1,
            max_task_retries=0,
            **settings,
        ).remote(options, spec, toward)

    def _group(self, place: Place) -> PlacementGroup:
        if place.group not in self._groups:
            self._groups[place.group] = placement_group(
                [spec.bundle for spec in place.specs],
                strategy=place.placement.upper().replace("-", "_"),
                bundle_label_selector=[dict(spec.labels) for spec in place.specs],
            )
        return self._groups[place.group]
