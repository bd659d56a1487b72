"""A worker of virtual time: takes the seconds that a node costs, and computes nothing.

It keeps account of what a real worker would hold, so that a merge of a state that is not there, or
a cache with rows missing, fails as it would for real. Knows nothing about scheduling.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from cluster.bench.bytes_moved import state_bytes
from cluster.errors import PeerCallError, WorkerCallError, WorkerLostError
from cluster.job import (
    CacheReady,
    GenerateDone,
    GenerateEvent,
    Job,
    MergeDone,
    NodeDone,
    TokenOut,
    WorkerInfo,
    WorkerStats,
)
from cluster.sim.costs import Costs
from cluster.sim.network import Network
from homer.plan import MergePlan, NodeId, PlanNode


@dataclass
class SimPool:
    """What the workers of one simulation share.

    `plan_seconds` is what a worker takes to make a request's plan when it first hears of it.
    """

    costs: Costs
    network: Network
    plan_seconds: float = 0.0
    by_address: dict[str, SimWorker] = field(default_factory=dict)
    # When the coordinator has handled what has come so far; it handles one event at a time.
    coordinator_free_at: float = 0.0
    coordinator_busy_seconds: float = 0.0
    events: int = 0

    async def handle_event(self) -> None:
        """An event reaches the coordinator and waits for its turn."""
        await self.network.order()
        now = asyncio.get_running_loop().time()
        self.coordinator_free_at = max(now, self.coordinator_free_at) + self.costs.event_seconds
        self.coordinator_busy_seconds += self.costs.event_seconds
        self.events += 1
        await asyncio.sleep(self.coordinator_free_at - now)


class SimWorker:
    """Implements `WorkerClient`. Nodes and tokens of all requests take turns, one at a time."""

    def __init__(self, number: int, pool: SimPool, incarnation: int = 0) -> None:
        self.number = number
        self.name = f"worker-{number}" + (f".{incarnation}" if incarnation else "")
        self.address = f"{self.name}:1"
        self.busy_seconds = 0.0
        self._pool = pool
        self._compute = asyncio.Lock()
        self._calls: set[asyncio.Task[Any]] = set()
        self._dead = ""
        # Per request: the nodes that ran here and are held.
        self._held: dict[str, dict[NodeId, PlanNode]] = {}
        self._plans: dict[str, MergePlan] = {}
        pool.by_address[self.address] = self

    def die(self, reason: str) -> None:
        """Lose everything; what runs here, or is asked from now on, fails."""
        self._dead = reason
        self._held.clear()
        del self._pool.by_address[self.address]
        for call in self._calls:
            call.cancel()

    async def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]:
        async def work(emit: Callable[[list[NodeDone]], None]) -> None:
            await self._begin(job)
            loop = asyncio.get_running_loop()
            sent, waiting = loop.time(), []
            for part in job.plan.subtree(node):
                seconds = self._pool.costs.node_seconds(job.plan, part)
                await self._run(seconds)
                self._held[job.request_id][part.id] = part
                waiting.append(_done(part, seconds))
                if part.id == node or loop.time() - sent >= job.report_seconds:
                    emit(waiting)
                    sent, waiting = loop.time(), []

        async with aclosing(cast(Any, self._follow(work))) as messages:
            async for message in messages:
                for done in message:
                    yield done

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        async def work(emit: Callable[[MergeDone], None]) -> None:
            loop = asyncio.get_running_loop()
            await self._begin(job)
            started = loop.time()
            received = sum(
                await asyncio.gather(*(self._fetch(job, child, at) for child, at in children))
            )
            transfer = loop.time() - started
            part = job.plan.by_id[node]
            seconds = self._pool.costs.node_seconds(job.plan, part)
            await self._run(seconds)
            self._held[job.request_id][node] = part
            emit(
                MergeDone(
                    **vars(_done(part, seconds)),
                    transfer_seconds=transfer,
                    received_bytes=received,
                    context_indices=range(part.context_out),
                )
            )

        async with aclosing(cast(Any, self._follow(work))) as events:
            return [event async for event in events][-1]

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        delivered: Sequence[Sequence[int] | None] = (),
    ) -> AsyncIterator[GenerateEvent]:
        async def work(emit: Callable[[GenerateEvent], None]) -> None:
            plan, costs = job.plan, self._pool.costs
            loop = asyncio.get_running_loop()
            await self._begin(job)
            if plan.root.id not in self._held[job.request_id]:
                raise WorkerCallError(f"{self.name} does not hold the root")
            started = loop.time()
            received = await self._gather(job, shard_addresses)
            gathered = loop.time() - started
            # The suffix runs behind the rows as they come, layer by layer.
            refresh = costs.refresh_seconds(plan)
            await self._run(max(refresh / plan.num_layers, refresh - gathered))
            ended = loop.time() - started
            kept = range(plan.root.context_out)
            emit(CacheReady(plan.kept_len, gathered, ended - gathered, received, kept))
            given, decoding = len(delivered[0] or ()) if delivered else 0, loop.time()
            for token in range(job.sampling.max_new_tokens):
                # The first token comes from the cache's own logits.
                await self._run(costs.decode_seconds(plan) if token else 0.0)
                if token >= given:
                    emit(TokenOut(token))
            count = job.sampling.max_new_tokens
            emit(GenerateDone(count, "length", loop.time() - decoding))

        async with aclosing(cast(Any, self._follow(work))) as events:
            async for event in events:
                yield event

    async def end_answer(self, request_id: str, answer: int) -> None:
        await self._small_call()

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None:
        await self._small_call()

    async def drop(self, request_id: str, node: NodeId, attempt: int) -> None:
        await self._small_call()
        if held := self._held.get(request_id):
            for below in self._plans[request_id].subtree(node):
                held.pop(below.id, None)

    async def release(self, request_id: str) -> None:
        await self._small_call()
        self._held.pop(request_id, None)

    async def reset(self, keep_request_ids: Sequence[str] = ()) -> None:
        await self._small_call()
        self._held = {r: held for r, held in self._held.items() if r in keep_request_ids}

    async def info(self) -> WorkerInfo:
        await self._small_call()
        shape = self._pool.costs.shape
        return WorkerInfo(
            model="simulated",
            model_type="llama",
            num_layers=shape.num_layers,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.window,
            device="simulated",
            dtype="simulated",
            calibrated=False,
            max_distance=0,
            kv_bytes_per_token=shape.num_layers * shape.kv_bytes_per_row,
        )

    async def stats(self) -> WorkerStats:
        await self._small_call()
        return WorkerStats(
            requests=len(self._held),
            node_states=sum(len(held) for held in self._held.values()),
            kv_shards=0,
            state_bytes=0,
            kv_shard_bytes=0,
            running_calls=len(self._calls),
        )

    async def close(self) -> None:
        return None

    def rows_share(self, job: Job) -> float:
        """The part of all KV rows of a request's final cache that lies here.

        Survivors are taken to be spread evenly over the document.
        """
        held = self._held.get(job.request_id, {}).values()
        rows = sum(
            (node.context_end - node.context_start) * (node.layer_end - node.layer_start)
            for node in held
        )
        return rows / (job.plan.context_len * job.plan.num_layers)

    async def _follow(
        self, work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]
    ) -> AsyncIterator[Any]:
        """Run `work` on this worker and yield what it emits as it reaches the coordinator."""
        self._check_alive()
        events: asyncio.Queue[Any] = asyncio.Queue()
        call = asyncio.create_task(work(events.put_nowait))
        self._calls.add(call)
        call.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                await self._pool.handle_event()
                yield event
            self._check_alive()
            call.result()
        finally:
            self._calls.discard(call)
            call.cancel()

    def _check_alive(self) -> None:
        if self._dead:
            raise WorkerLostError(f"{self.name} does not answer: {self._dead}")

    async def _small_call(self) -> None:
        self._check_alive()
        await self._pool.network.order()
        self._check_alive()

    async def _begin(self, job: Job) -> None:
        """The order travels; the first one of a request makes its plan and runs its prefix."""
        await self._pool.network.order()
        if job.request_id not in self._held:
            self._held[job.request_id] = {}
            self._plans[job.request_id] = job.plan
            await self._run(self._pool.plan_seconds + self._pool.costs.prefix_seconds(job.plan))

    async def _run(self, seconds: float) -> None:
        async with self._compute:
            await asyncio.sleep(seconds)
            self.busy_seconds += seconds

    async def _fetch(self, job: Job, child: NodeId, address: str) -> int:
        """Have a child's state here; returns the bytes that travelled."""
        home = self._pool.by_address.get(address) if address else self
        if home is None or child not in home._held.get(job.request_id, {}):
            what = f"the state of node {tuple(child)} is not on {address or self.name}"
            raise PeerCallError(what, address=address) if address else WorkerCallError(what)
        if home is self:
            return 0
        nbytes = state_bytes(job.plan, job.plan.by_id[child], self._pool.costs.shape)
        await self._pool.network.move(home.number, self.number, nbytes)
        if home._dead:
            raise PeerCallError(f"{address} was lost while it sent", address=address)
        return nbytes

    async def _gather(self, job: Job, addresses: Sequence[str]) -> int:
        """Have all rows of the final cache here; returns the bytes that travelled."""
        plan, shape = job.plan, self._pool.costs.shape
        cache_bytes = plan.root.context_out * plan.num_layers * shape.kv_bytes_per_row
        share, received = self.rows_share(job), 0

        async def pull(address: str) -> None:
            nonlocal share, received
            home = self._pool.by_address.get(address)
            if home is None:
                raise PeerCallError(f"{address} does not answer", address=address)
            part = home.rows_share(job)
            nbytes = round(part * cache_bytes)
            await self._pool.network.move(home.number, self.number, nbytes)
            if home._dead:
                raise PeerCallError(f"{address} was lost while it sent", address=address)
            share += part
            received += nbytes

        await asyncio.gather(*(pull(address) for address in addresses))
        if abs(share - 1) > 1e-6:
            raise WorkerCallError(
                f"{share:.6f} of the rows of the final cache are there, each once, not all of them"
            )
        return received


def _done(node: PlanNode, seconds: float) -> NodeDone:
    return NodeDone(
        node=node.id, context_in=node.context_in, context_out=node.context_out, seconds=seconds
    )
