"""Workers with the lowest layers run what needs no more, others the rest; answers are equal."""

from __future__ import annotations

import uuid
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from cluster.client import HomerClient
from cluster.errors import NoWorkersError
from cluster.job import Job, JobProgress, JobSummary, Sampling, TokenOut
from cluster.launch import LOOPBACK, running_service
from cluster.options import ServeOptions
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer import HomerConfig, HomerModel, MergePlan
from homer.v1 import long_context_pb2 as pb
from homer.v1 import worker_pb2
from tests.cluster.conftest import WORKER_TOKEN, Run, connected, worker_stub
from tests.cluster.fakes import FakeWorker, expected_tokens, make_job, make_pool
from tests.cluster.test_scheduler import assert_nothing_left
from tests.cluster.test_service import CONTEXT, QUESTION
from tests.cluster.virtual_time import run_virtual
from tests.homer.families.zoo import VOCAB, model_dir
from tests.workers.processes import Prompt, WorkerProcess, release

CONFIG = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
NEW_TOKENS = 9
CONTEXT_TOKENS = 700


async def tokens_of(scheduler: Scheduler, job: Job, pool: list[FakeWorker]) -> list[int]:
    async with aclosing(cast(Any, scheduler.run(job))) as events:
        tokens = [event.token_id async for event in events if isinstance(event, TokenOut)]
    await assert_nothing_left(scheduler, pool)
    return tokens


def leaf_layers(job: Job) -> int:
    return job.plan.leaves[0].layer_end


@pytest.mark.parametrize("seed", range(3))
def test_leaf_workers_run_leaves_and_full_ones_the_rest(seed: int) -> None:
    async def scenario() -> None:
        full, *leaves = pool = make_pool(3, seed)
        job = make_job(200)
        scheduler = Scheduler([full])
        for worker in leaves:
            scheduler.add_worker(worker, leaf_layers(job))
        assert await tokens_of(scheduler, job, pool) == expected_tokens(job)
        for worker in leaves:
            ran = [(kind, node.height) for kind, _, node in worker.calls]
            assert ("subtree", 0) in ran
            assert {entry for entry in ran if entry[0] in ("subtree", "merge", "generate")} == {
                ("subtree", 0)
            }

    run_virtual(scenario())


def test_leaves_that_run_more_layers_go_to_full_workers() -> None:
    async def scenario() -> None:
        full, leaf = pool = make_pool(2)
        job = make_job(200)
        scheduler = Scheduler([full])
        scheduler.add_worker(leaf, leaf_layers(job) - 1)
        assert await tokens_of(scheduler, job, pool) == expected_tokens(job)
        assert not leaf.calls

    run_virtual(scenario())


def test_another_full_worker_takes_over_from_one_that_is_lost() -> None:
    async def scenario() -> None:
        full, leaf, fresh = make_pool(3)
        job = make_job(200)
        scheduler = Scheduler([full])
        scheduler.add_worker(leaf, leaf_layers(job))
        tokens = []
        async with aclosing(cast(Any, scheduler.run(job))) as events:
            async for event in events:
                merged = isinstance(event, JobProgress) and event.done.node.height
                if merged and not full.dead.is_set():
                    full.kill()
                    scheduler.add_worker(fresh)
                if isinstance(event, TokenOut):
                    tokens.append(event.token_id)
        await assert_nothing_left(scheduler, [leaf, fresh])
        assert tokens == expected_tokens(job)

    run_virtual(scenario())


def test_without_a_full_worker_a_request_says_what_is_missing() -> None:
    async def scenario() -> None:
        pool = make_pool(2)
        job = make_job(200)
        scheduler = Scheduler(options=SchedulerOptions(no_worker_timeout_seconds=5.0))
        for worker in pool:
            scheduler.add_worker(worker, leaf_layers(job))
        with pytest.raises(NoWorkersError, match="no worker that has all layers is left"):
            await tokens_of(scheduler, job, pool)

    run_virtual(scenario())


@cache
def expected_answer() -> tuple[list[int], list[int]]:
    """Surviving context indices and greedy tokens of one process."""
    model = HomerModel.from_pretrained(model_dir("llama3"), CONFIG, device="cpu", dtype="float32")
    prefix, context, suffix = parts()
    kept = model.compress(prefix, context, suffix)
    tokens = model.generate(kept, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return kept.context_indices.tolist(), tokens.tolist()


def parts() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, VOCAB, (n,), generator=draw) for n in (3, CONTEXT_TOKENS, 5))


def make_real_job(name: str) -> Job:
    prefix, context, suffix = (part.tolist() for part in parts())
    plan = MergePlan.build(len(prefix), len(context), len(suffix), 8, CONFIG)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return Job(name, plan, prefix, context, suffix, sampling)


async def ask(
    workers: list[WorkerProcess], job: Job, kill: WorkerProcess | None = None
) -> tuple[list[int], JobSummary]:
    """Run a job; with `kill`, that worker is killed as soon as anything was merged."""
    tokens: list[int] = []
    async with connected([worker.address for worker in workers]) as clients:
        scheduler = Scheduler()
        for client in clients:
            scheduler.add_worker(client, (await client.info()).lowest_layers)
        async with aclosing(cast(Any, scheduler.run(job))) as events:
            async for event in events:
                if isinstance(event, JobProgress) and event.done.node.height and kill is not None:
                    kill.process.kill()
                    kill = None
                if isinstance(event, TokenOut):
                    tokens.append(event.token_id)
        await scheduler.close()
    assert isinstance(event, JobSummary)
    return tokens, event


def test_real_leaf_workers_give_the_same_answer_though_a_full_worker_dies(run: Run[Any]) -> None:
    job, model = make_real_job("leaf-workers"), model_dir("llama3")
    layers = str(leaf_layers(job))
    workers = [
        *(WorkerProcess(model) for _ in range(2)),
        *(WorkerProcess(model, "--role", "leaf", "--leaf-layers", layers) for _ in range(2)),
    ]
    try:
        for worker in workers:
            worker.wait_until_ready()
        full, other, *leaves = workers
        for worker in leaves:
            info = worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
            assert (info.num_layers, info.loaded_layers) == (8, int(layers))
            assert info.load_seconds > 0
            assert info.load_peak_bytes > 0
        kept, expected = expected_answer()
        tokens, summary = run(ask([full, *leaves], job))
        assert (tokens, list(summary.context_indices)) == (expected, kept)
        assert {"worker-0", "worker-1", "worker-2"} == set(summary.nodes_by_worker)
        # Whoever asks one for more than it has is told so.
        prompt = Prompt.of("too-high", job.plan, [part[None] for part in parts()])
        with pytest.raises(grpc.RpcError, match="has only the lowest") as refused:
            list(leaves[0].stub.RunSubtree(prompt.subtree(job.plan.root.id)))
        assert cast(grpc.Call, refused.value).code() is grpc.StatusCode.FAILED_PRECONDITION
        release(prompt, [leaves[0]])
        tokens, summary = run(ask([full, other, *leaves], make_real_job("killed"), kill=full))
        assert (tokens, list(summary.context_indices)) == (expected, kept)
    finally:
        for worker in workers:
            worker.stop()


def test_a_service_with_a_leaf_worker_answers_as_one_without(
    service: HomerClient, text_model: Path
) -> None:
    request: dict[str, Any] = {
        "context": CONTEXT, "question": QUESTION, "sampling": {"max_tokens": 12}
    }  # fmt: skip
    *_, expected = service.generate(**request)
    options = ServeOptions(
        model=str(text_model), cpu=True, workers=1, leaf_workers=1, port=0, name=uuid.uuid4().hex,
        worker_host=LOOPBACK, worker_token=WORKER_TOKEN,
    )  # fmt: skip
    with running_service(options) as address, HomerClient(address) as client:
        *_, summary = client.generate(**request)
        leaf = next(one for one in client.server_info().workers if one.name == "worker-1")
        with worker_stub(leaf.address) as stub:
            info = stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)
        status = CliRunner().invoke(app, ["status", "--server", address])
    assert isinstance(expected, pb.Summary)
    assert isinstance(summary, pb.Summary)
    assert list(summary.token_ids) == list(expected.token_ids)
    assert 0 < info.loaded_layers < info.num_layers
    assert leaf.loaded_layers == info.loaded_layers
    for worker, layers in (("worker-0", info.num_layers), ("worker-1", info.loaded_layers)):
        (line,) = (line for line in status.stdout.splitlines() if line.startswith(worker))
        assert f" {layers}/{info.num_layers} " in line
    # Merges too, where they need no more layers; but it never answers.
    assert leaf.leaves_done > 0
    assert leaf.leaves_done + leaf.merges_done == summary.nodes_by_worker["worker-1"]
    assert leaf.generated_tokens == 0
