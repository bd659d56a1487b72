"""The coordinator actor: owns the worker pool and the scheduler, and serves the doors.

Ray restarts it when it dies. Then it finds the workers that live, has them forget what they hold,
and serves on the port that it had. Knows nothing about how requests are translated
(`cluster.door`) or scheduled (`cluster.scheduler`).
"""

from __future__ import annotations

import asyncio
import logging

import ray
from ray.util import get_node_ip_address

from cluster.door import GrpcDoor
from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import WorkerInfo
from cluster.keeper import keeper_name
from cluster.options import ServeOptions
from cluster.pool import WorkerPool
from cluster.scheduler import Scheduler
from cluster.seeing import Seeing
from cluster.service import LongContextService
from cluster.slot import result
from cluster.text import PromptTokenizer, leave_out_torch
from homer.config import HomerConfig
from homer.shape import homer_defaults
from workers.addresses import join_port
from workers.logs import set_up_logging
from workers.tracing import connect_tracing

_log = logging.getLogger(__name__)

NAMESPACE = "homer"
# What its spans come from.
IDENTITY = {"service_name": "homer", "service_instance_id": "coordinator"}
# The port of a coordinator that was killed is free as soon as its process has gone.
PORT_TIMEOUT_SECONDS = 20.0


class Coordinator:
    """A Ray actor; all of its methods run in the actor's event loop.

    It starts by itself, so that it is back after a restart without being asked.
    """

    def __init__(self, options: ServeOptions) -> None:
        set_up_logging(options.log_format)
        leave_out_torch()
        self._options = options
        self._keeper = ray.get_actor(keeper_name(options.name), NAMESPACE)
        self._seeing = Seeing(connect_tracing(options.otlp_endpoint, **IDENTITY))
        self._scheduler = Scheduler(observer=self._seeing.observer)
        here = get_node_ip_address()
        self._pool = WorkerPool(options, self._keeper, here, self._scheduler)
        self._scheduler.on_worker_lost = self._pool.fence
        if options.grows:
            self._scheduler.expect_workers(options.most + options.cpu_workers)
        self._door: GrpcDoor | None = None
        self._ended = asyncio.Event()
        self._starting = asyncio.create_task(self._start())

    async def start(self) -> str:
        """Returns the address of the gRPC door, when it serves."""
        return await asyncio.shield(self._starting)

    async def until_ended(self) -> None:
        """Returns when the service was stopped; fails when the process dies."""
        await self._ended.wait()

    async def drain(self, grace_seconds: float) -> None:
        """Close the doors; requests that run may take `grace_seconds` to end."""
        if self._door is not None:
            await self._door.drain(grace_seconds)

    async def drain_node(self, node_id: str, grace_seconds: float) -> dict[str, bool]:
        """Let what runs on a node end before it goes: its workers, and the doors, if it has them.

        Returns its workers, each with whether it holds nothing any more.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_seconds
        if node_id == ray.get_runtime_context().get_node_id():
            await self.drain(grace_seconds)
        return await self._pool.drain_node(node_id, max(0.0, deadline - loop.time()))

    async def stop(self) -> None:
        """Close the doors, wait for what is being released, and end the workers."""
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        if self._door is not None:
            await self._door.stop()
        await self._scheduler.close()
        await self._pool.stop()
        await self._seeing.stop()
        self._ended.set()

    async def _start(self) -> str:
        options = self._options
        door, port = await self._listen()
        _, (config, tokenizer) = await asyncio.gather(
            self._pool.start(), asyncio.to_thread(_load_settings, options)
        )
        info = await self._worker_info()
        service = LongContextService(
            self._scheduler, info, config, tokenizer, options.limits, self._seeing
        )
        service.absent_workers = self._pool.absent
        await door.serve(service)
        # After the door: where this is a restart, the port of the one before is free by then.
        self._seeing.start(options.host, options.metrics_port, options.security)
        any_host = options.host in ("0.0.0.0", "[::]", "::")
        return join_port(get_node_ip_address() if any_host else options.host, port)

    async def _worker_info(self) -> WorkerInfo:
        """What the workers are: all have the same model."""
        while True:
            for client in self._pool.clients:
                try:
                    return await client.info()
                except (WorkerLostError, WorkerCallError) as error:
                    _log.warning("no information: %s", error)
            await asyncio.sleep(0.1)

    async def _listen(self) -> tuple[GrpcDoor, int]:
        """The door and its port, which is where the service was reached before, if it was."""
        before = await result(self._keeper.door_port.remote())
        deadline = asyncio.get_running_loop().time() + PORT_TIMEOUT_SECONDS
        while True:
            options = self._options
            door = GrpcDoor(
                options.host,
                before or options.port,
                options.limits,
                options.security,
                with_reflection=options.reflection,
            )
            try:
                port = await door.listen()
                break
            except OSError:
                if not before or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)
        self._door = door
        await result(self._keeper.remember_door_port.remote(port))
        return door, port


def _load_settings(options: ServeOptions) -> tuple[HomerConfig, PromptTokenizer | None]:
    hub = options.load.hub
    config = homer_defaults(options.model, hub=hub, **options.compression.given())
    return config, PromptTokenizer.load(options.model, **hub)
