"""What splitting a model over processes costs and saves: `python -m homer.bench.ranks`.

Runs the same prompt with each engine, on ranks that it starts, and prints a table: seconds per leaf
and per token, and each rank's memory; for ZeRO-3 also what is gathered when leaves run one by one
and together. Knows nothing about workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.bench.gathered import count_gathered
from homer.encode import NodeReport
from homer.engines import ENGINES, Engine
from homer.model import HomerModel
from homer.parallel import load_on_ranks

SIZE = BenchSize(hidden=1024, intermediate=2816, heads=16, layers=8)
RUNS = 3
LEAVES = 4
TOKENS = 32
RUN_SECONDS = 900


def measure(engine: Engine, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "homer.bench.ranks", "--engine", engine]
        processes = [
            subprocess.Popen(
                [*command, "--rank", f"{rank}", "--ranks", f"{ranks}", str(folder), store],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        return [json.loads(one.communicate(timeout=RUN_SECONDS)[0]) for one in processes]


def measure_here(engine: Engine, rank: int, ranks: int, folder: str, store: str) -> dict[str, Any]:
    """One rank's part: medians over the runs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        store=FileStore(f"{store}/store", ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=RUN_SECONDS),
    )
    started = time.perf_counter()
    homer = HomerModel(load_on_ranks(folder, engine, device="cpu", dtype="float32"), SIZE.config)
    load_seconds = time.perf_counter() - started
    parts = random_prompt(LEAVES * SIZE.chunk, SIZE.vocab)
    leaf_seconds: list[float] = []
    token_seconds: list[float] = []

    def on_node(report: NodeReport) -> None:
        if report.node.height == 0:
            leaf_seconds.append(report.seconds)

    for run in range(RUNS + 1):
        if run == 1:
            leaf_seconds.clear()
            token_seconds.clear()
        context = homer.compress(*parts, on_node=on_node)
        began = time.perf_counter()
        homer.generate(context, max_new_tokens=TOKENS, ignore_eos=True)
        # The first token takes no run of the model.
        token_seconds.append((time.perf_counter() - began) / (TOKENS - 1))
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in homer.model.parameters()]
    return {
        "load_seconds": load_seconds,
        "leaf_seconds": statistics.median(leaf_seconds),
        "token_seconds": statistics.median(token_seconds),
        "weight_bytes": sum(parameter.nbytes for parameter in parameters),
        "cache_bytes": context.nbytes,
        "gathered_bytes": gathered(homer, parts) if engine == "deepspeed-zero3" else [],
    }


def gathered(homer: HomerModel, parts: tuple[torch.Tensor, ...]) -> list[float]:
    """Bytes of weights gathered for each leaf of a prompt, one by one and together."""
    prefix, context, suffix = parts
    leaves = len(homer.plan(len(prefix), len(context), len(suffix)).leaves)
    _, moved = count_gathered(homer.model)
    out = []
    for size in (1, 0):
        homer.leaf_batch_size = size
        moved.clear()
        homer.compress(prefix, context, suffix)
        out.append(moved.total() / leaves)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m homer.bench.ranks")
    parser.add_argument("--engine", choices=ENGINES, action="append")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        (engine,) = given.engine
        print(json.dumps(measure_here(engine, given.rank, given.ranks, *given.folders)))
        return
    print("| engine | ranks | ms per leaf | ms per token | weights | cache, per rank |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        save_bench_model(Path(folder), SIZE)
        for name in given.engine or ENGINES:
            engine = cast("Engine", name)
            ranks = 1 if engine == "torch" else given.ranks
            said = measure(engine, ranks, Path(folder))
            slowest = max(said, key=lambda one: one["leaf_seconds"])
            print(
                f"| {engine} | {ranks} | {1000 * slowest['leaf_seconds']:.0f} "
                f"| {1000 * slowest['token_seconds']:.1f} "
                f"| {slowest['weight_bytes'] / 2**20:.0f} MiB "
                f"| {slowest['cache_bytes'] / 2**20:.1f} MiB |",
                flush=True,
            )
            if slowest["gathered_bytes"]:
                alone, together = (count / 2**20 for count in slowest["gathered_bytes"])
                print(
                    f"\n{engine} gathers {alone:.1f} MiB per leaf one by one, {together:.1f} "
                    f"together ({together / alone:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
