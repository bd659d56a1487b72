"""Asks every worker every few seconds what it holds, and what its clock says.

Knows nothing about what is made of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.clocks import Clocks
from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import SchedulerLoad, WorkerClient, WorkerInfo, WorkerStats

WATCH_SECONDS = 2.0
# A worker that takes longer is shown as silent.
ANSWER_SECONDS = 2.0


class WorkerState(StrEnum):
    """What a worker is at. `silent`: it does not answer."""

    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    SILENT = "silent"


@dataclass(frozen=True)
class WorkerView:
    """A worker as it was when it was last asked; no statistics where it did not answer."""

    name: str
    address: str
    state: WorkerState
    stats: WorkerStats | None
    device: str = ""
    # host:port; empty where it serves none.
    metrics_address: str = ""
    # 0 where it does not say.
    loaded_layers: int = 0


class Workers(Protocol):
    """What the watch needs of the scheduler."""

    @property
    def workers(self) -> Sequence[WorkerClient]: ...

    @property
    def load(self) -> SchedulerLoad: ...


class WorkerWatch:
    """Views of all workers of `scheduler`, in the order of their numbers.

    `views` is replaced as a whole: any thread may read it.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self.scheduler: Workers | None = None
        self._task: asyncio.Task[None] | None = None
        self._clients: dict[str, WorkerClient] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self.views: tuple[WorkerView, ...] = ()

    def start(self) -> None:
        """Watch from now on. Call it in the event loop."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> tuple[WorkerView, ...]:
        """Ask all workers now."""
        if self.scheduler is None:
            return ()
        load = self.scheduler.load
        # One that drains is none of the scheduler's workers any more, but still there.
        draining = [self._clients.get(name) for name in load.draining_workers]
        found = [*self.scheduler.workers, *filter(None, draining)]
        workers = sorted(found, key=lambda one: (len(one.name), one.name))
        self._clients = {worker.name: worker for worker in workers}
        self._infos = {name: info for name, info in self._infos.items() if name in self._clients}
        answers = await asyncio.gather(*(self._ask(worker) for worker in workers))
        load = self.scheduler.load
        self.views = tuple(
            self._view(worker, load, stats) for worker, stats in zip(workers, answers, strict=True)
        )
        return self.views

    def _view(
        self, worker: WorkerClient, load: SchedulerLoad, stats: WorkerStats | None
    ) -> WorkerView:
        info = self._infos.get(worker.name)
        port = 0 if info is None else info.metrics_port
        host = worker.address.rpartition(":")[0]
        return WorkerView(
            name=worker.name,
            address=worker.address,
            state=_state(worker.name, load, stats),
            stats=stats,
            device="" if info is None else info.device,
            metrics_address=f"{host}:{port}" if port else "",
            loaded_layers=0 if info is None else info.loaded_layers,
        )

    def metrics_addresses(self) -> list[str]:
        """Where workers serve their own metrics."""
        return [view.metrics_address for view in self.views if view.metrics_address]

    async def _watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(WATCH_SECONDS)

    async def _ask(self, worker: WorkerClient) -> WorkerStats | None:
        asked = self._clocks.now()
        try:
            if worker.name not in self._infos:
                info = await asyncio.wait_for(worker.info(), ANSWER_SECONDS)
                self._infos[worker.name] = info
                asked = self._clocks.now()
            stats = await asyncio.wait_for(worker.stats(), ANSWER_SECONDS)
        except (WorkerLostError, WorkerCallError, TimeoutError):
            return None
        if stats.unix_seconds:
            self._clocks.answered(worker.name, asked, stats.unix_seconds)
        return stats


def _state(name: str, load: SchedulerLoad, stats: WorkerStats | None) -> WorkerState:
    if stats is None:
        return WorkerState.SILENT
    if name in load.draining_workers:
        return WorkerState.DRAINING
    # Decoding keeps a worker busy too, though it may get other work beside it.
    busy = name in load.busy_workers or stats.running_calls > 0
    return WorkerState.BUSY if busy else WorkerState.IDLE
