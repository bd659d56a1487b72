"""What a service tells of itself, as `homer.v1` messages: its workers, its requests, one timeline.

Knows nothing about gRPC servers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from cluster.client_request import compression_to_wire
from cluster.clocks import Clocks
from cluster.service import LongContextService
from cluster.timeline import Slice, Timeline
from cluster.watch import WorkerState, WorkerView
from homer import __version__
from homer.plan import NodeId
from homer.v1 import long_context_pb2 as pb

_STATES = {
    WorkerState.IDLE: pb.WORKER_STATE_IDLE,
    WorkerState.BUSY: pb.WORKER_STATE_BUSY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.SILENT: pb.WORKER_STATE_SILENT,
}
_STAGES = {
    "queued": pb.REQUEST_STAGE_QUEUED,
    "tree": pb.REQUEST_STAGE_TREE,
    "gather": pb.REQUEST_STAGE_GATHER,
    "decode": pb.REQUEST_STAGE_DECODE,
}
_KINDS = {
    "leaf": pb.TraceSlice.KIND_LEAF,
    "merge": pb.TraceSlice.KIND_MERGE,
    "transfer": pb.TraceSlice.KIND_TRANSFER,
    "gather": pb.TraceSlice.KIND_GATHER,
    "refresh": pb.TraceSlice.KIND_REFRESH,
    "decode": pb.TraceSlice.KIND_DECODE,
}


def model_info(service: LongContextService) -> pb.GetModelInfoResponse:
    """What is the same for every request."""
    info, limits = service.info, service.limits
    return pb.GetModelInfoResponse(
        model=info.model,
        model_type=info.model_type,
        dtype=info.dtype,
        num_layers=info.num_layers,
        vocab_size=info.vocab_size,
        model_window=info.max_position_embeddings,
        kv_bytes_per_token=info.kv_bytes_per_token,
        has_tokenizer=service.has_tokenizer,
        calibrated=info.calibrated,
        max_context_tokens=limits.context_tokens,
        max_document_bytes=limits.document_bytes,
        max_message_bytes=limits.message_bytes,
        max_new_tokens=limits.new_tokens,
        max_answers=limits.answers,
        compression=compression_to_wire(dataclasses.asdict(service.config)),
    )


def server_info(
    service: LongContextService, views: Iterable[WorkerView]
) -> pb.GetServerInfoResponse:
    """The model, the settings, the workers as they were just seen, and the requests."""
    info, config, seeing = service.info, service.config, service.seeing
    load = service.scheduler.load
    return pb.GetServerInfoResponse(
        model=info.model,
        homer_version=__version__,
        num_layers=info.num_layers,
        model_window=info.max_position_embeddings,
        max_context_tokens=service.limits.context_tokens,
        max_chunk_len=config.max_chunk_len,
        target_len=config.target_len,
        warmup_layers=config.warmup_layers,
        calibrated=info.calibrated,
        workers=[
            *(_worker(view, seeing.clocks) for view in views),
            *(
                pb.ServerWorker(name=name, state=pb.WORKER_STATE_ABSENT, problem=reason)
                for name, reason in service.absent_workers().items()
            ),
        ],
        running_requests=load.running_jobs,
        queued_requests=load.queued_jobs,
        queued_tokens=load.queued_tokens,
        metrics_address=seeing.metrics_address,
        requests=[_status(one, seeing.clocks.now()) for one in seeing.timelines.running],
    )


def trace_to_wire(timeline: Timeline, clocks: Clocks) -> pb.GetTraceResponse:
    """One request's timeline, on the coordinator's clock."""
    plan = timeline.job.plan
    return pb.GetTraceResponse(
        request_id=timeline.job.request_id,
        outcome=timeline.outcome or "",
        prompt_tokens=plan.prompt_len,
        leaves=len(plan.leaves),
        merges=len(plan.merges),
        generated_tokens=timeline.generated_tokens,
        queued_unix_seconds=timeline.queued,
        started_unix_seconds=timeline.started,
        first_token_unix_seconds=timeline.first_token,
        ended_unix_seconds=timeline.ended,
        now_unix_seconds=clocks.now(),
        slices=[_slice(one) for one in timeline.slices(clocks)],
    )


def _worker(view: WorkerView, clocks: Clocks) -> pb.ServerWorker:
    worker = pb.ServerWorker(
        name=view.name,
        address=view.address,
        device=view.device,
        ready=view.stats is not None,
        state=_STATES[view.state],
        metrics_address=view.metrics_address,
        loaded_layers=view.loaded_layers,
    )
    if (stats := view.stats) is not None:
        worker.requests = stats.requests
        worker.state_bytes = stats.state_bytes
        worker.kv_shard_bytes = stats.kv_shard_bytes
        worker.resident_bytes = stats.resident_bytes
        worker.accelerator_bytes = stats.accelerator_bytes
        worker.memory_budget_bytes = stats.memory_budget_bytes
        worker.reserved_bytes = stats.reserved_bytes
        worker.leaves_done = stats.leaves_done
        worker.merges_done = stats.merges_done
        worker.generated_tokens = stats.generated_tokens
        worker.clock_ahead_seconds = clocks.bounds(view.name).ahead
    return worker


def _status(timeline: Timeline, now: float) -> pb.RequestStatus:
    plan = timeline.job.plan
    leaves = timeline.leaves_done
    return pb.RequestStatus(
        request_id=timeline.job.request_id,
        stage=_STAGES[timeline.stage],
        prompt_tokens=plan.prompt_len,
        leaves_done=leaves,
        leaves_total=len(plan.leaves),
        merges_done=len(timeline.done) - leaves,
        merges_total=len(plan.merges),
        generated_tokens=timeline.generated_tokens,
        seconds=now - timeline.queued,
    )


def _slice(one: Slice) -> pb.TraceSlice:
    return pb.TraceSlice(
        kind=_KINDS[one.kind],
        worker=one.worker,
        node=_node(one.node),
        children=[_node(child) for child in one.children],
        started_unix_seconds=one.started,
        seconds=one.seconds,
        tokens_in=one.tokens_in,
        tokens_out=one.tokens_out,
        received_bytes=one.received_bytes,
        lost=one.lost,
    )


def _node(node: NodeId) -> pb.TraceNode:
    return pb.TraceNode(height=node.height, index=node.index)
