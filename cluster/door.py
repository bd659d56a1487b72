"""The gRPC door: `homer.v1.LongContext` over `LongContextService`, with health and reflection.

Answers calls; messages and errors are translated elsewhere. Knows nothing about scheduling or Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.call_limit import CallLimit
from cluster.client_wire import KEEPALIVE_OPTIONS, KEEPALIVE_SECONDS
from cluster.door_errors import error_metadata, message, wire_code
from cluster.errors import NotServingError
from cluster.evidence import evidence_of
from cluster.info_wire import model_info, server_info, trace_to_wire
from cluster.request_wire import event_to_wire, request_from_wire
from cluster.service import (
    MAX_REQUEST_ID_LENGTH,
    Finished,
    Limits,
    LongContextService,
    Request,
    TextPrompt,
)
from cluster.timeline import KEPT_REQUESTS
from cluster.uploads import Uploads
from homer.errors import HomerError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from workers.guard import Guard, caller
from workers.logs import log_about
from workers.messages import Messages
from workers.security import Security

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LongContext"].full_name
STOP_GRACE_SECONDS = 5.0
# How often health looks whether there are workers.
LOOK_SECONDS = 1.0
OPEN = Security()

Context = grpc.aio.ServicerContext[Any, Any]


class LongContextDoor(long_context_pb2_grpc.LongContextServicer):
    """The servicer.

    It answers with UNAVAILABLE until there is a service, and new requests so after `drain`.

    Attributes
    ----------
    service : LongContextService or None
    """

    def __init__(self, limits: Limits) -> None:
        self.service: LongContextService | None = None
        self._uploads = Uploads(limits)
        self._draining = False
        self._running_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, grace_seconds: float) -> bool:
        """Take no new requests; waits for running ones. Returns whether all ended in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            return False
        return True

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        log_about(request_id=request.request_id)
        async with _errors(context), self._request() as service:
            with self._uploads.whole(request):
                asked = request_from_wire(request)
                await _answer(service, asked, context, pb.GenerateResponse)

    async def GenerateFromStream(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[pb.GenerateFromStreamRequest], context: Context
    ) -> None:
        async with (
            _errors(context),
            self._request() as service,
            self._uploads.receive(requests) as asked,
        ):
            log_about(request_id=asked.request_id)
            await _answer(service, asked, context, pb.GenerateFromStreamResponse)

    async def Abort(  # noqa: N802 - gRPC's name
        self, request: pb.AbortRequest, context: Context
    ) -> pb.AbortResponse:
        async with _errors(context):
            aborted = self._loaded.abort(request.request_id, caller.get())
            if not aborted:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    f"no request {_shown(request.request_id)} waits or runs; it may have ended",
                )
            return pb.AbortResponse(aborted_requests=aborted)
        raise AssertionError("unreachable: a call that fails is aborted")

    async def CountTokens(  # noqa: N802 - gRPC's name
        self, request: pb.CountTokensRequest, context: Context
    ) -> pb.CountTokensResponse:
        text = request.text
        prompt = TextPrompt(text.prefix, text.context, text.suffix)
        async with _errors(context):
            counts = map(len, await asyncio.to_thread(self._loaded.tokenize, prompt))
            names = ("prefix_tokens", "context_tokens", "suffix_tokens")
            return pb.CountTokensResponse(**dict(zip(names, counts, strict=True)))
        raise AssertionError("unreachable: a call that fails is aborted")

    async def GetModelInfo(  # noqa: N802 - gRPC's name
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        async with _errors(context):
            return model_info(self._loaded)
        raise AssertionError("unreachable: a call that fails is aborted")

    async def GetServerInfo(  # noqa: N802 - gRPC's name
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        async with _errors(context):
            service = self._loaded
            return server_info(service, await service.seeing.watch.look())
        raise AssertionError("unreachable: a call that fails is aborted")

    async def GetTrace(  # noqa: N802 - gRPC's name
        self, request: pb.GetTraceRequest, context: Context
    ) -> pb.GetTraceResponse:
        async with _errors(context):
            seeing = self._loaded.seeing
            timeline = seeing.timelines.find(request.request_id)
            if timeline is None:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    f"request {_shown(request.request_id)} is not known, or not any more: the "
                    f"last {KEPT_REQUESTS} that ended are kept",
                )
            return trace_to_wire(timeline, seeing.clocks)
        raise AssertionError("unreachable: a call that fails is aborted")

    @property
    def _loaded(self) -> LongContextService:
        if self.service is None:
            raise NotServingError("the service is still loading its model; try again in a moment")
        return self.service

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[LongContextService]:
        """Count a request while it runs."""
        if self._draining:
            raise NotServingError(
                "the service is ending and takes no new requests; ask another, or this one when it "
                "is back"
            )
        self._running_requests += 1
        self._idle.clear()
        try:
            yield self._loaded
        finally:
            self._running_requests -= 1
            if not self._running_requests:
                self._idle.set()


class GrpcDoor:
    """A gRPC server with the servicer, health and, where wanted, reflection on one port.

    It listens before there is a service, so that health can say so.
    """

    def __init__(
        self,
        host: str,
        port: int,
        limits: Limits,
        security: Security = OPEN,
        *,
        with_reflection: bool = True,
    ) -> None:
        self._host = host
        self._port = port
        self._limits = limits
        self._security = security
        self._with_reflection = with_reflection
        self._door: LongContextDoor | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._looking: asyncio.Task[None] | None = None

    async def listen(self) -> int:
        """Answer calls, if only to say that the model is being loaded; returns the bound port.

        Raises
        ------
        OSError
            When the port cannot be bound.
        ConfigError
            When others would reach it without a token, or TLS files are wrong.
        """
        limits = self._limits
        server = grpc.aio.server(
            interceptors=(
                Guard(self._security.open_tokens()),
                CallLimit(limits.calls_per_token),
                Messages(limits.read_seconds, limits.write_seconds),
            ),
            options=(
                ("grpc.max_receive_message_length", limits.message_bytes),
                ("grpc.max_metadata_size", limits.metadata_bytes),
                ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
                # A port that is taken must be an error, not a second listener.
                ("grpc.so_reuseport", 0),
                *KEEPALIVE_OPTIONS,
                # Clients may ping as often as ours do, and between calls.
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 250),
            ),
        )
        self._door = LongContextDoor(limits)
        long_context_pb2_grpc.add_LongContextServicer_to_server(self._door, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._with_reflection:
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._security.bind(server, self._host, self._port)
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {self._host}:{self._port}: {error}; choose another --port, "
                "or 0 for any free one"
            ) from error
        await server.start()
        self._server = server
        return port

    async def serve(self, service: LongContextService) -> None:
        """Take requests for `service` from now on."""
        assert self._door is not None
        self._door.service = service
        await self._tell_health(service)
        self._looking = asyncio.create_task(self._look_after(service))

    async def _look_after(self, service: LongContextService) -> None:
        """Health says whether there is anybody who could answer, for as long as this runs."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._tell_health(service)

    async def _tell_health(self, service: LongContextService) -> None:
        status, deserted = health_pb2.HealthCheckResponse, service.scheduler.deserted
        await self._set_health(status.NOT_SERVING if deserted else status.SERVING)

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, and give running ones `grace_seconds`; health says NOT_SERVING."""
        if self._looking is not None:
            self._looking.cancel()
        if self._door is not None:
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            if not await self._door.drain(grace_seconds):
                _log.warning("requests are still running after %.0f s", grace_seconds)

    async def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Drain, then cancel what is left and close the port."""
        if self._server is not None:
            await self.drain(grace_seconds)
            await self._server.stop(None)

    async def _set_health(self, status: int) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)


def _shown(request_id: str) -> str:
    """An id that there is not, for a message that has to fit into metadata."""
    return repr(request_id[:MAX_REQUEST_ID_LENGTH])


async def _answer(
    service: LongContextService, request: Request, context: Context, response: Callable[..., Any]
) -> None:
    """Answer with messages that `response` makes of events."""
    request = replace(request, caller=caller.get())
    service.seeing.tracing.follow(context.invocation_metadata())
    # Writes instead of yielding: so a cancel always arrives in here, and is passed on at once.
    async with aclosing(cast(Any, service.generate(request))) as events:
        async for event in events:
            fields = event_to_wire(event, request.return_kept_indices)
            if isinstance(event, Finished) and request.return_evidence:
                evidence = await asyncio.to_thread(
                    evidence_of, event.job, event.summary, event.document
                )
                fields["summary"].MergeFrom(pb.Summary(evidence=evidence))
            await context.write(response(**fields))


@asynccontextmanager
async def _errors(context: Context) -> AsyncIterator[None]:
    """End a call with the status that an error means."""
    try:
        yield
    except grpc.aio.AbortError:
        # It has its status.
        raise
    except HomerError as error:
        code, told = wire_code(error), message(error)
        _log.warning("answered with %s: %s", code.name, told)
        await context.abort(code, told, error_metadata(error))
    except Exception:
        _log.exception("the request failed")
        await context.abort(grpc.StatusCode.INTERNAL, "the service failed; its log has the cause")
