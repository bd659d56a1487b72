"""Families whose caches or layers are unlike Llama's, across two worker processes.

Rows of keys and values of different sizes (latent attention), local layers, soft caps and sinks.
All families run in one process in `tests/homer/families`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from homer import HomerConfig, HomerModel
from tests.homer.families.zoo import model_dir, prompt
from tests.workers.processes import Prompt, release, run_across, running_workers

TOKENS = 8


@pytest.mark.parametrize("name", ["deepseek-v3", "gemma2", "llama4"])
def test_two_workers_equal_one_process(name: str) -> None:
    config = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
    model = HomerModel.from_pretrained(model_dir(name), config, device="cpu", dtype="float32")
    parts = prompt(3, 150, 5)
    with running_workers(model_dir(name), count=2) as workers:
        changes: list[dict[str, Any]] = [{}, {"refresh_suffix": False}, {"score": "query_window"}]
        for change in changes:
            model = HomerModel(model.model, config.replace(**change))
            context = model.compress(*parts)
            expected = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True)
            plan = model.plan(*(len(part) for part in parts))
            across = Prompt.of(f"{name}/{change}", plan, [part[None] for part in parts])
            answer = run_across(across, workers, 0, max_tokens=TOKENS)
            assert list(answer.ready.context_indices) == context.context_indices.tolist()
            assert answer.tokens == expected.tolist()
            release(across, workers)
        assert all(worker.holds_nothing() for worker in workers)


def test_what_a_worker_says_of_its_cache_is_what_it_holds() -> None:
    from homer.v1 import worker_pb2

    with running_workers(model_dir("deepseek-v3"), count=1) as workers:
        info = workers[0].stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    # A latent row of 12 numbers and a rotated key of 6, in 8 layers, in float32.
    assert info.kv_bytes_per_token == (12 + 6) * 8 * torch.float32.itemsize
