"""One simulation: a pool of workers, requests that come one after the other, workers that die.

The scheduler is the one of a service. Knows nothing about tables or files.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from cluster.errors import NoWorkersError, WorkerCallError, WorkerLostError
from cluster.job import Job, Sampling, TokenOut
from cluster.observer import Observer
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from cluster.service import REPORT_SECONDS_PER_WORKER
from cluster.sim.costs import Costs
from cluster.sim.loop import run_virtual
from cluster.sim.network import Network, NetworkOptions
from cluster.sim.worker import SimPool, SimWorker
from homer.config import HomerConfig
from homer.plan import MergePlan, NodeId

PREFIX_TOKENS = 16
SUFFIX_TOKENS = 32

FAST_NETWORK = NetworkOptions()
# Simulated workers always answer: pings would show nothing, and take the simulator's time.
QUIET = SchedulerOptions(heartbeat_seconds=0)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What to simulate.

    Parameters
    ----------
    workers : int
    prompt_tokens : int
        Of each request, prefix and question included.
    requests : int
        In all.
    concurrent : int
        How many of them run at a time.
    new_tokens : int
        Length of each answer.
    failures_per_hour : float
        Of all workers together, at random.
    restart_seconds : float
        Until a worker that died is back.
    network : NetworkOptions
    scheduler : SchedulerOptions
    seed : int
    """

    workers: int
    prompt_tokens: int
    requests: int = 1
    concurrent: int = 1
    new_tokens: int = 1
    failures_per_hour: float = 0.0
    restart_seconds: float = 30.0
    network: NetworkOptions = FAST_NETWORK
    scheduler: SchedulerOptions = QUIET
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SimResult:
    """What came of a scenario. Seconds are virtual, but for `real_seconds`.

    `first_token_seconds` are those of each answered request, from its submission; `work_seconds`
    what all workers computed, work that was lost included.
    """

    scenario: Scenario
    first_token_seconds: tuple[float, ...]
    seconds: float
    work_seconds: float
    moved_bytes: int
    busiest_link_seconds: float
    coordinator_busy_seconds: float
    events: int
    failures: int
    failed_requests: int
    retried_nodes: int
    real_seconds: float

    @property
    def first_token(self) -> float:
        """Median over the requests that were answered."""
        return statistics.median(self.first_token_seconds)


def make_plan(costs: Costs, prompt_tokens: int) -> MergePlan:
    """The plan of a request of `prompt_tokens` tokens for the model of `costs`."""
    config = HomerConfig(**costs.settings)
    context = prompt_tokens - PREFIX_TOKENS - SUFFIX_TOKENS
    layers = costs.shape.num_layers
    return MergePlan.build(PREFIX_TOKENS, context, SUFFIX_TOKENS, layers, config)


def simulate(costs: Costs, scenario: Scenario, plan: MergePlan | None = None) -> SimResult:
    """Run a scenario to the end of its last request; `plan` where it was made already."""
    started = time.perf_counter()
    plan = plan or make_plan(costs, scenario.prompt_tokens)
    return run_virtual(_Simulation(costs, scenario, plan).run(started))


class _Counts(Observer):
    def __init__(self) -> None:
        self.retried_nodes = 0

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        self.retried_nodes += 1


class _Simulation:
    def __init__(self, costs: Costs, scenario: Scenario, plan: MergePlan) -> None:
        self._scenario = scenario
        self._plan = plan
        self._pool = SimPool(costs, Network(scenario.network), costs.plan_seconds(plan))
        self._workers = [SimWorker(number, self._pool) for number in range(scenario.workers)]
        self._gone_seconds = 0.0
        self._counts = _Counts()
        self._failures = self._failed_requests = 0
        self._first_tokens: list[float] = []

    async def run(self, real_start: float) -> SimResult:
        scenario, pool = self._scenario, self._pool
        scheduler = Scheduler(self._workers, options=scenario.scheduler, observer=self._counts)
        dying = asyncio.create_task(self._let_die(scheduler))
        requests = iter(range(scenario.requests))

        async def client() -> None:
            for number in requests:
                await self._request(scheduler, number)

        await asyncio.gather(*(client() for _ in range(scenario.concurrent)))
        seconds = asyncio.get_running_loop().time()
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        await scheduler.close()
        return SimResult(
            scenario=scenario,
            first_token_seconds=tuple(self._first_tokens),
            seconds=seconds,
            work_seconds=self._gone_seconds + sum(w.busy_seconds for w in self._workers),
            moved_bytes=pool.network.moved_bytes,
            busiest_link_seconds=pool.network.busiest_seconds,
            coordinator_busy_seconds=pool.coordinator_busy_seconds,
            events=pool.events,
            failures=self._failures,
            failed_requests=self._failed_requests,
            retried_nodes=self._counts.retried_nodes,
            real_seconds=time.perf_counter() - real_start,
        )

    async def _request(self, scheduler: Scheduler, number: int) -> None:
        plan = self._plan
        job = Job(
            request_id=f"request-{number}",
            plan=plan,
            prefix_ids=range(plan.prefix_len),
            context_ids=range(plan.context_len),
            suffix_ids=range(plan.suffix_len),
            sampling=Sampling(max_new_tokens=self._scenario.new_tokens),
            report_seconds=REPORT_SECONDS_PER_WORKER * self._scenario.workers,
        )
        loop, first = asyncio.get_running_loop(), 0.0
        submitted = loop.time()
        # The coordinator plans before it schedules.
        await asyncio.sleep(self._pool.plan_seconds)
        try:
            async with aclosing(cast(Any, scheduler.run(job))) as events:
                async for event in events:
                    if isinstance(event, TokenOut):
                        first = first or loop.time()
        except (WorkerLostError, WorkerCallError, NoWorkersError):
            self._failed_requests += 1
        else:
            self._first_tokens.append(first - submitted)

    async def _let_die(self, scheduler: Scheduler) -> None:
        """Let workers die at random moments, and come back."""
        scenario, rng = self._scenario, random.Random(self._scenario.seed)
        if not scenario.failures_per_hour:
            return
        incarnations = [0] * scenario.workers
        alive = set(range(scenario.workers))

        async def come_back(number: int) -> None:
            await asyncio.sleep(scenario.restart_seconds)
            incarnations[number] += 1
            self._workers[number] = SimWorker(number, self._pool, incarnations[number])
            scheduler.add_worker(self._workers[number])
            alive.add(number)

        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(rng.expovariate(scenario.failures_per_hour / 3600))
                if not alive:
                    continue
                number = rng.choice(sorted(alive))
                alive.discard(number)
                worker = self._workers[number]
                self._failures += 1
                self._gone_seconds += worker.busy_seconds
                worker.busy_seconds = 0.0
                worker.die("its process ended")
                scheduler.lose_worker(worker.name, "its process ended")
                group.create_task(come_back(number))
