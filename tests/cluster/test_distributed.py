"""Real worker processes and real gRPC give what one process gives."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cluster.job import Job, JobSummary, Sampling, TokenOut
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from cluster.text import PromptIds, PromptTokenizer
from homer import HomerConfig, HomerModel, MergePlan
from homer.demo import MODEL_DIR
from homer.demo.tasks import make_sample
from homer.shape import BIAS_FILE, ModelShape, homer_defaults
from tests.cluster.conftest import Run, connected
from tests.golden_cases import GoldenCase
from tests.workers.processes import running_workers

NEW_TOKENS = 17
WORKERS = (1, 2, 3)
# One leaf, fewer leaves than workers, odd numbers of leaves, many levels; MHA, GQA and MQA.
CASES = (
    "a_fit_small",
    "a_2c_full",
    "a_5c",
    "a_7c",
    "a_33c",
    "b_5c",
    "b_16c",
    "g_5c_gqa",
    "m_3c_mqa",
)


class WorkersOf:
    """Addresses of three workers that serve a model; started on first use."""

    def __init__(self) -> None:
        self._model: Path | None = None
        self._addresses: list[str] = []
        self._running = ExitStack()

    def __call__(self, model: Path) -> list[str]:
        if model != self._model:
            # One model's workers at a time: they take memory, and tests come model by model.
            self.close()
            workers = running_workers(model, "--dtype", "auto", count=3)
            started = self._running.enter_context(workers)
            self._model, self._addresses = model, [worker.address for worker in started]
        return self._addresses

    def close(self) -> None:
        self._model = None
        self._running.close()


@pytest.fixture(scope="module")
def workers_of() -> Iterator[WorkersOf]:
    workers = WorkersOf()
    yield workers
    workers.close()


def refreshed(case: GoldenCase) -> HomerConfig:
    """The case's lengths with our own defaults: a balanced tree and a refreshed suffix."""
    return HomerConfig(
        max_chunk_len=case.config.max_chunk_len,
        target_len=case.config.target_len,
        warmup_layers=case.config.warmup_layers,
    )


@cache
def local_answer(name: str, config: HomerConfig) -> tuple[list[int], list[int]]:
    """Surviving context indices and greedy tokens of one process."""
    case = GoldenCase.load(name)
    model = HomerModel.from_pretrained(case.model_dir, config=config, bias=case.bias)
    context = model.compress(*case.parts)
    tokens = model.generate(context, max_new_tokens=NEW_TOKENS)
    return context.context_indices.tolist(), tokens.tolist()


async def run_job(
    addresses: list[str], job: Job, pieces_per_worker: int
) -> tuple[list[int], JobSummary]:
    async with connected(addresses) as clients:
        scheduler = Scheduler(
            clients, options=SchedulerOptions(pieces_per_worker=pieces_per_worker)
        )
        tokens: list[int] = []
        summary: JobSummary | None = None
        async with aclosing(cast(Any, scheduler.run(job))) as events:
            async for event in events:
                if isinstance(event, TokenOut):
                    tokens.append(event.token_id)
                elif isinstance(event, JobSummary):
                    summary = event
        await scheduler.close()
        for client in clients:
            stats = await client.stats()
            counts = (stats.requests, stats.node_states, stats.kv_shards, stats.running_calls)
            assert counts == (0, 0, 0, 0), "something was not released"
            assert stats.state_bytes == stats.kv_shard_bytes == 0
    assert summary is not None
    return tokens, summary


def job_of(case: GoldenCase, config: HomerConfig) -> Job:
    prefix, context, suffix = (part[0].tolist() for part in case.parts)
    plan = MergePlan.build(len(prefix), len(context), len(suffix), case.num_layers, config)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    return Job(uuid.uuid4().hex, plan, prefix, context, suffix, sampling)


def test_several_workers_take_part(workers_of: WorkersOf, run: Run[Any]) -> None:
    case = GoldenCase.load("a_33c")
    addresses = workers_of(case.model_dir)
    _, summary = run(run_job(addresses, job_of(case, refreshed(case)), 4))
    assert set(summary.nodes_by_worker) == {"worker-0", "worker-1", "worker-2"}
    assert summary.moved_bytes > 0
    seconds = summary.seconds
    stages = seconds.queue + seconds.leaves + seconds.merges + seconds.gather
    assert 0 < stages <= seconds.time_to_first_token <= seconds.total


# Model by model, because each model's workers are started once.
@pytest.mark.parametrize("mode", ["paper", "refreshed"])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_workers_equals_one_process(
    name: str,
    workers: int,
    mode: str,
    workers_of: WorkersOf,
    run: Run[Any],
) -> None:
    case = GoldenCase.load(name)
    addresses = workers_of(case.model_dir)[:workers]
    if mode == "paper":
        job = job_of(case, case.config)
        tokens, summary = run(run_job(addresses, job, pieces_per_worker=1))
        # What the authors' code gives.
        kept = case.expected["kept_context_index"].tolist()
        expected = case.expected["greedy_forward"].tolist()
    else:
        job = job_of(case, refreshed(case))
        tokens, summary = run(run_job(addresses, job, pieces_per_worker=8))
        kept, expected = local_answer(name, refreshed(case))
    assert list(summary.context_indices) == kept
    assert tokens == expected
    assert sum(summary.nodes_by_worker.values()) == len(job.plan.nodes)


@pytest.mark.parametrize("mode", ["paper", "refreshed"])
@pytest.mark.parametrize("workers", WORKERS)
def test_the_demo_model_answers_as_in_one_process(
    workers: int, mode: str, workers_of: WorkersOf, run: Run[Any]
) -> None:
    addresses = workers_of(MODEL_DIR)[:workers]
    config, ids, kept, expected = demo_answer(mode)
    plan = MergePlan.build(
        len(ids.prefix),
        len(ids.context),
        len(ids.suffix),
        ModelShape.load(MODEL_DIR).num_layers,
        config,
    )
    job = Job(uuid.uuid4().hex, plan, *ids, Sampling(max_new_tokens=NEW_TOKENS))
    tokens, summary = run(run_job(addresses, job, pieces_per_worker=4))
    assert list(summary.context_indices) == kept
    assert tokens == expected


@cache
def demo_answer(mode: str) -> tuple[HomerConfig, PromptIds, list[int], list[int]]:
    """Settings, prompt, surviving context indices and greedy tokens of one process."""
    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    assert tokenizer is not None
    sample = make_sample("passkey", 4000, tokenizer.count_tokens, seed=1)
    ids = tokenizer.prompt_ids(sample.prefix, sample.context, sample.suffix)
    config = homer_defaults(MODEL_DIR)
    if mode == "paper":
        config = config.replace(plan="paper", refresh_suffix=False)
    model = HomerModel.from_pretrained(MODEL_DIR, config=config, bias=MODEL_DIR / BIAS_FILE)
    prefix, document, suffix = (torch.tensor(part) for part in ids)
    context = model.compress(prefix, document, suffix)
    tokens = model.generate(context, max_new_tokens=NEW_TOKENS)
    return config, ids, context.context_indices.tolist(), tokens.tolist()
