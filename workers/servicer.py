"""`homer.v1.Worker`: checks calls, and answers with what their jobs say.

Knows nothing about how jobs are found, nodes are run or tensors are moved.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import torch

from homer.errors import HomerError, ModelError, PromptError
from homer.memory import least_memory
from homer.plan import PlanNode
from homer.v1 import tensor_pb2, worker_pb2
from workers.answers import Answering
from workers.batcher import Batcher
from workers.budget import Budget, automatic_bytes, parse_bytes
from workers.bundle import bundled
from workers.channels import Credentials
from workers.engine import Engine, LoadedModel
from workers.errors import NotReadyError, UnknownStateError, error_metadata, status_code
from workers.intake import find_node, follow_job, open_node, read_delivered
from workers.metrics import WorkerMetrics
from workers.options import WorkerOptions
from workers.peer import PeerPool, choose_outlet, send_tensors
from workers.plan_wire import read_node
from workers.runs import Counters, Runner, check_children
from workers.staging import Places, Staging
from workers.store import HeldRequest, Store
from workers.telling import worker_info, worker_stats
from workers.tensor_stream import Spec
from workers.tracing import Tracing
from workers.wire import read_sampling, state_tensors
from workers.wire_format import WireFormat

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext


class WorkerServicer:
    """Answers the calls of one worker.

    Parameters
    ----------
    options : WorkerOptions
    engine : Engine
    metrics : WorkerMetrics
    tracing : Tracing

    It answers work with UNAVAILABLE until `ready` is called, and again after `drain`.

    Attributes
    ----------
    problem : str
        Why the model is not loaded, where that failed: work is answered with it.
    """

    def __init__(
        self, options: WorkerOptions, engine: Engine, metrics: WorkerMetrics, tracing: Tracing
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._tracing = tracing
        self._metrics_port = 0
        self._options = options
        self._store = Store()
        self._budget = Budget(lambda: sum(held.nbytes for held in self._store.requests))
        self._counters = Counters()
        self._peers = PeerPool(
            self._received,
            self._counters.add_transfer,
            stall_seconds=options.peer_stall_seconds,
            share_memory=options.transport == "auto",
            wire=WireFormat.named(options.wire_dtype),
            credentials=Credentials.of(options.security),
        )
        self.problem = ""
        self._runner: Runner | None = None
        self._staging = Staging(Places())
        self._answers: Answering | None = None
        self._dropping: asyncio.Task[None] | None = None
        self._draining = False
        self._running_calls = 0
        self._worker_id = uuid.uuid4().hex
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, model: LoadedModel, metrics_port: int = 0) -> None:
        """Take work for `model` from now on.

        Raises
        ------
        ConfigError
            When the worker's share of the memory has no room beside the model.
        """
        options, device = self._options, model.stack.device
        self.problem = ""
        # On the CPU its ranks take from the same memory.
        sharing = options.ranks if device.type == "cpu" else 1
        self._budget.total_bytes = (
            automatic_bytes(least_memory(model.stack.devices), options.memory_share / sharing)
            if options.memory_budget == "auto"
            else parse_bytes(options.memory_budget)
        )
        self._metrics_port = metrics_port
        self._metrics.model_loaded(model.stack.loaded_layers, model.report.seconds)
        self._staging = Staging(Places.of(model.stack))
        self._dropping = asyncio.create_task(self._drop_idle())
        self._runner = Runner(
            model,
            self._engine,
            self._budget,
            self._peers,
            self._counters,
            self._metrics,
            self._tracing,
        )
        batcher = Batcher(model.decode, self._engine, self._metrics.decode_step)
        self._answers = Answering(
            model,
            self._engine,
            batcher,
            self._budget,
            self._peers,
            self._counters,
            self._tracing,
        )

    async def _drop_idle(self) -> None:
        """Drop requests that nobody asks about any more, for as long as the worker runs."""
        seconds = self._options.idle_seconds
        while True:
            await asyncio.sleep(min(60.0, seconds / 4))
            for held in self._store.idle(seconds):
                _log.warning(
                    "request %r: nothing was heard of it for %.0f s; it is dropped",
                    held.spec.request_id,
                    seconds,
                )
                self._store.take(held.spec.request_id)
                held.clear()

    async def drain(self, grace_seconds: float) -> bool:
        """Take no new work; waits for running calls. Returns whether all of them ended in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop all jobs, drop everything that is held, and close the channels to peers."""
        if self._dropping is not None:
            self._dropping.cancel()
        for held in self._store.requests:
            self._store.take(held.spec.request_id)
            held.clear()
        await self._peers.close()
        if self._runner is not None:
            await asyncio.to_thread(self._runner.model.close)

    async def RunSubtree(  # noqa: N802
        self, request: worker_pb2.RunSubtreeRequest, context: Context
    ) -> AsyncIterator[worker_pb2.RunSubtreeResponse]:
        async with self._call(context, is_work=True):
            held, node = self._open(request.request, request.node)
            span = node.context_end - node.context_start
            if len(request.context_ids) != span:
                raise PromptError(
                    f"node {tuple(node.id)} spans {span} context tokens, "
                    f"but {len(request.context_ids)} ids were given"
                )
            given = torch.tensor(request.context_ids, dtype=torch.int64)
            ids = self._stack.check_ids("context_ids", given)
            report_kept = request.report_kept
            work = partial(self._worker.run_subtree, held, node.id, ids, report_kept=report_kept)
            following = follow_job(
                self._store, held, "node", node.id, request.attempt, work, report_kept
            )
            async with aclosing(following) as job:
                async for event in bundled(job, request.node, request.report_seconds):
                    yield event

    async def Merge(  # noqa: N802
        self, request: worker_pb2.MergeRequest, context: Context
    ) -> worker_pb2.MergeResponse:
        async with self._call(context, is_work=True):
            held, node = self._open(request.request, request.node)
            check_children(node, [read_node(child.node) for child in request.children])
            addresses = [child.address for child in request.children]
            work = partial(self._worker.merge, held, node.id, addresses)
            following = follow_job(self._store, held, "node", node.id, request.attempt, work)
            async with aclosing(following) as job:
                events = [event async for event in job]
        return events[-1]

    async def GenerateTokens(  # noqa: N802
        self, request: worker_pb2.GenerateTokensRequest, context: Context
    ) -> AsyncIterator[worker_pb2.GenerateTokensResponse]:
        async with self._call(context, is_work=True):
            held, node = self._open(request.request, request.node)
            if node.id != held.plan.root.id:
                raise PromptError(
                    f"node {tuple(node.id)} is not the root; the answer comes from "
                    f"{tuple(held.plan.root.id)}"
                )
            params = read_sampling(request.sampling)
            addresses = list(request.shard_addresses)
            count = max(1, request.sampling.n)
            delivered = read_delivered(request, count, params.max_new_tokens, self._stack)
            work = partial(self._answering.generate, held, addresses, params, delivered)
            following = follow_job(
                self._store, held, "answer", node.id, request.attempt, work, delivered
            )
            async with aclosing(following) as job:
                async for event in job:
                    yield event

    async def EndAnswer(  # noqa: N802
        self, request: worker_pb2.EndAnswerRequest, context: Context
    ) -> worker_pb2.EndAnswerResponse:
        async with self._call(context):
            self._store.get(request.request_id).end_answer(request.answer)
        return worker_pb2.EndAnswerResponse()

    async def FetchState(  # noqa: N802
        self, request: worker_pb2.FetchStateRequest, context: Context
    ) -> AsyncIterator[bytes]:
        async with self._call(context):
            held = self._store.get(request.request_id)
            state = held.state(read_node(request.node))
            tensors = state_tensors(await self._worker.model.whole_state(self._engine, state))
            specs = [Spec.of(named) for named in tensors]
            sending = self._send(specs, [named.tensor for named in tensors], request.transfer)
            async with aclosing(sending) as messages:
                async for message in messages:
                    yield message

    async def GatherKv(  # noqa: N802
        self, request: worker_pb2.GatherKvRequest, context: Context
    ) -> AsyncIterator[bytes]:
        async with self._call(context):
            held = self._store.get(request.request_id)
            kept = self._indices(request.context_indices)
            shards = held.snapshot()
            specs, tensors = await self._worker.model.rows(self._engine, shards, kept)
            sending = self._send(specs, tensors, request.transfer)
            async with aclosing(sending) as messages:
                async for message in messages:
                    yield message

    async def Prune(  # noqa: N802
        self, request: worker_pb2.PruneRequest, context: Context
    ) -> worker_pb2.PruneResponse:
        async with self._call(context):
            held = self._store.get(request.request_id)
            node = find_node(held, request.node)
            span = (node.context_start, node.context_end)
            if (request.context_start, request.context_end) != span:
                raise PromptError(
                    f"node {tuple(node.id)} spans the context from {node.context_start} to "
                    f"{node.context_end}, not {request.context_start} to {request.context_end}"
                )
            kept = self._indices(request.context_indices)
            freed = await self._worker.prune(held, node.id, kept)
        return worker_pb2.PruneResponse(freed_bytes=freed)

    async def Drop(  # noqa: N802
        self, request: worker_pb2.DropRequest, context: Context
    ) -> worker_pb2.DropResponse:
        async with self._call(context):
            try:
                held = self._store.get(request.request_id)
            except UnknownStateError:
                return worker_pb2.DropResponse()
            node = find_node(held, request.node).id
            job = held.jobs.get(("node", node))
            if job is not None and job.attempt > request.attempt:
                return worker_pb2.DropResponse()
            held.dropped[node] = max(request.attempt, held.dropped.get(node, 0))
            if job is not None:
                job.stop(f"node {tuple(node)} is not wanted here any more")
            return worker_pb2.DropResponse(freed_bytes=held.forget(node))
        raise AssertionError("unreachable: a call that fails is aborted")

    async def Release(  # noqa: N802
        self, request: worker_pb2.ReleaseRequest, context: Context
    ) -> worker_pb2.ReleaseResponse:
        held = self._store.release(request.request_id)
        return worker_pb2.ReleaseResponse(freed_bytes=held.clear() if held else 0)

    async def Reset(  # noqa: N802
        self, request: worker_pb2.ResetRequest, context: Context
    ) -> worker_pb2.ResetResponse:
        # Those that go on elsewhere may come back to this worker: their ids are not refused.
        known = [held.spec.request_id for held in self._store.requests]
        taken = [self._store.take(one) for one in known if one not in request.keep_request_ids]
        freed = sum(held.clear() for held in taken if held)
        return worker_pb2.ResetResponse(released_requests=len(taken), freed_bytes=freed)

    async def GetWorkerInfo(  # noqa: N802
        self, request: worker_pb2.GetWorkerInfoRequest, context: Context
    ) -> worker_pb2.GetWorkerInfoResponse:
        async with self._call(context):
            return worker_info(
                self._worker.model, self._worker_id, self._budget, self._metrics_port
            )
        raise AssertionError("unreachable: a call that fails is aborted")

    async def GetWorkerStats(  # noqa: N802
        self, request: worker_pb2.GetWorkerStatsRequest, context: Context
    ) -> worker_pb2.GetWorkerStatsResponse:
        return self.stats()

    def stats(self) -> worker_pb2.GetWorkerStatsResponse:
        """What this worker holds and has counted."""
        return worker_stats(self._store.requests, self._budget, self._counters, self._running_calls)

    def _not_ready(self) -> HomerError:
        if self.problem:
            return ModelError(f"this worker cannot load its model: {self.problem}")
        return NotReadyError("this worker is still loading its model; try again in a moment")

    @property
    def _worker(self) -> Runner:
        if self._runner is None:
            raise self._not_ready()
        return self._runner

    @property
    def _answering(self) -> Answering:
        if self._answers is None:
            raise self._not_ready()
        return self._answers

    @property
    def _stack(self) -> Any:
        return self._worker.model.stack

    def _open(
        self, spec: worker_pb2.RequestSpec, node: worker_pb2.NodeId
    ) -> tuple[HeldRequest, PlanNode]:
        return open_node(self._store, self._worker.model, spec, node)

    @asynccontextmanager
    async def _call(self, context: Context, is_work: bool = False) -> AsyncIterator[None]:
        """Count a call while it runs, and turn errors into the statuses that they mean."""
        self._running_calls += 1
        self._idle.clear()
        try:
            if is_work and self._draining:
                raise NotReadyError("this worker is shutting down; use another")
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code = status_code(error)
            if not isinstance(error, HomerError):
                _log.exception("a call failed")
            details = str(error) or type(error).__name__
            await context.abort(code, details, trailing_metadata=error_metadata(error))
        finally:
            self._running_calls -= 1
            if not self._running_calls:
                self._idle.set()

    def _send(
        self,
        specs: Sequence[Spec],
        tensors: Iterable[torch.Tensor],
        options: tensor_pb2.TransferOptions,
    ) -> AsyncGenerator[bytes, None]:
        wire = WireFormat.asked_for(options)
        return send_tensors(
            wire.specs(specs),
            self._staging.to_host(wire.encode(specs, tensors)),
            choose_outlet(options),
            self._engine.io,
            self._sent,
        )

    def _indices(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor(indices, dtype=torch.int64, device=self._stack.device)

    def _sent(self, message_bytes: int) -> None:
        self._counters.sent_bytes += message_bytes

    def _received(self, message_bytes: int) -> None:
        self._counters.received_bytes += message_bytes
