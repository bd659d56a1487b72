"""The coordinator actor: owns the worker pool and the scheduler, and serves the doors.

Knows nothing about how requests are translated (`cluster.door`) or scheduled (`cluster.scheduler`).
"""

from __future__ import annotations

import asyncio

from ray.util import get_node_ip_address

from cluster.door import GrpcDoor
from cluster.options import ServeOptions
from cluster.pool import WorkerPool
from cluster.scheduler import Scheduler
from cluster.service import LongContextService
from cluster.text import PromptTokenizer
from homer.config import HomerConfig
from homer.shape import homer_defaults

NAMESPACE = "homer"


class Coordinator:
    """A Ray actor; all of its methods run in the actor's event loop."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._pool = WorkerPool(options)
        self._door: GrpcDoor | None = None
        self._scheduler: Scheduler | None = None

    async def start(self) -> str:
        """Start workers and doors; returns the address of the gRPC door."""
        options = self._options
        _, (config, tokenizer) = await asyncio.gather(
            self._pool.start(), asyncio.to_thread(_load_settings, options)
        )
        self._scheduler = Scheduler(self._pool.clients)
        info = await self._pool.clients[0].info()
        service = LongContextService(self._scheduler, info, config, tokenizer, options.limits)
        self._door = GrpcDoor(service, options.host, options.port)
        port = await self._door.start()
        any_host = options.host in ("0.0.0.0", "[::]", "::")
        return f"{get_node_ip_address() if any_host else options.host}:{port}"

    async def stop(self) -> None:
        """Close the doors, wait for what is being released, and end the workers."""
        if self._door is not None:
            await self._door.stop()
        if self._scheduler is not None:
            await self._scheduler.drain()
        await self._pool.stop()


def _load_settings(options: ServeOptions) -> tuple[HomerConfig, PromptTokenizer | None]:

    config = homer_defaults(options.model, **options.compression.given())
    return config, PromptTokenizer.load(options.model)
