"""Models over several processes keep the same tokens, and answer the same, as in one process."""

from __future__ import annotations

import json
import os
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
from homer.loading import load_model
from homer.parallel import load_on_ranks
from tests.homer.families.zoo import LAYERS, model_dir
from tests.homer.rank import BATCH_SIZES, CHANGES, CONFIG, answers

pytest.importorskip("deepspeed")

# Grouped queries; soft caps and windows; all of the attention on each rank; one row for all heads.
SPLIT: list[tuple[str, Engine]] = [
    ("llama3", "deepspeed-tp"),
    ("llama3", "transformers-tp"),
    ("gemma2", "deepspeed-tp"),
    ("phi3", "transformers-tp"),
    ("deepseek-v3", "deepspeed-tp"),
]
REFUSED: list[tuple[str, Engine]] = [
    ("stablelm", "deepspeed-tp"),
    ("stablelm", "transformers-tp"),
    ("cohere", "transformers-tp"),
]
IN_PARTS: list[tuple[str, Engine]] = [("llama3", "deepspeed-zero3")]
RUN_SECONDS = 150


def run_ranks(
    folder: Path, size: int, jobs: Sequence[tuple[str, Engine]]
) -> list[list[dict[str, Any]]]:
    """What each of `size` ranks says of each job."""
    given = json.dumps([(str(model_dir(name)), engine) for name, engine in jobs])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.homer.rank", str(rank), str(size), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
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
def in_one_process(name: str) -> list[dict[str, Any]]:
    return answers(load_model(model_dir(name), device="cpu", dtype="float32"))


def assert_same(name: str, ranks: Sequence[dict[str, Any]], parts: int) -> None:
    for rank in ranks:
        assert len(rank["answers"]) == len(CHANGES)
        for got, expected in zip(rank["answers"], in_one_process(name), strict=True):
            assert got["kept"] == expected["kept"]
            assert got["tokens"] == expected["tokens"]
            assert got["nats"] == pytest.approx(expected["nats"], abs=1e-4)
            assert got["cache_bytes"] * parts == expected["cache_bytes"]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    jobs = [*SPLIT, *REFUSED, *IN_PARTS]
    ranks = run_ranks(tmp_path, 2, jobs)
    for number, (name, engine) in enumerate(jobs):
        said = [rank[number] for rank in ranks]
        if (name, engine) in REFUSED:
            assert all("use" in one["refused"] for one in said)
        else:
            whole = engine == "deepspeed-zero3" or name in ("phi3", "deepseek-v3")
            assert_same(name, said, parts=1 if whole else 2)
            for one in said:
                if engine == "deepspeed-zero3":
                    assert_gathered_once_for_all_leaves(one["gathers"])


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


def test_an_engine_on_ranks_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        load_on_ranks(model_dir("llama3"), "deepspeed-tp")
