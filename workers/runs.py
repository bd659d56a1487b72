"""The work behind the calls that run nodes: subtrees and merges, step by step.

Each is the work of one job. They leave what is held for the request as it was until they succeed,
so that a call that failed or was stopped can be repeated. Knows nothing about gRPC servers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import torch

from homer.encode import NodeInput, TreeEncoder, take_input
from homer.errors import PromptError
from homer.memory import least_memory
from homer.order import node_batches
from homer.plan import NodeId, PlanNode
from homer.state import NodeState
from homer.v1 import worker_pb2
from workers.budget import Budget
from workers.engine import Engine, LoadedModel
from workers.kept_runs import write_runs
from workers.metrics import WorkerMetrics
from workers.peer import PeerPool
from workers.plan_wire import write_node
from workers.spans import SubtreeSpans
from workers.staging import Places
from workers.store import HeldRequest
from workers.tensor_stream import Limits, NamedTensor
from workers.tracing import Tracing
from workers.wire import (
    must_equal,
    read_state,
    state_specs,
)


@dataclass
class Counters:
    """What a worker has done since it started."""

    sent_bytes: int = 0
    received_bytes: int = 0
    leaves_done: int = 0
    merges_done: int = 0
    generated_tokens: int = 0
    # Bytes and seconds of what was received, by peer and transport.
    transfers: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)

    def add_transfer(self, peer: str, transport: str, received_bytes: int, seconds: float) -> None:
        """A tensor stream from the worker at `peer` is over, well or not."""
        before = self.transfers.get((peer, transport), (0, 0.0))
        self.transfers[peer, transport] = (before[0] + received_bytes, before[1] + seconds)


@dataclass(frozen=True)
class Runner:
    """Runs work for requests with this worker's model, engine and peers."""

    model: LoadedModel
    engine: Engine
    budget: Budget
    peers: PeerPool
    counters: Counters
    metrics: WorkerMetrics
    tracing: Tracing

    async def run_subtree(
        self,
        held: HeldRequest,
        node_id: NodeId,
        context_ids: torch.Tensor,
        emit: Callable[[worker_pb2.RunSubtreeResponse], None],
        report_kept: bool = False,
    ) -> None:
        """Run a subtree depth-first, as `TreeEncoder.run_subtree` does, with a step for each node.

        Where weights are offloaded, a step is a batch of nodes, as large as half of what is free
        has room for. Between steps other requests get their turn.
        """
        footprint, plan = self.model.stack.footprint, held.plan
        # Merges free memory: what is new may not take the room that they need.
        spare_bytes = footprint.largest_merge(plan)
        # Others may begin beside it.
        batch_size = held.encoder.choose_batch_size(
            node_id, (self._free_bytes() - spare_bytes) // 2
        )
        reserved = self.budget.reserve(
            footprint.subtree(plan, node_id, batch_size),
            f"the subtree of node {tuple(node_id)}",
            spare_bytes,
        )
        with reserved, SubtreeSpans(self.tracing, plan, node_id) as spans:
            await self._run_nodes(held, node_id, context_ids, batch_size, emit, spans, report_kept)

    def _free_bytes(self) -> int:
        free = self.budget.free_bytes
        return least_memory(self.model.stack.devices).free_bytes if free is None else free

    async def _run_nodes(
        self,
        held: HeldRequest,
        node_id: NodeId,
        context_ids: torch.Tensor,
        batch_size: int,
        emit: Callable[[worker_pb2.RunSubtreeResponse], None],
        spans: SubtreeSpans,
        report_kept: bool,
    ) -> None:
        held.forget_subtree(node_id)
        top = held.plan.by_id[node_id]
        done: dict[NodeId, NodeState] = {}
        for batch in node_batches(held.plan, node_id, batch_size):
            inputs = [take_input(node, top, context_ids, done) for node in batch]
            ran = await self.engine.step(_timed, held.encoder, batch, inputs)
            # What the children left has gone into the merges.
            inputs.clear()
            for node, state, began in zip(batch, ran.states, ran.began, strict=True):
                done[node.id] = state
                self._count(node, ran.seconds)
                spans.node_done(node, began, ran.seconds)
                if node.id == node_id:
                    held.keep(state)
                kept = state.context_indices.tolist() if report_kept else ()
                emit(
                    worker_pb2.RunSubtreeResponse(
                        node=write_node(node.id),
                        context_tokens_in=node.context_in,
                        context_tokens_out=node.context_out,
                        compute_seconds=ran.seconds,
                        started_unix_seconds=began,
                        kept_runs=write_runs(kept, node.context_start),
                    )
                )
            del ran, state

    def _count(self, node: PlanNode, seconds: float) -> None:
        if node.is_leaf:
            self.counters.leaves_done += 1
            self.metrics.leaf_done(node.context_in, seconds)
        else:
            self.counters.merges_done += 1
            self.metrics.merge_done(node.id.height, seconds)

    async def merge(
        self,
        held: HeldRequest,
        node_id: NodeId,
        addresses: Sequence[str],
        emit: Callable[[worker_pb2.MergeResponse], None],
    ) -> None:
        """Merge the children of a node; those that are not here come from `addresses`."""
        need = self.model.stack.footprint.merge(held.plan, node_id)
        with self.budget.reserve(need, f"the merge of node {tuple(node_id)}"):
            await self._merge(held, node_id, addresses, emit)

    async def _merge(
        self,
        held: HeldRequest,
        node_id: NodeId,
        addresses: Sequence[str],
        emit: Callable[[worker_pb2.MergeResponse], None],
    ) -> None:
        node = held.plan.by_id[node_id]
        transfer_began, started = time.time(), time.perf_counter()
        received = [0]
        children = await asyncio.gather(
            *(
                self._child(held, child, address, received)
                for child, address in zip(node.children, addresses, strict=True)
            )
        )
        transfer_seconds = time.perf_counter() - started
        ran = await self.engine.step(_timed, held.encoder, [node], [children])
        (state,), (began,) = ran.states, ran.began
        self._count(node, ran.seconds)
        if any(addresses):
            self.tracing.record(
                "transfer",
                transfer_began,
                transfer_seconds,
                attributes={"received_bytes": received[0]},
            )
        self.tracing.record("compute", began, ran.seconds)
        kept = state.context_indices
        await self.prune(held, node_id, kept)
        held.keep(state)
        emit(
            worker_pb2.MergeResponse(
                node=write_node(node_id),
                context_tokens_in=node.context_in,
                context_tokens_out=node.context_out,
                compute_seconds=ran.seconds,
                transfer_seconds=transfer_seconds,
                received_bytes=received[0],
                context_indices=kept.tolist(),
                started_unix_seconds=began,
                transfer_started_unix_seconds=transfer_began,
            )
        )

    async def _child(
        self, held: HeldRequest, child: NodeId, address: str, received: list[int]
    ) -> NodeState:
        if child in held.states or not address:
            return held.state(child)
        plan, stack = held.plan, self.model.stack
        specs = self.peers.wire.specs(state_specs(plan, plan.by_id[child], stack))
        limits = Limits(total_bytes=sum(spec.nbytes for spec in specs), tensors=len(specs))
        request = worker_pb2.FetchStateRequest(
            request_id=held.spec.request_id, node=write_node(child)
        )

        def count(message_bytes: int) -> None:
            received[0] += message_bytes

        places = Places.of(stack)

        async def fetch() -> list[NamedTensor]:
            pulling = self.peers.pull(
                address,
                "FetchState",
                request,
                limits,
                must_equal(specs),
                on_received=count,
                dtype=stack.dtype,
                places=places,
            )
            async with aclosing(pulling) as pulled:
                return [named async for named in pulled]

        tensors = await self.peers.retried(fetch)
        return read_state(child, tensors, places)

    async def prune(self, held: HeldRequest, node_id: NodeId, kept: torch.Tensor) -> int:
        """Drop the rows below a merged node that did not survive it; returns the bytes freed.

        Each shard is replaced when its smaller copy is ready: readers always find whole ones.
        """
        freed = 0
        for shards, shard in held.shards_below(node_id):
            # Now: an answer that begins meanwhile takes the shard apart.
            smaller = shard.copy()
            before = smaller.nbytes
            if smaller.elsewhere is not None:
                smaller.elsewhere.select(kept)
            await self.engine.move(smaller.select_, kept)
            where = next((i for i, other in enumerate(shards) if other is shard), None)
            if where is not None:
                shards[where] = smaller
                freed += before - smaller.nbytes
        return freed


def check_children(node: PlanNode, given: Sequence[NodeId]) -> None:
    """Refuse a merge of anything but the node's own children, in order.

    Raises
    ------
    PromptError
        Which children it has.
    """
    if tuple(given) != node.children or node.is_leaf:
        raise PromptError(
            f"node {tuple(node.id)} merges {[tuple(child) for child in node.children]}, "
            f"not {[tuple(child) for child in given]}"
        )


@dataclass(frozen=True)
class _Ran:
    """Nodes that were run: what they left, when each began, and the seconds that each took.

    Nodes of a batch run in turns, layer by layer; each is given an even part of the time.
    """

    states: list[NodeState]
    began: list[float]
    seconds: float


def _timed(encoder: TreeEncoder, nodes: Sequence[PlanNode], inputs: Sequence[NodeInput]) -> _Ran:
    started_unix_seconds, started = time.time(), time.perf_counter()
    states = encoder.run_together(nodes, inputs)
    # A node is done when its numbers are there, not when an accelerator was told to make them.
    encoder.stack.synchronize()
    seconds = (time.perf_counter() - started) / len(nodes)
    began = [started_unix_seconds + number * seconds for number in range(len(nodes))]
    return _Ran(states, began, seconds)
