"""Ray's part of the workers: how many there are, and that they are there.

Each worker is a slot that keeps an actor alive; the actors wrap the Ray-free worker server of
`workers`, and from then on everything goes over gRPC. Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from cluster.autoscale import Autoscaler, Decision
from cluster.job import SchedulerLoad
from cluster.options import ServeOptions
from cluster.placement import placement_problem
from cluster.slot import Members, Slot, result
from cluster.worker_client import GrpcWorkerClient

_log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 10.0
SCALE_SECONDS = 0.5
# Where requests go on for longer, a worker that is given back is lost to them, which they survive.
DRAIN_TIMEOUT_SECONDS = 600.0
# A coordinator that is back opens its door when the first worker is found, and waits that long for
# the others.
REJOIN_SECONDS = 1.0


class PoolMembers(Members, Protocol):
    """What the pool needs of the scheduler."""

    @property
    def load(self) -> SchedulerLoad: ...

    async def drain_worker(self, name: str, timeout_seconds: float) -> bool: ...


class WorkerPool:
    """The workers of a service. Use it in one event loop.

    Parameters
    ----------
    options : ServeOptions
    keeper : ray.actor.ActorHandle
        The `Keeper` that owns their actors.
    toward : str
        An address of this node.
    members : PoolMembers
        The scheduler, which is told of each worker that comes and goes. It tells the pool of those
        that it gives up, by `fence`.
    """

    def __init__(
        self, options: ServeOptions, keeper: Any, toward: str, members: PoolMembers
    ) -> None:
        self._options = options
        self._keeper = keeper
        self._toward = toward
        self._members = members
        self._slots: dict[int, Slot] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def slots(self) -> list[Slot]:
        """All slots, whether their worker serves or not, by number."""
        return [slot for _, slot in sorted(self._slots.items())]

    @property
    def clients(self) -> list[GrpcWorkerClient]:
        """The workers that serve."""
        return [slot.client for slot in self.slots if slot.client is not None]

    def absent(self) -> dict[str, str]:
        """Workers that do not serve, and why."""
        return {
            f"worker-{slot.number}": slot.reason or f"it is {slot.state}"
            for slot in self.slots
            if slot.client is None
        }

    async def start(self) -> None:
        """Place the workers, let them load the model, and connect to them.

        Where the keeper has workers already, it is enough that one of them serves.

        Raises
        ------
        PlacementError
            When the cluster has no room, with what is missing; or when a worker cannot start.
        HomerError
            When a worker cannot load the model.
        """
        numbers = await result(self._keeper.numbers.remote())
        if numbers:
            await self._find_again(numbers)
        else:
            await self._start_new()
        if self._options.grows:
            self._keep(self._scale())

    def fence(self, name: str, reason: str) -> None:
        """Replace a worker that the scheduler has given up."""
        for slot in self._slots.values():
            if slot.client is not None and slot.client.name == name:
                slot.fence(reason)

    async def drain_node(self, node_id: str, timeout_seconds: float) -> dict[str, bool]:
        """Give the workers of a node nothing new; returns which of them hold nothing in time.

        Their processes stay until the node goes. Then Ray places others, on other nodes.
        """
        there = [slot.client.name for slot in self.slots if slot.client and slot.node_id == node_id]
        drained = await asyncio.gather(
            *(self._members.drain_worker(name, timeout_seconds) for name in there)
        )
        return dict(zip(there, drained, strict=True))

    async def stop(self) -> None:
        """Let the workers drain, and end their processes."""
        tasks = [*self._tasks, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stopping = [asyncio.wait_for(slot.stop(), STOP_TIMEOUT_SECONDS) for slot in self.slots]
        for error in await asyncio.gather(*stopping, return_exceptions=True):
            if isinstance(error, (RayError, TimeoutError)):
                _log.warning("a worker did not stop in peace: %r", error)
            elif error is not None:
                raise error
        await result(self._keeper.close.remote())

    async def _start_new(self) -> None:
        options = self._options
        for _ in options.initial:
            await self._add()
        placed = asyncio.gather(*(slot.placed for slot in self.slots))
        started = asyncio.gather(*(slot.started for slot in self.slots))
        try:
            done, _ = await asyncio.wait(
                {placed, started},
                timeout=options.placement_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                raise placement_problem(
                    options.initial,
                    options.placement,
                    ray.cluster_resources(),
                    ray.available_resources(),
                    sum(node["Alive"] for node in ray.nodes()),
                )
            await started
        finally:
            placed.cancel()
            started.cancel()

    async def _find_again(self, numbers: list[int]) -> None:
        for number in numbers:
            self._open(number)
        while not self.clients:
            await asyncio.sleep(0.05)
        await asyncio.wait([slot.started for slot in self.slots], timeout=REJOIN_SECONDS)
        _log.info("found %d of %d worker(s) again", len(self.clients), len(numbers))

    async def _add(self) -> None:
        self._open(await result(self._keeper.next_number.remote()))

    def _open(self, number: int) -> None:
        slot = Slot(number, self._options, self._keeper, self._toward, self._members)
        self._slots[number] = slot
        self._running[number] = asyncio.create_task(slot.run())

    async def _scale(self) -> None:
        autoscaler = Autoscaler(self._options)
        loop = asyncio.get_running_loop()
        fixed = range(self._options.workers, len(self._options.initial))
        while True:
            slots = [s for s in self.slots if not s.retiring and s.number not in fixed]
            serving = [slot.client.name for slot in slots if slot.client is not None]
            decision = autoscaler.decide(
                loop.time(), self._members.load, serving, len(slots) - len(serving)
            )
            try:
                await self._carry_out(decision, slots)
            except RayError as error:
                _log.warning("the pool could not be changed: %r", error)
            await asyncio.sleep(SCALE_SECONDS)

    async def _carry_out(self, decision: Decision, slots: list[Slot]) -> None:
        for _ in range(decision.ask):
            _log.info("all workers are busy: asking for one more, of %d", len(slots))
            await self._add()
        waiting = [slot for slot in slots if slot.client is None]
        for slot in waiting[len(waiting) - decision.withdraw :]:
            await self._close(slot)
        for slot in slots:
            if slot.client is not None and slot.client.name in decision.give_back:
                slot.retiring = True
                self._keep(self._give_back(slot, slot.client.name))

    async def _give_back(self, slot: Slot, name: str) -> None:
        _log.info("%s has had nothing to do: giving it back", name)
        if not await self._members.drain_worker(name, DRAIN_TIMEOUT_SECONDS):
            self._members.lose_worker(name, "it is given back, and was still in use")
        try:
            await asyncio.wait_for(slot.stop(), STOP_TIMEOUT_SECONDS)
        except (RayError, TimeoutError) as error:
            _log.warning("%s did not stop in peace: %r", name, error)
        await self._close(slot)

    async def _close(self, slot: Slot) -> None:
        running = self._running.pop(slot.number)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        del self._slots[slot.number]
        await result(self._keeper.drop.remote(slot.number))

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("the pool failed", exc_info=error)
