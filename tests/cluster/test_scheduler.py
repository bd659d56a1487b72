"""The scheduler against workers without models."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import Job, JobEvent, JobProgress, JobSummary, TokenOut
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer.errors import PromptError
from tests.cluster.fakes import FakeWorker, make_job, make_pool, survivors

TIMEOUT_SECONDS = 60


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work`; a deadlock is a failure, not a hang."""
    asyncio.run(asyncio.wait_for(work(), TIMEOUT_SECONDS))


def events_of(scheduler: Scheduler, job: Job) -> aclosing[Any]:
    return aclosing(cast(Any, scheduler.run(job)))


async def collect(scheduler: Scheduler, job: Job) -> list[JobEvent]:
    async with events_of(scheduler, job) as events:
        return [event async for event in events]


def expected_survivors(job: Job) -> list[int]:
    """What is left at the root of one process, with the fakes' way of pruning."""
    done: dict[Any, list[int]] = {}
    for node in job.plan.nodes:
        rows = (
            list(range(node.context_start, node.context_end))
            if node.is_leaf
            else [row for child in node.children for row in done[child]]
        )
        done[node.id] = survivors(node, rows)
    return done[job.plan.root.id]


def assert_released(pool: list[FakeWorker], *request_ids: str) -> None:
    for worker in pool:
        assert worker.held == {}
        assert worker.released >= set(request_ids)
        assert worker.in_call == 0


@given(
    context_len=st.integers(1, 1500),
    workers=st.integers(1, 6),
    pieces=st.integers(1, 9),
    fan_in=st.sampled_from([None, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_any_pool_gives_what_one_process_gives(
    context_len: int, workers: int, pieces: int, fan_in: int | None, seed: int
) -> None:
    async def work() -> None:
        pool = make_pool(workers, seed)
        job = make_job(context_len, fan_in=fan_in)
        events = await collect(
            Scheduler(pool, options=SchedulerOptions(pieces_per_worker=pieces)), job
        )
        summary = events[-1]
        assert isinstance(summary, JobSummary)
        assert list(summary.context_indices) == expected_survivors(job)
        assert summary.kept_tokens == job.plan.kept_len
        progress = [event for event in events if isinstance(event, JobProgress)]
        assert {event.done.node for event in progress} == {node.id for node in job.plan.nodes}
        assert len(progress) == len(job.plan.nodes) == sum(summary.nodes_by_worker.values())
        assert (progress[-1].leaves_done, progress[-1].merges_done) == (
            progress[-1].leaves_total,
            progress[-1].merges_total,
        )
        tokens = [event.token_id for event in events if isinstance(event, TokenOut)]
        assert tokens == list(range(job.sampling.max_new_tokens))
        assert_released(pool, "r")

    run(work)


def test_workers_of_equal_speed_merge_across_once() -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.rng = _Constant()
        job = make_job(11 * 128)
        events = await collect(Scheduler(pool, options=SchedulerOptions(pieces_per_worker=8)), job)
        summary = events[-1]
        assert isinstance(summary, JobSummary)
        # One child of the root moves, and nothing else.
        assert summary.moved_bytes in {
            job.plan.by_id[child].context_out for child in job.plan.root.children
        }
        assert max(summary.nodes_by_worker.values()) - min(summary.nodes_by_worker.values()) == 1

    run(work)


class _Constant(random.Random):
    def randrange(self, *_: Any) -> int:
        return 2


def test_jobs_at_once_do_not_disturb_each_other() -> None:
    async def work() -> None:
        pool = make_pool(3, seed=5)
        scheduler = Scheduler(pool)
        jobs = [make_job(100 * number + 7, request_id=f"r{number}") for number in range(6)]
        results = await asyncio.gather(*(collect(scheduler, job) for job in jobs))
        for job, events in zip(jobs, results, strict=True):
            summary = events[-1]
            assert isinstance(summary, JobSummary)
            assert list(summary.context_indices) == expected_survivors(job)
        assert_released(pool, *(job.request_id for job in jobs))
        assert scheduler.running_jobs == scheduler.queued_jobs == 0

    run(work)


@pytest.mark.parametrize("after", [0, 1, 5, 20, 60, 75])
def test_closing_early_releases_everything(after: int) -> None:
    async def work() -> None:
        pool = make_pool(3)
        scheduler = Scheduler(pool)
        async with events_of(scheduler, make_job(400)) as events:
            for _ in range(after):
                await anext(events)
        assert_released(pool, *(["r"] if after else []))
        # The pool is free for the next one.
        assert isinstance((await collect(scheduler, make_job(400, request_id="s")))[-1], JobSummary)

    run(work)


def test_cancelling_a_waiting_task_releases_everything() -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.stall.clear()
        scheduler = Scheduler(pool)
        task = asyncio.create_task(collect(scheduler, make_job(400)))
        while not all(worker.in_call for worker in pool):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        # A second cancel while the first is cleaned up must not leave anything behind.
        task.cancel()
        for worker in pool:
            worker.stall.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await scheduler.drain()
        assert_released(pool, "r")

    run(work)


def test_a_subtree_whose_worker_fails_runs_on_another() -> None:
    async def work() -> None:
        pool = make_pool(2)
        pool[0].fail_subtrees = [WorkerLostError("gone")]
        job = make_job(400)
        summary = (await collect(Scheduler(pool), job))[-1]
        assert isinstance(summary, JobSummary)
        assert list(summary.context_indices) == expected_survivors(job)
        assert [call for call, _ in pool[0].calls if call == "subtree"] == ["subtree"]
        assert_released(pool, "r")

    run(work)


@pytest.mark.parametrize("error", [WorkerLostError("gone"), WorkerCallError("broken")])
def test_a_subtree_that_no_worker_can_run_is_an_error(error: Exception) -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.fail_subtrees = [error] * 9
        with pytest.raises(type(error), match=str(error)):
            await collect(Scheduler(pool), make_job(400))
        assert_released(pool, "r")

    run(work)


def test_a_mistake_in_the_request_is_not_tried_again() -> None:
    async def work() -> None:
        pool = make_pool(2)
        pool[0].fail_subtrees = [PromptError("token 99 is not in the vocabulary")]
        with pytest.raises(PromptError, match="token 99"):
            await collect(Scheduler(pool), make_job(400))
        assert_released(pool, "r")

    run(work)


def test_losing_a_worker_with_finished_parts_is_an_error() -> None:
    async def work() -> None:
        pool = make_pool(2)
        scheduler = Scheduler(pool)

        async def fail_later() -> AsyncIterator[None]:
            async with events_of(scheduler, make_job(400)) as events:
                async for _ in events:
                    if any(held.states for held in pool[1].held.values()):
                        pool[1].fail_subtrees = [WorkerLostError("worker-1 is gone")]
                    yield

        with pytest.raises(WorkerLostError, match="worker-1 is gone"):
            async for _ in fail_later():
                pass
        await scheduler.drain()
        assert_released(pool, "r")

    run(work)


def test_a_release_that_fails_does_not_keep_the_others_from_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        pool = make_pool(3)

        async def broken(request_id: str) -> None:
            raise WorkerLostError("gone")

        pool[1].release = broken  # type: ignore[method-assign]
        await collect(Scheduler(pool), make_job(100))
        assert_released([pool[0], pool[2]], "r")

    run(work)
    assert "not released on worker-1" in caplog.text


def test_two_running_jobs_cannot_share_a_request_id() -> None:
    async def work() -> None:
        pool = make_pool(1)
        scheduler = Scheduler(pool)
        async with events_of(scheduler, make_job(400)) as events:
            await anext(events)
            with pytest.raises(PromptError, match="in use by a running request"):
                await collect(scheduler, make_job(100))
            # The first one is not disturbed.
            assert isinstance([event async for event in events][-1], JobSummary)

    run(work)
