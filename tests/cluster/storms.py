"""Seeded bad weather for the scheduler: workers die, hang, slow down, are cut off, lack memory."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from cluster.errors import WorkerCallError
from cluster.job import Job, JobEvent
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from tests.cluster.fakes import FakeWorker, make_job, make_pool
from tests.cluster.test_scheduler import assert_nothing_left, assert_right, collect

OPTIONS = SchedulerOptions(
    pieces_per_worker=4,
    heartbeat_seconds=1.0,
    heartbeat_timeout_seconds=1.0,
    heartbeat_misses=2,
    stall_timeout_seconds=40.0,
    slow_factor=2.0,
    max_faults=50,
    max_losses=50,
)
FAULTS = ("kill", "stop", "pause", "slow", "cut", "fail", "refuse", "drain", "lose")


class Storm:
    """Faults on a pool whose lost workers are replaced, as a service would do it."""

    def __init__(self, seed: int, faults: int) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.done: Counter[str] = Counter()
        count = self.rng.randint(1, 5)
        speeds = [self.rng.choice([0.5, 1, 1, 2]) for _ in range(count)]
        self.pool = make_pool(count, seed, jitter=0.5, speeds=speeds)
        self.scheduler = Scheduler(self.pool, options=OPTIONS)
        self.scheduler.on_worker_lost = self._replace
        self._incarnation = 0
        self._drains: list[asyncio.Future[bool]] = []

    def jobs(self) -> list[Job]:
        return [
            make_job(
                self.rng.choice([5, 60, 300, 900]),
                request_id=f"r{number}",
                fan_in=self.rng.choice([None, 2, 4]),
                new_tokens=self.rng.choice([1, 8, 40]),
                priority=self.rng.choice([0, 0, 1]),
                with_evidence=True,
            )
            for number in range(self.rng.randint(1, 4))
        ]

    async def run(self) -> Counter[str]:
        """Run everything; every job that was not cancelled has to be right."""
        jobs = self.jobs()
        tasks = [asyncio.create_task(self._ask(job)) for job in jobs]
        weather = asyncio.create_task(self._weather(tasks))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        weather.cancel()
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                self.done["cancelled"] += 1
            elif isinstance(result, BaseException):
                raise result
            else:
                assert_right(job, result)
                self.done["answered"] += 1
        for worker in self.pool:
            worker.go_on()
            if worker.name not in {client.name for client in self.scheduler.workers}:
                worker.kill()
        await assert_nothing_left(self.scheduler, self.pool)
        return self.done

    async def _ask(self, job: Job) -> list[JobEvent]:
        await asyncio.sleep(self.rng.uniform(0, 5))
        return list(await collect(self.scheduler, job))

    async def _weather(self, tasks: list[asyncio.Task[list[JobEvent]]]) -> None:
        for _ in range(self.faults):
            await asyncio.sleep(self.rng.expovariate(1 / 4))
            if self.rng.random() < 0.05:
                self.rng.choice(tasks).cancel()
            alive = [worker for worker in self.pool if not worker.dead.is_set()]
            if alive:
                fault = self.rng.choice(FAULTS)
                self.done[fault] += 1
                self._strike(fault, self.rng.choice(alive), alive)

    def _strike(self, fault: str, worker: FakeWorker, alive: list[FakeWorker]) -> None:
        rng, loop = self.rng, asyncio.get_running_loop()
        match fault:
            case "kill":
                worker.kill()
            case "stop":
                worker.stop()
            case "pause":
                worker.stop()
                loop.call_later(rng.uniform(0, 10), worker.go_on)
            case "slow":
                before, worker.speed = worker.speed, worker.speed / 20
                loop.call_later(rng.uniform(1, 20), setattr, worker, "speed", before)
            case "cut":
                other = rng.choice(alive)
                worker.cut_off_from.add(other.address)
                other.cut_off_from.add(worker.address)
                loop.call_later(rng.uniform(1, 30), worker.cut_off_from.clear)
                loop.call_later(rng.uniform(1, 30), other.cut_off_from.clear)
            case "fail":
                call = rng.choice(["subtree", "merge", "generate", "prune"])
                code = rng.choice(["INTERNAL", "DATA_LOSS", "ABORTED"])
                worker.fail.setdefault(call, []).append(WorkerCallError("injected", code))
            case "refuse":
                worker.budget_rows = rng.choice([0, 100, 1000])
                loop.call_later(rng.uniform(1, 5), setattr, worker, "budget_rows", None)
            case "drain":
                if len(self.scheduler.workers) > 1:
                    drain = self.scheduler.drain_worker(worker.name, 500)
                    self._drains.append(asyncio.ensure_future(drain))
            case "lose":
                self.scheduler.lose_worker(worker.name, "the pool says so")

    def _replace(self, name: str, reason: str) -> None:
        """Make sure that it is dead, some time later, and start another in its place."""
        loop = asyncio.get_running_loop()
        gone = next(worker for worker in self.pool if worker.name == name)
        loop.call_later(self.rng.uniform(0, 20), gone.kill)
        loop.call_later(self.rng.uniform(0, 10), self._join)

    def _join(self) -> None:
        self._incarnation += 1
        pool = self.pool[0].pool
        fresh = FakeWorker(f"worker-r.{self._incarnation}", pool, self.rng, 0.5)
        self.pool.append(fresh)
        self.scheduler.add_worker(fresh)
