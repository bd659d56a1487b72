"""The HTTP door before the demo model on worker processes, without Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn

from cluster.bench.local_workers import connected, local_workers
from cluster.door import GrpcDoor
from cluster.http.app import HttpDoor, build_http
from cluster.scheduler import Scheduler
from cluster.service import Limits, LongContextService
from cluster.text import PromptTokenizer
from homer.demo import MODEL_DIR
from homer.shape import homer_defaults
from workers.tokens import Tokens

TOKEN = "a-token-for-the-page-of-the-demo-model"


class Doors(NamedTuple):
    """Where a service is reached: its HTTP door, one that wants TOKEN, and its gRPC door."""

    url: str
    guarded_url: str
    address: str


@contextmanager
def demo_door(workers: int = 2) -> Iterator[Doors]:
    """A service of `workers` workers and its doors."""
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    urls = [f"http://127.0.0.1:{port.getsockname()[1]}" for port in ports]
    with local_workers(MODEL_DIR, workers) as started:
        ready = threading.Event()
        servers: list[uvicorn.Server] = []
        doors: list[Doors] = []

        async def serve() -> None:
            async with connected(started) as clients:
                scheduler = Scheduler(clients)
                service = LongContextService(
                    scheduler,
                    await clients[0].info(),
                    homer_defaults(str(MODEL_DIR)),
                    PromptTokenizer.load(str(MODEL_DIR)),
                    Limits(),
                )
                grpc_door = GrpcDoor("127.0.0.1", 0, service.limits)
                address = f"127.0.0.1:{await grpc_door.listen()}"
                await grpc_door.serve(service)
                for tokens in (None, Tokens(f"page={TOKEN}")):
                    app = build_http(HttpDoor(address, tokens=tokens))
                    servers.append(uvicorn.Server(uvicorn.Config(app, log_level="warning")))
                doors.append(Doors(urls[0], urls[1], address))
                ready.set()
                serving = zip(servers, ports, strict=True)
                await asyncio.gather(*(server.serve([port]) for server, port in serving))
                await grpc_door.stop(0)
                await scheduler.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert ready.wait(60), "the service did not start"
        try:
            yield doors[0]
        finally:
            for server in servers:
                server.should_exit = True
            thread.join()
