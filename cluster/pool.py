"""Ray's part of the workers: a placement group with one bundle per worker, and an actor in each.

The actors wrap the Ray-free worker server of `workers`; from then on everything goes over gRPC.
Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import PlacementError
from cluster.options import ServeOptions, placement_problem
from cluster.worker_actor import WorkerActor
from cluster.worker_client import GrpcWorkerClient

_log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 10.0


class WorkerPool:
    """The worker actors of a service. Use it in one event loop."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self.clients: list[GrpcWorkerClient] = []

    async def start(self) -> None:
        """Place the workers, let them load the model, and connect to them.

        Raises
        ------
        PlacementError
            When the cluster has no room, with what is missing; or when a worker cannot start.
        """
        options = self._options
        self._group = placement_group([options.bundle] * options.workers, strategy="PACK")
        try:
            await asyncio.wait_for(_result(self._group.ready()), options.placement_timeout_seconds)
        except TimeoutError:
            raise placement_problem(
                options,
                ray.cluster_resources(),
                ray.available_resources(),
                sum(node["Alive"] for node in ray.nodes()),
            ) from None
        actor = ray.remote(WorkerActor)
        self._actors = [
            actor.options(
                num_cpus=options.bundle["CPU"],
                num_gpus=options.bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=number
                ),
            ).remote(options)
            for number in range(options.workers)
        ]
        try:
            addresses = await asyncio.wait_for(
                asyncio.gather(*(_result(actor.start.remote()) for actor in self._actors)),
                options.start_timeout_seconds,
            )
        except TimeoutError:
            raise PlacementError(
                f"the workers did not load {options.model} within "
                f"{options.start_timeout_seconds:g} seconds"
            ) from None
        self.clients = [
            GrpcWorkerClient(f"worker-{number}", address)
            for number, address in enumerate(addresses)
        ]

    async def stop(self) -> None:
        """Let the workers drain, and end their processes."""
        for client in self.clients:
            await client.close()
        stopping = [actor.stop.remote() for actor in self._actors]
        for ref in stopping:
            try:
                await asyncio.wait_for(_result(ref), STOP_TIMEOUT_SECONDS)
            except (RayError, TimeoutError) as error:
                _log.warning("a worker did not stop in peace: %r", error)
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


async def _result(ref: Any) -> Any:
    return await ref
