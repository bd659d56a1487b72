"""What a worker holds, per request: states of finished nodes, KV shards, the final cache.

Counts its bytes. Knows nothing about gRPC, and runs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from homer.context import CompressedContext
from homer.encode import TreeEncoder
from homer.errors import StateError
from homer.plan import MergePlan, NodeId
from homer.state import KVShard, NodeState
from homer.v1 import worker_pb2
from workers.errors import StaleCallError, UnknownStateError
from workers.jobs import Job

RELEASED_SECONDS = 600.0
RELEASED_REQUESTS = 100_000


@dataclass
class HeldRequest:
    """Everything that is held for one request.

    `states` are those of the nodes that were asked for, without shards: they stay until the request
    is released, so that a merge above them can be run again. They are small beside the KV rows.
    `shards` are the KV rows, by the node that they were made for: of a subtree all that was made
    in it, of a merge only those of its own layers. So each can be made again, or forgotten, alone.
    `decoding` are the tasks that decode its answers, by their numbers.
    `dropped` says up to which attempt the work of a node is not wanted any more, `touched` when a
    call was last about the request.
    """

    spec: worker_pb2.RequestSpec
    encoder: TreeEncoder
    states: dict[NodeId, NodeState] = field(default_factory=dict)
    shards: dict[NodeId, list[KVShard]] = field(default_factory=dict)
    context: CompressedContext | None = None
    jobs: dict[tuple[str, NodeId], Job[Any]] = field(default_factory=dict)
    decoding: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    dropped: dict[NodeId, int] = field(default_factory=dict)
    touched: float = 0.0

    @property
    def plan(self) -> MergePlan:
        return self.encoder.plan

    def state(self, node: NodeId) -> NodeState:
        """The state of a finished node; it has no shards.

        Raises
        ------
        UnknownStateError
            When it is not here.
        """
        if node not in self.states:
            raise UnknownStateError(
                f"request {self.spec.request_id!r}: the state of node {tuple(node)} is not here; "
                "run it here first"
            )
        return self.states[node]

    def keep(self, state: NodeState) -> None:
        """Hold what a node left."""
        self.states[state.node] = state.without_shards()
        self.shards[state.node] = state.shards

    def forget(self, node: NodeId) -> int:
        """Drop what a node left; returns the bytes freed."""
        state, shards = self.states.pop(node, None), self.shards.pop(node, [])
        freed = sum(shard.nbytes for shard in shards)
        return freed if state is None else freed + state.nbytes

    def forget_subtree(self, node: NodeId) -> None:
        """Drop what is held of a node and of all below it."""
        for below in self.plan.subtree(node):
            self.forget(below.id)

    def all_shards(self) -> list[KVShard]:
        """Every KV shard that is held."""
        return [shard for shards in self.shards.values() for shard in shards]

    def shards_below(self, node: NodeId) -> list[tuple[list[KVShard], KVShard]]:
        """The shards below `node`, each with the list that it is in."""
        return [
            (self.shards[below.id], shard)
            for below in self.plan.subtree(node)[:-1]
            for shard in self.shards.get(below.id, ())
        ]

    def snapshot(self) -> list[KVShard]:
        """All shards as they are now, whatever happens to them later."""
        return [shard.copy() for shard in self.all_shards()]

    def end_answer(self, number: int) -> None:
        """Decode an answer no further; nothing where that is not done."""
        if number in self.decoding:
            self.decoding[number].cancel()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing here that anybody could ask for or wait for."""
        running = any(job.running for job in self.jobs.values())
        return not (running or self.states or self.shards or self.context or self.dropped)

    def clear(self) -> int:
        """Stop what runs and drop everything that is held; returns the bytes freed."""
        for job in self.jobs.values():
            job.stop(f"request {self.spec.request_id!r} was released")
        freed = self.nbytes
        self.states.clear()
        self.shards.clear()
        self.jobs.clear()
        self.context = None
        return freed

    @property
    def nbytes(self) -> int:
        return self.state_bytes + self.kv_shard_bytes

    @property
    def state_bytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    @property
    def kv_shard_bytes(self) -> int:
        """KV shards, and the final cache once they have gone into it."""
        context = self.context.nbytes if self.context is not None else 0
        return context + sum(shard.nbytes for shard in self.all_shards())


class Store:
    """All requests of a worker.

    A released id is remembered for a while, so that a call that was on its way when the request
    was released cannot bring it back: such calls are refused. Whoever runs a request again gives it
    a new id, or waits that long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests: dict[str, HeldRequest] = {}
        self._released: OrderedDict[str, float] = OrderedDict()
        self._clock = clock

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> list[HeldRequest]:
        return list(self._requests.values())

    def get(self, request_id: str) -> HeldRequest:
        """What is held for a request.

        Raises
        ------
        StaleCallError
            When it was released.
        UnknownStateError
            When nothing is held for it.
        """
        self._check_released(request_id)
        if request_id not in self._requests:
            raise UnknownStateError(f"request {request_id!r} is not known here")
        held = self._requests[request_id]
        held.touched = self._clock()
        return held

    def open(
        self, spec: worker_pb2.RequestSpec, make_encoder: Callable[[], TreeEncoder]
    ) -> HeldRequest:
        """What is held for a request, made when it is the first that is heard of it.

        Raises
        ------
        StaleCallError
            When it was released.
        StateError
            When the request is known with another plan or prompt.
        """
        self._check_released(spec.request_id)
        held = self._requests.get(spec.request_id)
        if held is None:
            held = self._requests[spec.request_id] = HeldRequest(spec, make_encoder())
        elif held.spec != spec:
            raise StateError(
                f"request {spec.request_id!r} is known here with another plan or prompt; "
                "give every request its own id"
            )
        held.touched = self._clock()
        return held

    def idle(self, seconds: float) -> list[HeldRequest]:
        """Requests of which nothing runs, and nothing was heard for so long."""
        now = self._clock()
        for held in self._requests.values():
            if any(job.running for job in held.jobs.values()):
                held.touched = now
        return [held for held in self._requests.values() if now - held.touched >= seconds]

    def forget(self, held: HeldRequest) -> None:
        """Take a request out in which there is nothing."""
        if self._requests.get(held.spec.request_id) is held:
            del self._requests[held.spec.request_id]

    def take(self, request_id: str) -> HeldRequest | None:
        """Take a request out; its id may come again."""
        return self._requests.pop(request_id, None)

    def release(self, request_id: str) -> HeldRequest | None:
        """Take a request out, and refuse late calls of it from now on."""
        self._released.pop(request_id, None)
        self._released[request_id] = self._clock() + RELEASED_SECONDS
        if len(self._released) > RELEASED_REQUESTS:
            self._released.popitem(last=False)
        return self.take(request_id)

    def _check_released(self, request_id: str) -> None:
        now = self._clock()
        while self._released and next(iter(self._released.values())) <= now:
            self._released.popitem(last=False)
        if request_id in self._released:
            raise StaleCallError(
                f"request {request_id!r} was released; a new request needs a new id"
            )
