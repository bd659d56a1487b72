"""The gRPC server around a worker: start, health, drain, stop.

Runs in the event loop that starts it: a process of its own (`python -m workers`), or any other that
wants a worker inside. Knows nothing about what the calls do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from homer.errors import ConfigError, HomerError
from homer.v1 import worker_pb2
from workers.addresses import find_address, join_port
from workers.allocator import keep_frame_memory
from workers.call_context import CallContext
from workers.engine import Engine, LoadedModel
from workers.guard import Guard
from workers.messages import Messages
from workers.metrics import WorkerMetrics
from workers.metrics_port import MetricsPort
from workers.options import WorkerOptions
from workers.ranked_model import load_on_all_ranks
from workers.servicer import WorkerServicer
from workers.tracing import Tracing, connect_tracing
from workers.transport import SERVER_OPTIONS, SERVICE, worker_handlers

_log = logging.getLogger(__name__)

STATS_TIMEOUT_SECONDS = 5.0
HEALTH_SERVICES = ("", SERVICE.full_name)


class WorkerServer:
    """One worker: its model, its server and its threads.

    Parameters
    ----------
    options : WorkerOptions

    Examples
    --------
    >>> import asyncio
    >>> from workers.options import WorkerOptions
    >>> from workers.server import WorkerServer
    >>> async def start_and_stop():
    ...     server = WorkerServer(WorkerOptions(model=model))
    ...     port = await server.start()
    ...     await server.stop()
    ...     return port
    >>> asyncio.run(start_and_stop()) > 0
    True
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.host = ""
        self.port = 0
        self._engine = Engine()
        self._tracing = Tracing()
        self._metrics_port: MetricsPort | None = None
        self._servicer: WorkerServicer | None = None
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None

    async def start(self) -> int:
        """Listen, load the model, and take work; returns the port.

        Raises
        ------
        ConfigError, ModelError, BiasError
            As `listen` and `load` do; nothing runs then.
        """
        await self.listen()
        try:
            await self.load()
        except BaseException:
            await self.stop(0)
            raise
        return self.port

    async def listen(self) -> None:
        """Answer calls, if only to say that the model is not loaded; health is NOT_SERVING.

        Raises
        ------
        ConfigError
            When the address cannot be listened on, or this machine has none where the options say.
        """
        keep_frame_memory()
        self.host = find_address(self.options.host)
        self._tracing = connect_tracing(
            self.options.otlp_endpoint,
            service_name="homer-worker",
            service_instance_id=self.options.name or f"{socket.gethostname()}:{os.getpid()}",
        )
        loop = asyncio.get_running_loop()
        metrics = WorkerMetrics(lambda: self._stats(loop))
        self._servicer = WorkerServicer(self.options, self._engine, metrics, self._tracing)
        self._health = health.aio.HealthServicer()
        security = self.options.security
        guard = Guard(security.open_tokens())
        self._server = grpc.aio.server(
            options=SERVER_OPTIONS,
            interceptors=(guard, Messages(), CallContext(self._tracing)),
        )
        self._server.add_generic_rpc_handlers((worker_handlers(self._servicer),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = join_port(self.host, self.options.port)
        try:
            self.port = security.bind(self._server, self.host, self.options.port)
            await self._server.start()
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error}; "
                "choose a free port and an address of this machine"
            ) from error
        try:
            if self.options.metrics_port is not None:
                self._metrics_port = MetricsPort(
                    metrics.registry,
                    self.host,
                    self.options.metrics_port,
                    security=self.options.metrics_security or security,
                )
        except BaseException:
            await self.stop(0)
            raise

    async def load(self) -> None:
        """Load the model, and take work from then on. It may be tried again after a failure.

        Raises
        ------
        ConfigError
            When the worker's share of the memory is too small for the model.
        ModelError, BiasError
            When the model cannot be loaded; calls are answered with the reason from then on.
        """
        assert self._servicer is not None
        load = LoadedModel.load if self.options.engine == "torch" else load_on_all_ranks
        try:
            model = await self._engine.step(load, self.options)
        except HomerError as error:
            self._servicer.problem = str(error)
            raise
        self._servicer.ready(model, metrics_port=self.metrics_port or 0)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving %s on %s", self.options.model, join_port(self.host, self.port))

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Take no new work, let running calls end within `grace_seconds`, then close everything.

        By default the grace of the options. States can still be fetched until then.
        """
        if self._server is None or self._servicer is None:
            return
        grace = self.options.grace_seconds if grace_seconds is None else grace_seconds
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if not await self._servicer.drain(grace):
            _log.warning("calls are still running after %.0f s; stopping them", grace)
        server, self._server = self._server, None
        await server.stop(None)
        await self._servicer.close()
        self._engine.close()
        if self._metrics_port is not None:
            await asyncio.to_thread(self._metrics_port.close)
        await asyncio.to_thread(self._tracing.close)

    @property
    def problem(self) -> str:
        """Why the model is not loaded, where that failed."""
        return "" if self._servicer is None else self._servicer.problem

    @property
    def metrics_port(self) -> int | None:
        """Where its metrics are; None where they are not served."""
        return None if self._metrics_port is None else self._metrics_port.port

    def _stats(self, loop: asyncio.AbstractEventLoop) -> worker_pb2.GetWorkerStatsResponse:
        """The worker's statistics, for another thread: only the loop's own may look at them."""
        servicer = self._servicer
        if servicer is None:
            return worker_pb2.GetWorkerStatsResponse()

        async def stats() -> worker_pb2.GetWorkerStatsResponse:
            return servicer.stats()

        return asyncio.run_coroutine_threadsafe(stats(), loop).result(STATS_TIMEOUT_SECONDS)

    async def _set_health(self, status: int) -> None:
        if self._health is not None:
            for service in HEALTH_SERVICES:
                await self._health.set(service, status)
