"""The scheduler against workers without models, in virtual time: undisturbed, it gives what one
process gives, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import Job, JobEvent, JobProgress, JobSummary, TokenOut, WorkerStats
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer.errors import PromptError
from tests.cluster.fakes import (
    FakeWorker,
    expected_kept,
    expected_survivors,
    expected_tokens,
    make_job,
    make_pool,
)
from tests.cluster.virtual_time import run_virtual
from workers.kept_runs import read_runs
from workers.logs import log_fields, logging_about


def events_of(scheduler: Scheduler, job: Job) -> aclosing[Any]:
    return aclosing(cast(Any, scheduler.run(job)))


async def collect(scheduler: Scheduler, job: Job) -> list[JobEvent]:
    async with events_of(scheduler, job) as events:
        return [event async for event in events]


def assert_right(job: Job, events: Sequence[JobEvent]) -> JobSummary:
    """An answer is complete, right, and told once."""
    summary = events[-1]
    assert isinstance(summary, JobSummary)
    assert list(summary.context_indices) == expected_survivors(job)
    assert summary.kept_tokens == job.plan.kept_len
    tokens = [event.token_id for event in events if isinstance(event, TokenOut)]
    assert tokens == expected_tokens(job)
    assert summary.generated_tokens == len(tokens)
    if job.with_evidence:
        told = {
            id: read_runs(done.kept_runs, job.plan.by_id[id].context_start)
            for id, (_, done) in summary.evidence.items()
        }
        assert {id: [*chain(*runs)] for id, runs in told.items()} == expected_kept(job)
    progress = [event for event in events if isinstance(event, JobProgress)]
    assert {event.done.node for event in progress} == {node.id for node in job.plan.nodes}
    assert len(progress) == len(job.plan.nodes) == sum(summary.nodes_by_worker.values())
    assert (progress[-1].leaves_done, progress[-1].merges_done) == (
        progress[-1].leaves_total,
        progress[-1].merges_total,
    )
    return summary


async def assert_nothing_left(scheduler: Scheduler, pool: Sequence[FakeWorker]) -> None:
    """After a moment, for what fakes hear late."""
    await scheduler.close()
    await asyncio.sleep(60)
    assert scheduler.running_jobs == scheduler.queued_jobs == 0
    for worker in pool:
        assert worker.dead.is_set() or worker.holds_nothing, (worker.name, worker.held)


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
        pool = make_pool(workers, seed, jitter=0.9)
        job = make_job(context_len, fan_in=fan_in)
        scheduler = Scheduler(pool, options=SchedulerOptions(pieces_per_worker=pieces))
        assert_right(job, await collect(scheduler, job))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_workers_of_equal_speed_merge_across_once() -> None:
    async def work() -> None:
        pool = make_pool(2)
        job = make_job(11 * 128)
        summary = assert_right(job, await collect(Scheduler(pool), job))
        # One child of the root moves, and nothing else.
        assert summary.moved_bytes in {
            job.plan.by_id[child].context_out for child in job.plan.root.children
        }
        assert max(summary.nodes_by_worker.values()) - min(summary.nodes_by_worker.values()) == 1

    run_virtual(work())


def test_jobs_at_once_do_not_disturb_each_other() -> None:
    async def work() -> None:
        pool = make_pool(3, seed=5, jitter=0.5)
        scheduler = Scheduler(pool)
        jobs = [make_job(100 * number + 7, request_id=f"r{number}") for number in range(9)]
        results = await asyncio.gather(*(collect(scheduler, job) for job in jobs))
        for job, events in zip(jobs, results, strict=True):
            assert_right(job, events)
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_worker_runs_one_part_of_each_of_a_few_requests() -> None:
    async def work() -> None:
        pool = make_pool(2)
        scheduler = Scheduler(pool, options=SchedulerOptions(requests_per_worker=3))
        jobs = [make_job(800, request_id=f"r{number}") for number in range(6)]
        running = asyncio.gather(*(collect(scheduler, job) for job in jobs))
        most = 0
        while not running.done():
            for worker in pool:
                assert all(calls <= 1 for calls in worker.in_call.values())
                busy = sum(worker.in_call.values())
                most = max(most, busy)
                assert busy <= 3
            await asyncio.sleep(0.1)
        assert most == 3
        running.result()

    run_virtual(work())


@pytest.mark.parametrize("after", [0, 1, 5, 20, 60, 75])
def test_closing_early_releases_everything(after: int) -> None:
    async def work() -> None:
        pool = make_pool(3)
        scheduler = Scheduler(pool)
        async with events_of(scheduler, make_job(400)) as events:
            for _ in range(after):
                await anext(events)
        # The pool is free for the next one.
        job = make_job(400, request_id="s")
        assert_right(job, await collect(scheduler, job))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_an_answer_that_is_stopped_is_decoded_no_further_and_not_begun_again() -> None:
    async def run() -> None:
        pool = make_pool(2)
        scheduler = Scheduler(pool)
        job = replace(make_job(200), answers=2)
        told: list[list[int]] = [[], []]
        async with events_of(scheduler, job) as events:
            async for event in events:
                if isinstance(event, TokenOut):
                    told[event.answer].append(event.token_id)
                if isinstance(event, TokenOut) and list(map(len, told)) == [3, 3]:
                    scheduler.stop_answer(job.request_id, 1)
                if isinstance(event, TokenOut) and len(told[0]) == 10 and len(told[1]) < 10:
                    (answering,) = (worker for worker in pool if worker.decoding)
                    answering.kill()
        assert isinstance(event, JobSummary)
        assert event.finish_reasons == ["length", "stop"]
        expected = expected_tokens(job)
        assert told[0] == expected
        assert told[1] == expected[: len(told[1])]
        first, second = sorted(worker.decoded for worker in pool)
        assert first == 10 + len(told[1]) < 16
        # The other worker goes on with the one answer, whose beginning it decodes again.
        assert second == job.sampling.max_new_tokens
        await assert_nothing_left(scheduler, pool)

    run_virtual(run())


def test_cancelling_a_waiting_task_releases_everything() -> None:
    async def work() -> None:
        pool = make_pool(2)
        scheduler = Scheduler(pool)
        task = asyncio.create_task(collect(scheduler, make_job(400)))
        await asyncio.sleep(2)
        task.cancel()
        await asyncio.sleep(0)
        # A second cancel while the first is cleaned up must not leave anything behind.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_part_that_fails_on_one_worker_runs_on_another() -> None:
    async def work() -> None:
        pool = make_pool(2)
        pool[0].fail["subtree"] = [WorkerCallError("broken")]
        pool[1].fail["merge"] = [WorkerCallError("broken", "DATA_LOSS")]
        job = make_job(400)
        scheduler = Scheduler(pool)
        assert_right(job, await collect(scheduler, job))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


@pytest.mark.parametrize("error", [WorkerLostError("gone"), WorkerCallError("broken")])
@pytest.mark.parametrize("call", ["subtree", "merge", "generate"])
def test_what_no_worker_can_run_is_an_error(error: Exception, call: str) -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.fail[call] = [error] * 99
        scheduler = Scheduler(pool)
        # They are alive, so it is the call that fails.
        with pytest.raises(type(error), match=str(error)):
            await collect(scheduler, make_job(400))
        assert len(scheduler.workers) == 2
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


@pytest.mark.parametrize("call", ["subtree", "merge", "generate"])
def test_a_mistake_in_the_request_is_not_tried_again(call: str) -> None:
    async def work() -> None:
        pool = make_pool(2)
        for worker in pool:
            worker.fail[call] = [PromptError("token 99 is not in the vocabulary")] * 9
        scheduler = Scheduler(pool)
        with pytest.raises(PromptError, match="token 99"):
            await collect(scheduler, make_job(400))
        assert all(len(worker.fail[call]) >= 8 for worker in pool)
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_a_release_that_fails_does_not_keep_the_others_from_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        pool = make_pool(3)

        async def broken(request_id: str) -> None:
            raise WorkerLostError("gone")

        pool[1].release = broken  # type: ignore[method-assign]
        scheduler = Scheduler(pool)
        await collect(scheduler, make_job(100))
        await assert_nothing_left(scheduler, [pool[0], pool[2]])

    run_virtual(work())
    assert "not released on worker-1" in caplog.text


def test_what_does_not_fit_the_rest_when_it_is_run_again_has_everything_run_again() -> None:
    """Workers of another kind come to other results: rows that others still hold do not match."""

    async def work() -> None:
        pool, job = make_pool(2), make_job(300)
        other = make_pool(1)
        other[0].salt = "another kind"
        *_, expected = await collect(Scheduler(other), job)
        assert isinstance(expected, JobSummary)

        scheduler = Scheduler(pool)
        answer: list[JobEvent] = []
        async with events_of(scheduler, job) as events:
            async for event in events:
                answer.append(event)
                if isinstance(event, JobProgress) and event.done.node == job.plan.root.id:
                    root = next(worker for worker in pool if worker.name == event.worker)
                    (lost,) = (worker for worker in pool if worker is not root)
                    # What it had made is run again on a worker that computes something else.
                    root.salt = "another kind"
                    lost.kill()
        assert root.salt
        assert not any(worker is lost for worker in scheduler.workers)
        summary = answer[-1]
        assert isinstance(summary, JobSummary)
        assert list(summary.context_indices) == list(expected.context_indices)
        tokens = [event.token_id for event in answer if isinstance(event, TokenOut)]
        assert len(tokens) == summary.generated_tokens == job.sampling.max_new_tokens
        # Under a new request id every node is run once more, all of them by the one that is left.
        second = [(call, node) for call, of, node in root.calls if of != job.request_id]
        leaves = {
            part.id
            for call, node in second
            for part in job.plan.subtree(node)
            if call == "subtree" and part.is_leaf
        }
        assert leaves == {leaf.id for leaf in job.plan.leaves}
        assert [call for call, _ in second].count("generate") == 1
        # Its caller hears of each node once.
        progress = [event.done.node for event in answer if isinstance(event, JobProgress)]
        assert sorted(progress) == sorted(node.id for node in job.plan.nodes)
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


def test_workers_that_never_agree_are_an_error() -> None:
    async def work() -> None:
        pool = make_pool(1)
        mismatch = WorkerCallError("rows do not match", "FAILED_PRECONDITION")
        pool[0].fail["generate"] = [mismatch, mismatch]
        scheduler = Scheduler(pool)
        with pytest.raises(WorkerCallError, match="use equal devices and libraries"):
            await collect(scheduler, make_job(100))
        await assert_nothing_left(scheduler, pool)

    run_virtual(work())


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

    run_virtual(work())


def test_pings_that_a_request_gives_cause_to_are_not_logged_as_its_own() -> None:
    async def work() -> None:
        pool = make_pool(1)
        about: list[Mapping[str, str]] = []
        stats = pool[0].stats

        async def noted() -> WorkerStats:
            about.append(log_fields())
            return await stats()

        pool[0].stats = noted  # type: ignore[method-assign]
        pool[0].fail["subtree"] = [WorkerLostError("the connection broke")]
        with logging_about(request_id="r"):
            scheduler = Scheduler(pool, options=SchedulerOptions(heartbeat_seconds=0))
            await collect(scheduler, make_job(100))
        await scheduler.close()
        assert about == [{}]

    run_virtual(work())
