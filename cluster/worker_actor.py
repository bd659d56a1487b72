"""A Ray actor around the Ray-free worker server.

Starts it on the node's own address and ends it; requests never come through Ray. Knows nothing
about what a worker does.
"""

from __future__ import annotations

import logging
import os

from ray.util import get_node_ip_address

from cluster.options import ServeOptions

# Before anything imports gRPC: a server must not try to survive a fork that nobody makes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from workers.options import WorkerOptions
from workers.server import WorkerServer


class WorkerActor:
    """One worker. Its methods run in the actor's event loop, and so does its gRPC server."""

    def __init__(self, options: ServeOptions) -> None:
        logging.basicConfig(level=logging.INFO)
        self._host = options.worker_host or get_node_ip_address()
        self._server = WorkerServer(
            WorkerOptions(
                model=options.model,
                host=self._host,
                device="cpu" if options.cpu else "cuda:0",
                dtype=options.dtype,
                threads=options.threads if options.cpu else 0,
                bias=options.bias,
            )
        )

    async def start(self) -> str:
        """Load the model and serve; returns the address."""
        port = await self._server.start()
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        """Drain and end."""
        await self._server.stop()
