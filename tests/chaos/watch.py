"""A worker's client that tells which phase each call is in, so that a fault can hit it.

Knows nothing about faults.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

from cluster.job import CacheReady, GenerateEvent, Job, MergeDone, NodeDone
from cluster.worker_client import GrpcWorkerClient
from homer.plan import NodeId
from tests.chaos.faults import Phase

# Told the job, the phase, the worker that is in it, and the addresses of those that it pulls from.
# What it raises, the call fails with.
Entered = Callable[[Job, Phase, str, Sequence[str]], None]


class WatchedClient(GrpcWorkerClient):
    """Calls a worker at `control`; others find it at `address`."""

    def __init__(self, name: str, control: str, address: str, entered: Entered) -> None:
        super().__init__(name, control)
        self.address = address
        self._entered = entered
        self._phases: list[Phase] = []

    def is_in(self, phase: Phase) -> bool:
        """Whether a call of this worker is in `phase` now."""
        return phase in self._phases

    async def run_subtree(
        self, job: Job, node: NodeId, attempt: int, **more: Any
    ) -> AsyncIterator[NodeDone]:
        calling = super().run_subtree(job, node, attempt, **more)
        with self._phase(job, Phase.LEAF, attempt):
            async with aclosing(cast(Any, calling)) as events:
                async for event in events:
                    yield event

    async def merge(
        self,
        job: Job,
        node: NodeId,
        attempt: int,
        children: Sequence[tuple[NodeId, str]],
        **more: Any,
    ) -> MergeDone:
        others = [address for _, address in children if address]
        phase = Phase.TRANSFER if others else Phase.MERGE
        with self._phase(job, phase, attempt, others):
            return await super().merge(job, node, attempt, children, **more)

    async def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        *rest: Any,
        **more: Any,
    ) -> AsyncIterator[GenerateEvent]:
        calling = super().generate(job, attempt, shard_addresses, *rest, **more)
        async with aclosing(cast(Any, calling)) as events:
            with self._phase(job, Phase.GATHER, attempt, shard_addresses):
                async for event in events:
                    if isinstance(event, CacheReady):
                        break
                    yield event
                else:
                    return
            with self._phase(job, Phase.DECODE, attempt, shard_addresses):
                yield event
                async for event in events:
                    yield event

    @contextmanager
    def _phase(
        self, job: Job, phase: Phase, attempt: int, others: Sequence[str] = ()
    ) -> Iterator[None]:
        phases = [phase, Phase.RECOVERY] if attempt else [phase]
        self._phases += phases
        try:
            for each in phases:
                self._entered(job, each, self.name, others)
            yield
        finally:
            for each in phases:
                self._phases.remove(each)
