"""`WorkerClient` over gRPC: one channel to one worker, and the translation to and from `homer.v1`.

Knows nothing about scheduling.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import grpc

from cluster.errors import PeerCallError, WorkerCallError, WorkerLostError
from cluster.job import (
    CacheReady,
    GenerateDone,
    GenerateEvent,
    Job,
    Logprob,
    MergeDone,
    NodeDone,
    Sampling,
    TokenOut,
    TransferStats,
    WorkerInfo,
    WorkerStats,
)
from homer.errors import PromptError
from homer.plan import NodeId
from homer.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from workers.channels import NO_CREDENTIALS, Credentials
from workers.errors import ERROR_KEY, PEER_KEY
from workers.kept_runs import write_runs
from workers.plan_wire import write_node, write_plan
from workers.transport import CHANNEL_OPTIONS

INFO_TIMEOUT_SECONDS = 10.0

_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class GrpcWorkerClient:
    """Calls the worker at `address` ("host:port"). Make it inside the event loop that uses it."""

    def __init__(self, name: str, address: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        self.name = name
        self.address = address
        self._channel = credentials.aio_channel(address, CHANNEL_OPTIONS)
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)

    async def info(self) -> WorkerInfo:
        with self._errors():
            info = await self._stub.GetWorkerInfo(
                worker_pb2.GetWorkerInfoRequest(), timeout=INFO_TIMEOUT_SECONDS
            )
        return WorkerInfo(
            model=info.model,
            model_type=info.model_type,
            num_layers=info.num_layers,
            vocab_size=info.vocab_size,
            max_position_embeddings=info.max_position_embeddings,
            device=info.device,
            dtype=info.dtype,
            calibrated=info.calibrated,
            max_distance=info.max_distance,
            kv_bytes_per_token=info.kv_bytes_per_token,
            memory_budget_bytes=info.memory_budget_bytes,
            metrics_port=info.metrics_port,
            loaded_layers=info.loaded_layers,
        )

    async def stats(self) -> WorkerStats:
        with self._errors():
            stats = await self._stub.GetWorkerStats(
                worker_pb2.GetWorkerStatsRequest(), timeout=INFO_TIMEOUT_SECONDS
            )
        return WorkerStats(
            requests=stats.requests,
            node_states=stats.node_states,
            kv_shards=stats.kv_shards,
            state_bytes=stats.state_bytes,
            kv_shard_bytes=stats.kv_shard_bytes,
            running_calls=stats.running_calls,
            sent_bytes=stats.sent_bytes,
            received_bytes=stats.received_bytes,
            leaves_done=stats.leaves_done,
            merges_done=stats.merges_done,
            generated_tokens=stats.generated_tokens,
            resident_bytes=stats.resident_bytes,
            accelerator_bytes=stats.accelerator_bytes,
            unix_seconds=stats.unix_seconds,
            memory_budget_bytes=stats.memory_budget_bytes,
            reserved_bytes=stats.reserved_bytes,
            transfers=[
                TransferStats(one.peer, one.transport, one.received_bytes, one.seconds)
                for one in stats.transfers
            ],
        )

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        top = job.plan.by_id[node]
        request = worker_pb2.RunSubtreeRequest(
            request=request_spec(job),
            node=write_node(node),
            attempt=attempt,
            context_ids=job.context_ids[top.context_start : top.context_end],
            report_seconds=job.report_seconds,
            report_kept=job.with_evidence,
        )
        with self._errors():
            async for message in self._stub.RunSubtree(
                request, metadata=job.spans.above(node) if job.spans else None
            ):
                for done in (*message.before, message):
                    yield NodeDone(
                        node=NodeId(done.node.height, done.node.index),
                        context_in=done.context_tokens_in,
                        context_out=done.context_tokens_out,
                        seconds=done.compute_seconds,
                        started_unix_seconds=done.started_unix_seconds,
                        kept_runs=done.kept_runs,
                    )

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        request = worker_pb2.MergeRequest(
            request=request_spec(job),
            node=write_node(node),
            attempt=attempt,
            children=[
                worker_pb2.NodeLocation(node=write_node(child), address=address)
                for child, address in children
            ],
        )
        with self._errors():
            done = await self._stub.Merge(
                request, metadata=job.spans.below(node) if job.spans else None
            )
        start = job.plan.by_id[node].context_start
        return MergeDone(
            node=node,
            context_in=done.context_tokens_in,
            context_out=done.context_tokens_out,
            seconds=done.compute_seconds,
            transfer_seconds=done.transfer_seconds,
            received_bytes=done.received_bytes,
            context_indices=done.context_indices,
            started_unix_seconds=done.started_unix_seconds,
            transfer_started_unix_seconds=done.transfer_started_unix_seconds,
            kept_runs=write_runs(done.context_indices, start) if job.with_evidence else (),
        )

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None:
        merged = job.plan.by_id[node]
        request = worker_pb2.PruneRequest(
            request_id=job.request_id,
            node=write_node(node),
            attempt=attempt,
            context_indices=context_indices,
            context_start=merged.context_start,
            context_end=merged.context_end,
        )
        with self._errors():
            await self._stub.Prune(request)

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        delivered: Sequence[Sequence[int] | None] = (),
    ) -> AsyncIterator[GenerateEvent]:
        request = worker_pb2.GenerateTokensRequest(
            request=request_spec(job),
            node=write_node(job.plan.root.id),
            attempt=attempt,
            shard_addresses=shard_addresses,
            delivered=[
                worker_pb2.DeliveredTokens(token_ids=ids, ended=ids is None) for ids in delivered
            ],
            sampling=wire_sampling(job.sampling, job.answers),
        )
        with self._errors():
            async for event in self._stub.GenerateTokens(
                request, metadata=job.spans.below(None) if job.spans else None
            ):
                match event.WhichOneof("event"):
                    case "cache_ready":
                        ready = event.cache_ready
                        yield CacheReady(
                            cache_tokens=ready.cache_tokens,
                            gather_seconds=ready.gather_seconds,
                            refresh_seconds=ready.refresh_seconds,
                            received_bytes=ready.received_bytes,
                            context_indices=ready.context_indices,
                            started_unix_seconds=ready.started_unix_seconds,
                        )
                    case "token":
                        yield _token(event.token)
                    case "summary":
                        stopped = event.summary.finish_reason == sampling_pb2.FINISH_REASON_STOP
                        yield GenerateDone(
                            generated_tokens=event.summary.generated_tokens,
                            finish_reason="stop" if stopped else "length",
                            decode_seconds=event.summary.decode_seconds,
                            started_unix_seconds=event.summary.started_unix_seconds,
                            answer=event.summary.answer,
                        )

    async def end_answer(self, request_id: str, answer: int) -> None:
        request = worker_pb2.EndAnswerRequest(request_id=request_id, answer=answer)
        with self._errors():
            await self._stub.EndAnswer(request)

    async def drop(self, request_id: str, node: NodeId, attempt: int) -> None:
        request = worker_pb2.DropRequest(
            request_id=request_id, node=write_node(node), attempt=attempt
        )
        with self._errors():
            await self._stub.Drop(request)

    async def reset(self, keep_request_ids: Sequence[str] = ()) -> None:
        with self._errors():
            await self._stub.Reset(
                worker_pb2.ResetRequest(keep_request_ids=keep_request_ids),
                timeout=INFO_TIMEOUT_SECONDS,
            )

    async def release(self, request_id: str) -> None:
        with self._errors():
            await self._stub.Release(worker_pb2.ReleaseRequest(request_id=request_id))

    async def close(self) -> None:
        await self._channel.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError as error:
            # gRPC cancels what is under way when a channel is closed; nobody cancelled this task.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise WorkerLostError(f"the client of worker {self.name} was closed") from error
        except grpc.aio.UsageError as error:
            raise WorkerLostError(f"the client of worker {self.name} was closed") from error
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            told = dict(error.trailing_metadata() or ())
            if PEER_KEY in told:
                raise PeerCallError(
                    f"worker {self.name}: {details}", code.name, str(told[PEER_KEY])
                ) from error
            if code in _LOST and ERROR_KEY not in told:
                raise WorkerLostError(
                    f"worker {self.name} at {self.address} does not answer: {details}"
                ) from error
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                raise PromptError(details) from error
            raise WorkerCallError(f"worker {self.name}: {details}", code.name) from error


def request_spec(job: Job) -> worker_pb2.RequestSpec:
    """What every call says about its request."""
    return worker_pb2.RequestSpec(
        request_id=job.request_id,
        plan=write_plan(job.plan),
        prefix_ids=job.prefix_ids,
        suffix_ids=job.suffix_ids,
    )


def _token(piece: worker_pb2.TokenPiece) -> TokenOut:
    if not piece.HasField("logprob"):
        return TokenOut(piece.token_id, piece.answer)
    chosen, *top = (
        Logprob(one.token_id, one.logprob) for one in (piece.logprob, *piece.top_logprobs)
    )
    return TokenOut(piece.token_id, piece.answer, chosen, top)


def wire_sampling(sampling: Sampling, answers: int = 1) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        n=answers,
    )
