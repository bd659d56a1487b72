"""The gRPC door: `homer.v1.LongContext` over `LongContextService`, with health and reflection.

Translates messages and errors. Knows nothing about scheduling or Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.call_limit import CallLimit
from cluster.errors import (
    CapacityError,
    NoWorkersError,
    OverloadedError,
    WorkerCallError,
    WorkerLostError,
)
from cluster.evidence import evidence_of
from cluster.info_wire import server_info, trace_to_wire
from cluster.job import CacheReady, JobProgress, Sampling
from cluster.retry import retry_entries
from cluster.service import (
    Accepted,
    Finished,
    LongContextService,
    Request,
    ServiceEvent,
    TextPrompt,
    TokenText,
)
from cluster.text import PromptIds
from cluster.timeline import KEPT_REQUESTS
from homer.errors import HomerError, PromptError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc, sampling_pb2
from workers.errors import status_code
from workers.guard import Guard
from workers.logs import log_about
from workers.messages import Messages
from workers.plan_wire import read_plan_kind
from workers.security import Security

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LongContext"].full_name
STOP_GRACE_SECONDS = 5.0
# A worker takes about so long to come back.
LOST_RETRY_SECONDS = 5.0
OPEN = Security()


class LongContextDoor(long_context_pb2_grpc.LongContextServicer):
    """The servicer."""

    def __init__(self, service: LongContextService) -> None:
        self._service = service

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        log_about(request_id=request.request_id)
        self._service.seeing.tracing.follow(context.invocation_metadata())
        # Writes instead of yielding: so a cancel always arrives in here, and is passed on at once.
        try:
            with_indices = request.return_kept_indices
            async with aclosing(
                cast(Any, self._service.generate(request_from_wire(request)))
            ) as events:
                async for event in events:
                    message = event_to_wire(event, with_indices)
                    if isinstance(event, Finished) and request.return_evidence:
                        evidence = await asyncio.to_thread(
                            evidence_of, event.job, event.summary, event.document
                        )
                        message.summary.evidence.CopyFrom(evidence)
                    await context.write(message)
        except HomerError as error:
            code = wire_code(error)
            _log.warning("answered with %s: %s", code.name, error)
            await context.abort(code, str(error), retry_metadata(error))
        except Exception:
            _log.exception("the request failed")
            await context.abort(
                grpc.StatusCode.INTERNAL, "the service failed; its log has the cause"
            )

    async def GetServerInfo(  # noqa: N802 - gRPC's name
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetServerInfoResponse:
        return server_info(self._service, await self._service.seeing.watch.look())

    async def GetTrace(  # noqa: N802 - gRPC's name
        self, request: pb.GetTraceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetTraceResponse:
        seeing = self._service.seeing
        timeline = seeing.timelines.find(request.request_id)
        if timeline is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"request {request.request_id!r} is not known, or not any more: the last "
                f"{KEPT_REQUESTS} that ended are kept",
            )
        return trace_to_wire(timeline, seeing.clocks)


class GrpcDoor:
    """A gRPC server with the servicer, health and reflection on one port."""

    def __init__(
        self, service: LongContextService, host: str, port: int, security: Security = OPEN
    ) -> None:
        self._service = service
        self._security = security
        self._host = host
        self._port = port
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> int:
        """Serve; returns the bound port.

        Raises
        ------
        OSError
            When the port cannot be bound.
        ConfigError
            When others would reach it without a token, or TLS files are wrong.
        """
        limits = self._service.limits
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
            ),
        )
        long_context_pb2_grpc.add_LongContextServicer_to_server(
            LongContextDoor(self._service), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        try:
            port = self._security.bind(server, self._host, self._port)
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {self._host}:{self._port}: {error}; choose another --port, "
                "or 0 for any free one"
            ) from error
        await server.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        return port

    async def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Refuse new requests, give running ones `grace_seconds`, then cancel them."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_seconds)


def wire_code(error: HomerError) -> grpc.StatusCode:
    """The status that an error means to a user."""
    if isinstance(error, WorkerLostError | NoWorkersError):
        return grpc.StatusCode.UNAVAILABLE
    if isinstance(error, OverloadedError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, CapacityError):
        # Not RESOURCE_EXHAUSTED, after which clients try again.
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, WorkerCallError):
        return grpc.StatusCode[error.code]
    return status_code(error)


def retry_metadata(error: HomerError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that says when to ask again: in seconds, and as gRPC's own retries read it.

    Nothing where trying again does not help.
    """
    if isinstance(error, OverloadedError | NoWorkersError):
        seconds = error.retry_after_seconds
    elif isinstance(error, WorkerLostError):
        seconds = LOST_RETRY_SECONDS
    else:
        return ()
    return retry_entries(seconds)


def request_from_wire(request: pb.GenerateRequest) -> Request:
    """A request as the service knows it.

    Raises
    ------
    PromptError
        When it has no prompt.
    """
    prompt: TextPrompt | PromptIds
    match request.WhichOneof("prompt"):
        case "text":
            prompt = TextPrompt(request.text.prefix, request.text.context, request.text.suffix)
        case "tokens":
            prompt = PromptIds(
                list(request.tokens.prefix_ids),
                list(request.tokens.context_ids),
                list(request.tokens.suffix_ids),
            )
        case _:
            raise PromptError("the request has no prompt; set text or tokens")
    return Request(
        prompt=prompt,
        request_id=request.request_id,
        sampling=sampling_from_wire(request.sampling),
        stop=list(request.sampling.stop),
        compression=compression_from_wire(request.compression),
        priority=request.priority,
        return_evidence=request.return_evidence,
    )


def compression_from_wire(wire: pb.CompressionOptions) -> dict[str, Any]:
    """The settings that a message sets, to 0 too: `HomerConfig` refuses what is wrong."""
    settings = {field.name: value for field, value in wire.ListFields()}
    if "plan" in settings:
        settings["plan"] = read_plan_kind(settings["plan"])
    return settings


def sampling_from_wire(wire: sampling_pb2.SamplingParams) -> Sampling:
    """Sampling settings, where 0 means off or the default; refused when out of range.

    Raises
    ------
    PromptError
        When a setting is out of its range.
    """
    problems = {
        "temperature must be 0 (greedy) or more": wire.temperature >= 0,
        "top_p must be from 0 (off) to 1": 0 <= wire.top_p <= 1,
        "min_p must be from 0 (off) to 1": 0 <= wire.min_p <= 1,
        "repetition_penalty must be 0 (off) or more": wire.repetition_penalty >= 0,
    }
    for message, holds in problems.items():
        if not holds:
            raise PromptError(f"{message}; got {getattr(wire, message.split()[0])}")
    default = Sampling()
    return Sampling(
        max_new_tokens=wire.max_tokens or default.max_new_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p or default.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty or default.repetition_penalty,
        seed=wire.seed if wire.HasField("seed") else None,
        ignore_eos=wire.ignore_eos,
    )


def event_to_wire(event: ServiceEvent, with_indices: bool) -> pb.GenerateResponse:
    """An event of the service as it travels."""
    match event:
        case Accepted(request_id, job, subtrees, uncalibrated):
            plan = job.plan
            return pb.GenerateResponse(
                accepted=pb.Accepted(
                    request_id=request_id,
                    prompt_tokens=plan.prompt_len,
                    leaves=len(plan.leaves),
                    levels=plan.height + 1,
                    merges=len(plan.merges),
                    subtrees=subtrees,
                    uncalibrated=uncalibrated,
                    level_nodes=plan.level_nodes,
                )
            )
        case JobProgress(done):
            return pb.GenerateResponse(
                progress=pb.Progress(
                    kind=pb.Progress.KIND_MERGE if done.node.height else pb.Progress.KIND_LEAF,
                    height=done.node.height,
                    index=done.node.index,
                    worker=event.worker,
                    leaves_done=event.leaves_done,
                    leaves_total=event.leaves_total,
                    merges_done=event.merges_done,
                    merges_total=event.merges_total,
                    context_tokens_in=done.context_in,
                    context_tokens_out=done.context_out,
                    seconds=done.seconds,
                    context_start=event.context_start,
                    context_end=event.context_end,
                )
            )
        case CacheReady():
            return pb.GenerateResponse(
                progress=pb.Progress(
                    kind=pb.Progress.KIND_GATHER,
                    context_tokens_out=len(event.context_indices),
                    seconds=event.gather_seconds + event.refresh_seconds,
                )
            )
        case TokenText(token_id, text):
            return pb.GenerateResponse(token=pb.Token(token_id=token_id, text=text))
        case Finished():
            indices = event.summary.context_indices if with_indices else ()
            return pb.GenerateResponse(summary=_summary(event, indices))


def _summary(event: Finished, indices: Sequence[int]) -> pb.Summary:
    summary, plan = event.summary, event.job.plan
    stopped = summary.finish_reason == "stop"
    return pb.Summary(
        request_id=event.request_id,
        prompt_tokens=plan.prompt_len,
        leaves=len(plan.leaves),
        kept_tokens=summary.kept_tokens,
        generated_tokens=summary.generated_tokens,
        finish_reason=(
            sampling_pb2.FINISH_REASON_STOP if stopped else sampling_pb2.FINISH_REASON_LENGTH
        ),
        seconds=pb.StageSeconds(
            queue=summary.seconds.queue,
            leaves=summary.seconds.leaves,
            merges=summary.seconds.merges,
            gather=summary.seconds.gather,
            time_to_first_token=summary.seconds.time_to_first_token,
            decode=summary.seconds.decode,
            total=summary.seconds.total,
        ),
        moved_bytes=summary.moved_bytes,
        kept_context_indices=indices,
        token_ids=event.token_ids,
        text=event.text,
        nodes_by_worker=summary.nodes_by_worker,
    )
