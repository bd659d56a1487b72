"""The work behind GenerateTokens: the final cache, gathered once, and an answer from it.

Knows nothing about gRPC servers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from homer.context import CompressedContext
from homer.finish import CacheBuilder
from homer.generation import Answer, FinishReason
from homer.sampling import SamplingParams, TokenLogprobs
from homer.state import NodeState
from homer.v1 import worker_pb2
from workers.batcher import Batcher
from workers.budget import Budget
from workers.engine import Engine, LoadedModel
from workers.gather import Gather
from workers.peer import PeerPool
from workers.plan_wire import write_node
from workers.runs import Counters
from workers.store import HeldRequest
from workers.tracing import Tracing
from workers.wire import FINISH_REASONS

Emit = Callable[[worker_pb2.GenerateTokensResponse], None]


@dataclass(frozen=True)
class Answering:
    """Answers requests with this worker's model, engine and peers."""

    model: LoadedModel
    engine: Engine
    batcher: Batcher
    budget: Budget
    peers: PeerPool
    counters: Counters
    tracing: Tracing

    async def generate(
        self,
        held: HeldRequest,
        addresses: Sequence[str],
        params: SamplingParams,
        delivered: Sequence[Sequence[int] | None],
        emit: Emit,
    ) -> None:
        """Gather the final cache, once per request, and decode answers from it.

        What was `delivered` of each already is decoded again, but not emitted; one that has ended
        (None) is left out. An answer whose task in `held.decoding` is cancelled ends there; the
        others go on.
        """
        ready = await self._cache_ready(held, addresses, params.max_new_tokens)
        emit(worker_pb2.GenerateTokensResponse(cache_ready=ready.message))
        wanted = {number: known for number, known in enumerate(delivered) if known is not None}
        # All but the first have a copy of the cache.
        copy = ready.context.nbytes
        copies = copy * len(wanted.keys() - {0})
        what = f"{len(wanted)} answers of up to {params.max_new_tokens} tokens"
        with self.budget.reserve(copies, what) if copies else nullcontext() as room:

            async def decode(number: int, known: Sequence[int]) -> None:
                own = params.for_answer(number)
                try:
                    await self._decode(ready.context, own, number, known, emit)
                finally:
                    if number and room is not None:
                        room.give_back(copy)

            try:
                async with asyncio.TaskGroup() as answers:
                    for number, known in wanted.items():
                        held.decoding[number] = answers.create_task(decode(number, known))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None

    async def _decode(
        self,
        context: CompressedContext,
        params: SamplingParams,
        number: int,
        known: Sequence[int],
        emit: Emit,
    ) -> None:
        """Decode one answer to its end; its first tokens may be `known`."""
        began, started = time.time(), time.perf_counter()
        beside = number > 0
        cache = await self.engine.move(
            self.model.decode_cache, context, params.max_new_tokens, beside
        )
        answer = Answer(self.model.stack, cache, params, forced=known)
        count = 0

        def take(token: int) -> None:
            nonlocal count
            count += 1
            if count > len(known):
                self.counters.generated_tokens += 1
                piece = worker_pb2.TokenPiece(token_id=token, answer=number)
                if params.logprobs is not None:
                    _add_logprobs(piece, answer.logprobs[count - 1])
                emit(worker_pb2.GenerateTokensResponse(token=piece))

        # The first token needs no model run, and does not wait for others'.
        first = await self.engine.move(answer.choose, context.logits)
        if isinstance(first, FinishReason):
            reason = first
        else:
            take(first)
            reason = FinishReason.LENGTH
            if not answer.is_full:
                reason = await self.batcher.run(answer, take)
        summary = worker_pb2.GenerateTokensSummary(
            generated_tokens=count,
            finish_reason=FINISH_REASONS[reason],
            decode_seconds=time.perf_counter() - started,
            started_unix_seconds=began,
            answer=number,
        )
        self.tracing.record(
            "decode", began, summary.decode_seconds, attributes={"tokens.out": count}
        )
        emit(worker_pb2.GenerateTokensResponse(summary=summary))

    async def _cache_ready(
        self, held: HeldRequest, addresses: Sequence[str], room_tokens: int
    ) -> _Ready:
        if held.context is not None:
            return _Ready.of(held.context)
        need = self.model.stack.footprint.answer(held.plan, room_tokens)
        if not addresses:
            # Its rows are here, and go as the cache comes.
            need = max(0, need - held.kv_shard_bytes)
        with self.budget.reserve(need, f"an answer of up to {room_tokens} tokens"):
            return await self._build_cache(held, addresses, room_tokens)

    async def _build_cache(
        self, held: HeldRequest, addresses: Sequence[str], room_tokens: int
    ) -> _Ready:
        root = held.state(held.plan.root.id)
        began, started = time.time(), time.perf_counter()
        request = worker_pb2.GatherKvRequest(
            request_id=held.spec.request_id,
            node=write_node(root.node),
            context_indices=root.context_indices.tolist(),
        )
        gather = Gather(self.peers, addresses, request, self.model.stack)
        if addresses:
            context = await self._gather_cache(held, root, gather, room_tokens)
        else:
            context = await self.engine.answer_step(_build_here, held, root, room_tokens)
        ended = time.perf_counter()
        gathered = max(gather.ended, started) if addresses else started
        ready = _Ready.of(context)
        ready.message.gather_seconds = gathered - started
        ready.message.refresh_seconds = ended - gathered
        ready.message.started_unix_seconds = began
        ready.message.received_bytes = gather.received_bytes
        self.tracing.record(
            "gather",
            began,
            gathered - started,
            attributes={"received_bytes": gather.received_bytes},
        )
        self.tracing.record("refresh", began + gathered - started, ended - gathered)
        return ready

    async def _gather_cache(
        self, held: HeldRequest, root: NodeState, gather: Gather, room_tokens: int
    ) -> CompressedContext:
        """Build the cache behind the gather; others run while the next layer is on its way.

        Rows may fail to come, and then the next attempt needs those that are here again: the run
        takes apart copies that share their tensors.
        """
        work = replace(root, shards=held.snapshot())
        async with gather:
            builder = await self.engine.answer_step(held.encoder.finishing, work, room_tokens)
            while not builder.complete:
                await gather.wait(builder.next_layer)
                await self.engine.answer_step(_add_arrived, builder, gather)
            held.context = await self.engine.answer_step(builder.finish)
        # The cache has all their rows now.
        held.shards = {}
        return held.context


@dataclass(frozen=True)
class _Ready:
    """A complete cache, and what is said of it."""

    context: CompressedContext
    message: worker_pb2.CacheReady

    @classmethod
    def of(cls, context: CompressedContext) -> _Ready:
        message = worker_pb2.CacheReady(
            cache_tokens=context.cache_len, context_indices=context.context_indices.tolist()
        )
        return cls(context, message)


def _add_logprobs(piece: worker_pb2.TokenPiece, found: TokenLogprobs) -> None:
    piece.logprob.token_id, piece.logprob.logprob = piece.token_id, found.logprob
    for token, logprob in zip(found.top_ids, found.top_logprobs, strict=True):
        piece.top_logprobs.add(token_id=token, logprob=logprob)


def _add_arrived(builder: CacheBuilder, gather: Gather) -> None:
    """Take every layer that has come, those included that come meanwhile."""
    while not builder.complete and gather.arrived(builder.next_layer):
        builder.add_layer(gather.layer(builder.next_layer))


def _build_here(held: HeldRequest, root: NodeState, room_tokens: int) -> CompressedContext:
    """Build the cache from rows that are all here, in one step, which nothing can come between.

    The rows are given up layer by layer as the cache grows. Where that fails in the middle the
    request has to be run again, so what is left of it is dropped.
    """
    shards, held.shards = held.all_shards(), {}
    try:
        held.context = held.encoder.finish(replace(root, shards=shards), room_tokens=room_tokens)
    except BaseException:
        held.states = {}
        raise
    return held.context
