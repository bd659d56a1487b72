"""A Ray actor around the Ray-free worker server.

Starts it on an address of the node and ends it; requests never come through Ray. Knows nothing
about what a worker does.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from cluster.options import ServeOptions
from cluster.placement import WorkerSpec
from homer.checkpoint import FileWatch

# Before anything imports gRPC: a server must not try to survive a fork that nobody makes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from workers.addresses import address_toward, join_port
from workers.collector import not_collecting
from workers.logs import set_up_logging

if TYPE_CHECKING:
    from workers.server import WorkerServer


@dataclass(frozen=True)
class WorkerProcess:
    """One process of a worker actor; after a restart there is another one."""

    id: str
    process_id: int
    node_id: str


class WorkerActor:
    """One worker. Its methods run in the actor's event loop, and so does its gRPC server."""

    def __init__(self, options: ServeOptions, spec: WorkerSpec, toward: str) -> None:
        set_up_logging(options.log_format)
        self._process = WorkerProcess(
            uuid.uuid4().hex, os.getpid(), ray.get_runtime_context().get_node_id()
        )
        self._options = options
        self._spec = spec
        self._toward = toward
        self._server: WorkerServer | None = None
        self._files: FileWatch | None = None
        self._started: asyncio.Task[str] | None = None
        self._ended = asyncio.Event()

    async def process(self) -> WorkerProcess:
        """Which process answers."""
        return self._process

    async def start(self, name: str) -> str:
        """Load the model and serve as `name`, where that is not done; returns the address."""
        if self._started is None:
            self._started = asyncio.create_task(self._start(name))
        return await asyncio.shield(self._started)

    async def until_files_change(self) -> None:
        """Returns when the model's files are not those that were there when it was to be loaded."""
        if self._files is not None:
            await self._files.changed()

    async def until_ended(self) -> None:
        """Returns when the worker was stopped; fails when the process dies."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Drain and end."""
        if self._server is not None:
            await self._server.stop()
        self._ended.set()

    async def _start(self, name: str) -> str:
        # Here, since driver, keeper and coordinator only name this class, and need no torch.
        with not_collecting():
            from workers.server import WorkerServer

        options = self._options
        set_up_logging(options.log_format, worker=name)
        worker = options.worker_options(
            self._spec,
            name=name,
            host=options.worker_host or address_toward(self._toward),
            node_cpus=_node_cpus(),
        )
        self._files = worker.watch_files()
        server = WorkerServer(worker)
        self._server = server
        port = await server.start()
        return join_port(server.host, port)


def _node_cpus() -> float:
    """The processors of this node, as Ray counts them."""
    here = ray.get_runtime_context().get_node_id()
    return sum(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)
