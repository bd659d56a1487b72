"""Families that are unlike Llama, each across two worker processes.

All models run through the same messages in one process in `tests/homer/families`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from homer import HomerConfig, HomerModel
from homer.v1 import sampling_pb2
from tests.homer.families.zoo import model_dir, prompt
from tests.workers.processes import Prompt, release, run_across, running_workers

TOKENS = 8

KINDS = {
    "deepseek-v3": "latent attention, whose rows of keys and values differ in size, and experts",
    "gemma2": "local layers and soft caps",
    "gemma3": "rotary bases by layer",
    "gpt-neox": "partial rotation and parallel residuals",
    "gpt-oss": "attention sinks, and experts",
    "llama-dynamic": "a rotation by the length of the prompt, which both workers must take alike",
    "llama4": "layers without rotation, blocks and attention temperature",
    "phi4": "short and long rotary factors, also by the length",
    "qwen3-moe": "experts that report their routing",
}


@pytest.mark.parametrize("name", KINDS)
def test_two_workers_equal_one_process(name: str, tmp_path: Path) -> None:
    config = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
    model = HomerModel.from_pretrained(model_dir(name), config, device="cpu", dtype="float32")
    parts = prompt(3, 150, 5)
    folder = shutil.copytree(model_dir(name), tmp_path / name)
    answer = model.generate(model.compress(*parts), max_new_tokens=TOKENS).tolist()
    ends = write_ends(folder, answer[3:6:2])
    settings: list[dict[str, Any]] = [{}, {"refresh_suffix": False}, {"score": "query_window"}]
    with running_workers(folder, count=2) as workers:

        def ask(prompt_id: str, **sampling: Any) -> Any:
            plan = model.plan(*(len(part) for part in parts))
            across = Prompt.of(prompt_id, plan, [part[None] for part in parts])
            came = run_across(across, workers, 0, max_tokens=TOKENS, **sampling)
            release(across, workers)
            return came

        ended = ask("ended", ignore_eos=False)
        assert ended.tokens == answer[: min(answer.index(end) for end in ends)]
        assert ended.summary.finish_reason == sampling_pb2.FINISH_REASON_STOP
        for setting in settings:
            model = HomerModel(model.model, config.replace(**setting))
            context = model.compress(*parts)
            came = ask(str(setting))
            assert list(came.ready.context_indices) == context.context_indices.tolist()
            expected = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True)
            assert came.tokens == expected.tolist()
        assert all(worker.holds_nothing() for worker in workers)


def write_ends(folder: Path, ends: list[int]) -> list[int]:
    """Let answers end at any of these tokens, by the model's generation config."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "eos_token_id": ends}), encoding="utf-8")
    return ends


def test_what_a_worker_says_of_its_cache_is_what_it_holds() -> None:
    from homer.v1 import worker_pb2

    with running_workers(model_dir("deepseek-v3"), count=1) as workers:
        info = workers[0].stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    # A latent row of 12 numbers and a rotated key of 6, in 8 layers, in float32.
    assert info.kv_bytes_per_token == (12 + 6) * 8 * torch.float32.itemsize
