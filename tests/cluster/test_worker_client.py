"""What the scheduler asks of a worker arrives there: calls of recovery over real gRPC."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import Any

import pytest

from cluster.errors import WorkerLostError
from cluster.job import GenerateDone, Job, Sampling, TokenOut
from tests.cluster.conftest import Run, connected
from tests.cluster.test_distributed import job_of, refreshed
from tests.golden_cases import GoldenCase
from tests.workers.processes import running_workers


async def tokens_of(client: Any, job: Job, attempt: int, resume: list[int]) -> list[int]:
    out: list[int] = []
    async for event in client.generate(job, attempt, [], [resume]):
        match event:
            case TokenOut():
                out.append(event.token_id)
            case GenerateDone():
                assert event.generated_tokens == len(resume) + len(out)
    return out


async def nodes_of(client: Any, job: Job) -> list[Any]:
    return [done.node async for done in client.run_subtree(job, job.plan.root.id, 0)]


def test_an_answer_goes_on_and_a_dropped_node_is_forgotten(run: Run[Any]) -> None:
    case = GoldenCase.load("a_4c_full")
    job = job_of(case, refreshed(case))
    root = job.plan.root.id

    async def check(address: str) -> None:
        async with connected([address]) as (client,):
            assert (await nodes_of(client, job))[-1] == root
            whole = await tokens_of(client, job, 0, [])
            assert len(whole) == job.sampling.max_new_tokens
            assert await tokens_of(client, job, 1, whole[:5]) == whole[5:]
            assert (await client.stats()).node_states == 1
            await client.drop(job.request_id, root, 0)
            assert (await client.stats()).node_states == 0
            await client.reset()
            assert (await client.stats()).requests == 0

    assert job.sampling == Sampling(max_new_tokens=17)
    with running_workers(case.model_dir) as (worker,):
        run(check(worker.address))


def test_a_call_that_is_under_way_when_its_client_is_closed_means_a_lost_worker(
    run: Run[Any],
) -> None:
    case = GoldenCase.load("a_4c_full")
    job = job_of(case, refreshed(case))

    async def check(address: str) -> None:
        async with connected([address]) as (client,):
            await client.info()
            process.send_signal(signal.SIGSTOP)
            released = asyncio.create_task(client.release(job.request_id))
            ran = asyncio.create_task(nodes_of(client, job))
            cancelled = asyncio.create_task(client.release(job.request_id))
            # A stopped worker answers none of them.
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(released), 0.2)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await client.close()
            for call in (released, ran):
                with pytest.raises(WorkerLostError, match="was closed"):
                    await asyncio.wait_for(call, 10)

    with running_workers(case.model_dir) as (worker,):
        process = worker.process
        try:
            run(check(worker.address))
        finally:
            process.send_signal(signal.SIGCONT)
