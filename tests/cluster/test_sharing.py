"""Many requests on one pool, in virtual time: fair, admitted within bounds, ending together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from cluster.door_errors import error_metadata, wire_code
from cluster.errors import CapacityError, NoWorkersError, OverloadedError, WorkerLostError
from cluster.job import Job, JobEvent, Sampling, WorkerInfo
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from cluster.service import Accepted, Limits, LongContextService, Request
from cluster.text import PromptIds
from homer import HomerConfig
from homer.errors import PromptError
from tests.cluster.fakes import FakeWorker, make_job, make_pool
from tests.cluster.test_scheduler import (
    assert_nothing_left,
    assert_right,
    collect,
    events_of,
)
from tests.cluster.virtual_time import run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


async def timed(scheduler: Scheduler, job: Job) -> float:
    """Seconds from submission to the answer's end."""
    started = now()
    assert_right(job, await collect(scheduler, job))
    return now() - started


def with_memory(pool: Sequence[FakeWorker], budget_bytes: int) -> None:
    """Let workers say that they have a budget, at 12 bytes of KV a token (one each layer)."""

    for worker in pool:
        told = worker.info

        async def info(told=told) -> WorkerInfo:  # type: ignore[no-untyped-def]
            return replace(await told(), kv_bytes_per_token=12, memory_budget_bytes=budget_bytes)

        worker.info = info  # type: ignore[method-assign]


def test_a_short_request_is_not_held_up_by_long_documents() -> None:
    async def work() -> None:
        alone = await timed(Scheduler(make_pool(2)), make_job(40))
        scheduler = Scheduler(make_pool(2))
        long = [make_job(11 * 400, request_id=f"long{number}") for number in range(6)]
        running = [asyncio.create_task(collect(scheduler, job)) for job in long]
        await asyncio.sleep(50)
        beside = await timed(scheduler, make_job(40, request_id="short"))
        assert not any(task.done() for task in running)
        # Four requests share a worker, and one leaf of another may have to end first.
        assert beside < 10 * alone
        await asyncio.gather(*running)

    run_virtual(work())


def test_equal_requests_end_together() -> None:
    async def work() -> None:
        scheduler = Scheduler(make_pool(2))
        jobs = [make_job(11 * 64, request_id=f"r{number}") for number in range(3)]
        seconds = await asyncio.gather(*(timed(scheduler, job) for job in jobs))
        assert max(seconds) < 1.2 * min(seconds)

    run_virtual(work())


def test_a_higher_priority_gets_a_larger_share() -> None:
    async def work() -> None:
        scheduler = Scheduler(make_pool(4), options=SchedulerOptions(aging_seconds=1e9))
        jobs = [make_job(11 * 64, request_id=f"r{n}", priority=3 * (n == 11)) for n in range(12)]
        seconds = await asyncio.gather(*(timed(scheduler, job) for job in jobs))
        assert seconds[11] == min(seconds)
        assert seconds[11] < 0.7 * max(seconds)

    run_virtual(work())


@pytest.mark.parametrize("speeds", [(1, 3), (1, 1), (1, 2, 5), (1, 1, 1, 10)])
def test_workers_of_unequal_speed_finish_together(speeds: tuple[float, ...]) -> None:
    async def work() -> None:
        pool = make_pool(len(speeds), speeds=speeds)
        job = make_job(11 * 256, new_tokens=1)
        scheduler = Scheduler(pool)
        events: list[JobEvent] = await collect(scheduler, job)
        summary = assert_right(job, events)
        total = sum(worker.busy_seconds * worker.speed for worker in pool)
        ideal = total / sum(speeds)
        # Beside the pieces there is the path to the root, one merge after the other.
        assert summary.seconds.leaves <= 1.10 * ideal

    run_virtual(work())


def test_roots_spread_over_the_pool() -> None:
    async def work() -> None:
        pool = make_pool(4)
        scheduler = Scheduler(pool)
        jobs = [make_job(11 * 16, request_id=f"r{n}", new_tokens=400) for n in range(8)]
        running = asyncio.gather(*(collect(scheduler, job) for job in jobs))
        most: list[int] = []
        while not running.done():
            await asyncio.sleep(1)
            if sum(worker.decoding for worker in pool) == 8:
                most.append(max(worker.decoding for worker in pool))
        assert most
        assert most[0] <= 3
        running.result()

    run_virtual(work())


def test_what_is_over_the_queue_is_refused_at_once() -> None:
    async def work() -> None:
        pool = make_pool(1)
        options = SchedulerOptions(requests_per_worker=1, max_queued_requests=2)
        scheduler = Scheduler(pool, options=options)
        jobs = [make_job(200, request_id=f"r{number}") for number in range(3)]
        running = [asyncio.create_task(collect(scheduler, job)) for job in jobs]
        await asyncio.sleep(5)
        load = scheduler.load
        assert (load.running_jobs, load.queued_jobs) == (1, 2)
        assert load.queued_tokens == 2 * jobs[0].plan.prompt_len
        at = now()
        with pytest.raises(OverloadedError, match="wait already") as refused:
            await collect(scheduler, make_job(200, request_id="r3"))
        assert now() - at < 1
        assert refused.value.retry_after_seconds >= 1
        # The other three are not disturbed.
        for job, task in zip(jobs, running, strict=True):
            assert_right(job, await task)
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_the_queue_is_bounded_in_tokens_too() -> None:
    async def work() -> None:
        options = SchedulerOptions(requests_per_worker=1, max_queued_tokens=500)
        scheduler = Scheduler(make_pool(1), options=options)
        running = [
            asyncio.create_task(collect(scheduler, make_job(300, request_id=f"r{number}")))
            for number in range(2)
        ]
        await asyncio.sleep(1)
        with pytest.raises(OverloadedError):
            await collect(scheduler, make_job(300, request_id="r2"))
        await asyncio.gather(*running)

    run_virtual(work())


def test_requests_wait_until_their_memory_fits_beside_the_others() -> None:
    async def work() -> None:
        pool = make_pool(2)
        # Enough for two of them.
        with_memory(pool, 800)
        scheduler = Scheduler(pool)
        await asyncio.sleep(1)
        jobs = [make_job(200, request_id=f"r{number}") for number in range(5)]
        running = asyncio.gather(*(collect(scheduler, job) for job in jobs))
        most = 0
        while not running.done():
            await asyncio.sleep(0.5)
            most = max(most, sum(1 for job in jobs if any(job.request_id in w.held for w in pool)))
        assert 1 <= most <= 3
        for job, events in zip(jobs, await running, strict=True):
            assert_right(job, events)

    run_virtual(work())


def test_a_request_that_can_never_fit_is_told_so() -> None:
    async def work() -> None:
        pool = make_pool(2)
        with_memory(pool, 500)
        scheduler = Scheduler(pool)
        await asyncio.sleep(1)
        with pytest.raises(CapacityError, match="--memory-budget"):
            await collect(scheduler, make_job(4000))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_request_that_needs_a_larger_pool_waits_for_it_to_grow() -> None:
    async def work() -> None:
        pool = make_pool(3)
        with_memory(pool, 425)
        scheduler = Scheduler(pool[:1], options=SchedulerOptions(grow_timeout_seconds=100))
        scheduler.expect_workers(3)
        await asyncio.sleep(1)
        job = make_job(1000, request_id="large")
        running = asyncio.create_task(collect(scheduler, job))
        # Small ones go past it.
        small = make_job(5, request_id="small")
        assert_right(small, await collect(scheduler, small))
        assert (scheduler.load.growing_jobs, scheduler.running_jobs) == (1, 0)
        # Each that joins is worth another wait.
        for number in (1, 2):
            await asyncio.sleep(90)
            assert not running.done()
            assert scheduler.load.growing_jobs == 1
            scheduler.add_worker(pool[number])
        assert_right(job, await running)
        assert scheduler.load.growing_jobs == 0
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


@pytest.mark.parametrize(("length", "waits"), [(1000, 100), (4000, 0)])
def test_a_request_is_refused_that_no_pool_comes_for(length: int, waits: int) -> None:
    """After the time in which it should grow; at once, where even the largest is too small."""

    async def work() -> None:
        pool = make_pool(1)
        with_memory(pool, 425)
        scheduler = Scheduler(pool, options=SchedulerOptions(grow_timeout_seconds=100))
        scheduler.expect_workers(3)
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        with pytest.raises(CapacityError, match="--memory-budget"):
            await collect(scheduler, make_job(length))
        assert waits <= asyncio.get_running_loop().time() - began < waits + 10
        assert scheduler.load.growing_jobs == 0
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


@pytest.mark.parametrize("rows", [900, 1400])
def test_workers_that_refuse_are_asked_again_later(rows: int) -> None:
    """Each of two requests fits alone; side by side they would take each other's memory."""

    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.budget_rows = rows
        scheduler = Scheduler(pool)
        jobs = [make_job(350, request_id=f"r{number}") for number in range(3)]
        results = await asyncio.gather(*(collect(scheduler, job) for job in jobs))
        for job, events in zip(jobs, results, strict=True):
            assert_right(job, events)
        assert all(worker.largest_held <= rows for worker in pool)
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_part_that_no_worker_has_the_memory_for_is_an_error() -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.budget_rows = 10
        scheduler = Scheduler(pool)
        with pytest.raises(CapacityError, match="--memory-budget"):
            await collect(scheduler, make_job(350))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_without_workers_requests_wait_for_one_to_join() -> None:
    async def work() -> None:
        scheduler = Scheduler(options=SchedulerOptions(no_worker_timeout_seconds=30))
        job = make_job(100)
        running = asyncio.create_task(collect(scheduler, job))
        await asyncio.sleep(20)
        (worker,) = make_pool(1)
        scheduler.add_worker(worker)
        assert_right(job, await running)
        scheduler.lose_worker(worker.name, "test")
        with pytest.raises(NoWorkersError) as failed:
            await collect(scheduler, make_job(100, request_id="s"))
        assert failed.value.retry_after_seconds > 0

    run_virtual(work())


def test_a_worker_that_drains_gets_nothing_new_and_leaves_when_empty() -> None:
    async def work() -> None:
        pool = make_pool(2)
        scheduler = Scheduler(pool)
        job = make_job(800)
        async with events_of(scheduler, job) as events:
            for _ in range(20):
                await anext(events)
            assert not await scheduler.drain_worker("worker-1", 3)
            calls = len(pool[1].calls)
            assert [client.name for client in scheduler.workers] == ["worker-0"]
            rest = [event async for event in events]
        new = [call for call, _, _ in pool[1].calls[calls:]]
        assert not {"subtree", "merge", "generate"} & set(new)
        assert rest
        assert await scheduler.drain_worker("worker-1", 3)
        assert scheduler.load.draining_workers == ()
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_request_of_the_service_gets_a_priority_and_a_seed() -> None:
    info = run_virtual(make_pool(1)[0].info())
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=1)

    async def job_of(request: Request) -> Job:
        service = LongContextService(Scheduler(), info, config, None, Limits())
        accepted = await anext(service.generate(request))
        assert isinstance(accepted, Accepted)
        return accepted.job

    prompt = PromptIds([1], list(range(100)), [2, 3])
    sampled = Request(prompt=prompt, priority=3, sampling=Sampling(temperature=0.7))
    first, second = asyncio.run(job_of(sampled)), asyncio.run(job_of(sampled))
    assert first.priority == 3
    # One that stays with the request, so that a replay draws the same tokens.
    assert first.sampling.seed is not None
    assert first.sampling.seed != second.sampling.seed
    assert asyncio.run(job_of(Request(prompt=prompt))).sampling.seed is None
    with pytest.raises(PromptError, match="priority"):
        asyncio.run(job_of(Request(prompt=prompt, priority=99)))


def test_a_refusal_says_when_to_come_back() -> None:
    overloaded = OverloadedError("full", 12.5)
    assert wire_code(overloaded) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_metadata(overloaded)[1:] == (
        ("retry-after", "12.5"),
        ("grpc-retry-pushback-ms", "12500"),
    )
    for lost in (NoWorkersError("none", 60.0), WorkerLostError("gone")):
        assert wire_code(lost) is grpc.StatusCode.UNAVAILABLE
        assert dict(error_metadata(lost))["retry-after"]
    # Trying again would not help.
    assert "retry-after" not in dict(error_metadata(CapacityError("too large")))
    assert wire_code(CapacityError("too large")) is grpc.StatusCode.FAILED_PRECONDITION
