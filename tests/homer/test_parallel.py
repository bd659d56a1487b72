"""Models over several processes keep the same tokens, and answer the same, as in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from homer import MergePlan
from homer.engines import Engine, check_engine
from homer.errors import ConfigError
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.parallel import load_on_ranks
from tests.homer.families.zoo import LAYERS, MODELS, model_dir, save_adapter
from tests.homer.rank import BATCH_SIZES, CONFIG, answers
from tests.hub_cache import MODEL_ID, fill_hub_cache
from workers.options import WorkerOptions

pytest.importorskip("deepspeed")

PLAIN: dict[str, Any] = {"dtype": "float32"}
ACTIVE: dict[str, Any] = {
    "adapter": "llama3", "revision": "v2", "local_files_only": True, "attention": "eager",
}  # fmt: skip
MERGED: dict[str, Any] = {"adapter": "llama3", "merge_adapter": True}
Job = tuple[str, Engine, dict[str, Any]]
# Grouped queries, with adapters; soft caps and windows; all of the attention on each rank; one row
# for all heads.
SPLIT: list[Job] = [
    ("llama3", "deepspeed-tp", MERGED),
    ("llama3", "transformers-tp", MERGED),
    (MODEL_ID, "transformers-tp", ACTIVE),
    ("gemma2", "deepspeed-tp", PLAIN),
    ("phi3", "transformers-tp", PLAIN),
    ("deepseek-v3", "deepspeed-tp", PLAIN),
]
REFUSED: list[Job] = [
    ("stablelm", "deepspeed-tp", PLAIN),
    ("stablelm", "transformers-tp", PLAIN),
    ("cohere", "transformers-tp", PLAIN),
]
IN_PARTS: list[Job] = [
    ("sharded", "deepspeed-zero3", MERGED),
    (MODEL_ID, "deepspeed-zero3", ACTIVE),
]
RUN_SECONDS = 300


def model_path(name: str, folder: Path) -> str:
    """A model of the families' tests, one of our own in `folder`, or an id."""
    if name == MODEL_ID:
        return name
    return str(model_dir(name) if name in MODELS else folder / name)


def run_ranks(folder: Path, size: int, jobs: Sequence[Job]) -> list[list[dict[str, Any]]]:
    """What each of `size` ranks says of each job; `folder` has models of our own, and adapters."""
    given = json.dumps(
        [
            (
                model_path(name, folder),
                engine,
                {**options, "adapter": str(folder / "adapter")}
                if "adapter" in options
                else options,
            )
            for name, engine, options in jobs
        ]
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.homer.rank", str(rank), str(size), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_CACHE": str(folder / "hub"),
                "HF_HUB_OFFLINE": "1",
            },
        )
        for rank in range(size)
    ]
    try:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(given)
            rank.stdin.close()
        out = []
        for rank in ranks:
            assert rank.wait(RUN_SECONDS) == 0
            assert rank.stdout is not None
            out.append(json.loads(rank.stdout.read()))
        return out
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@cache
def in_one_process(name: str, adapter: Path | None) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    if adapter is not None:
        options |= {"adapter": str(adapter), "merge_adapter": True}
    return answers(load_model(model_dir(name), **options))


def assert_same(
    expected: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]], parts: int
) -> None:
    for rank in ranks:
        assert rank["answers"]
        for got, one in zip(rank["answers"], expected, strict=False):
            assert got["kept"] == one["kept"]
            assert got["tokens"] == one["tokens"]
            assert got["nats"] == pytest.approx(one["nats"], abs=1e-4)
            assert got["cache_bytes"] * parts == one["cache_bytes"]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    adapter = save_adapter("llama3", tmp_path / "adapter")
    broken = damaged(tmp_path)
    sharded = tmp_path / "sharded"
    load_model(model_dir("llama3")).save_pretrained(sharded, max_shard_size="40KB")
    for revision, files in (("main", tmp_path / "short"), ("v2", sharded)):
        fill_hub_cache(tmp_path / "hub", files, revision=revision)
    jobs = [*SPLIT, *REFUSED, *IN_PARTS, *((name, "deepspeed-zero3", PLAIN) for name in broken)]
    ranks = run_ranks(tmp_path, 2, jobs)
    for number, (name, engine, options) in enumerate(jobs):
        said = [rank[number] for rank in ranks]
        if (name, engine, options) in REFUSED:
            assert all("use" in one["refused"] for one in said)
            continue
        if name in broken:
            # Also by the rank that reads none of it.
            assert all(broken[name] in one["refused"] for one in said)
            continue
        whole = engine == "deepspeed-zero3" or name in ("phi3", "deepseek-v3")
        known = name if name in MODELS else "llama3"
        expected = in_one_process(known, adapter if "adapter" in options else None)
        assert_same(expected, said, parts=1 if whole else 2)
        if name == "sharded":
            for one in said:
                assert_gathered_once_for_all_leaves(one["gathers"])
            last = len(list(sharded.glob("*.safetensors")))
            assert said[0]["progress"][-1] == f"loading: shard {last} of {last}"
            assert not said[1]["progress"]


def damaged(folder: Path) -> dict[str, str]:
    """Checkpoints that cannot be loaded, and what is said of each."""
    said = {
        "truncated": "is truncated",
        "other": "have other sizes than its config.json says",
        "short": "lacks 9 weights",
    }
    for name in said:
        shutil.copytree(model_dir("llama3"), folder / name)
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for name, field, value in (
        ("other", "intermediate_size", 40),
        ("short", "num_hidden_layers", 9),
    ):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, field: value}))
    return said


def assert_gathered_once_for_all_leaves(gathers: dict[str, dict[str, int]]) -> None:
    plan = MergePlan.build(3, 150, 5, LAYERS, CONFIG)
    alone, together = (gathers[str(size)] for size in BATCH_SIZES)
    # Once more for the prefix, and for the question behind all.
    assert alone["embeddings"] == len(plan.leaves) + 3
    assert together["embeddings"] == 4
    for layer in range(LAYERS):
        nodes = [node for node in plan.nodes if node.layer_start <= layer < node.layer_end]
        levels = {node.id.height for node in nodes}
        assert alone[str(layer)] == len(nodes) + 2
        assert together[str(layer)] == len(levels) + 2


@pytest.mark.parametrize(
    ("engine", "ranks", "advice"),
    [
        ("deepspeed", 2, "use one of torch, deepspeed-tp"),
        ("torch", 2, "use deepspeed-tp, transformers-tp or deepspeed-zero3"),
        ("transformers-tp", 1, "use 2 ranks or more"),
        ("deepspeed-zero3", 0, "use 1 or more"),
    ],
)
def test_engines_that_cannot_be_are_refused(engine: str, ranks: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_engine(engine, ranks)


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        ("deepspeed-tp", {"adapter": "lora"}, "DeepSpeed would split.*set merge_adapter"),
        ("deepspeed-tp", {"quantization": "fp8"}, "quantized by fp8.*transformers-tp takes fp8"),
        ("transformers-tp", {"quantization": "torchao-int8"}, "quantized by torchao"),
        ("deepspeed-zero3", {"quantization": "bitsandbytes-4bit"}, "quantized by bitsandbytes"),
        ("deepspeed-zero3", {"device_map": "auto"}, "device_map is set.*use engine torch"),
        ("transformers-tp", {"lower_layers": 2}, "lower_layers is set.*use engine torch"),
    ],
)
def test_options_that_an_engine_cannot_do_are_refused_by_name(
    engine: Engine, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        WorkerOptions(model="m", engine=engine, ranks=2, load=LoadOptions(**options))


def test_an_engine_on_ranks_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        load_on_ranks(model_dir("llama3"), "deepspeed-tp")
