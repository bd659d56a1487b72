"""A rank of a test: `python -m tests.homer.rank RANK SIZE FOLDER`, with jobs as JSON on its stdin.

Loads models and compresses prompts together with the other ranks, and prints what came out.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from homer import HomerConfig, HomerModel
from homer.bench.gathered import count_gathered
from homer.errors import HomerError
from homer.load_options import LoadOptions
from homer.parallel import load_on_ranks
from tests.homer.families.zoo import prompt

TOKENS = 6
# As many as memory has room for: all.
BATCH_SIZES = (1, 0)
CONFIG = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"refresh_suffix": False, "score": "softmax_mean"},
)


def answers(model: Any, changes: Sequence[dict[str, Any]] = CHANGES) -> list[dict[str, Any]]:
    """What a model keeps and answers, under each of `changes` to the settings."""
    out = []
    parts = prompt(3, 150, 5)
    for change in changes:
        homer = HomerModel(model, CONFIG.replace(**change))
        context = homer.compress(*parts)
        tokens = homer.generate(context, max_new_tokens=TOKENS, ignore_eos=True)
        nats = homer.score(context, tokens).log_softmax(-1)[torch.arange(TOKENS), tokens]
        out.append(
            {
                "kept": context.context_indices.tolist(),
                "tokens": tokens.tolist(),
                "nats": nats.tolist(),
                "cache_bytes": context.nbytes,
            }
        )
    return out


def gathers(model: Any) -> dict[int, dict[str, int]]:
    """How often the weights of each layer are gathered to compress a prompt, by `BATCH_SIZES`."""
    times, _ = count_gathered(model)
    by_size = {}
    for size in BATCH_SIZES:
        times.clear()
        HomerModel(model, CONFIG, leaf_batch_size=size).compress(*prompt(3, 150, 5))
        layers = {name.split(".")[2] for name in times if ".layers." in name}
        by_size[size] = {
            layer: max(times[name] for name in times if f".layers.{layer}." in name)
            for layer in sorted(layers)
        } | {"embeddings": times["model.embed_tokens.weight"]}
    return by_size


class Log(logging.Handler):
    """What is told while a model is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        store=FileStore(str(Path(folder) / "store"), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=100),
    )
    done: list[dict[str, Any]] = []
    log = Log()
    logging.getLogger("homer.load_progress").addHandler(log)
    logging.getLogger("homer.load_progress").setLevel(logging.INFO)
    for path, engine, options in json.load(sys.stdin):
        log.lines.clear()
        try:
            model = load_on_ranks(path, engine, LoadOptions(device="cpu", **options))
            # Many small weights, gathered one by one, take their time.
            active = "adapter" in options and "merge_adapter" not in options
            said = answers(model, CHANGES[:1] if active else CHANGES)
            done.append({"answers": said, "progress": list(log.lines)})
            if engine == "deepspeed-zero3" and "merge_adapter" in options:
                done[-1]["gathers"] = gathers(model)
        except HomerError as error:
            done.append({"refused": str(error)})
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
