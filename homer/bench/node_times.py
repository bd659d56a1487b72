"""What leaves, merges, the refreshed suffix and decoded tokens take in one process, by size.

`python -m homer.bench.node_times` is the process that measures; several side by side show what a
machine takes back when all of its cores are busy. Knows nothing about workers or schedulers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers.utils.logging import disable_progress_bar

from homer.bench.bench_model import PREFIX_TOKENS, SUFFIX_TOKENS, random_prompt
from homer.config import HomerConfig
from homer.cost import node_flops, suffix_flops
from homer.encode import NodeReport, TreeEncoder
from homer.errors import HomerError
from homer.generation import generate_tokens
from homer.loading import load_model
from homer.plan import MergePlan
from homer.sampling import SamplingParams
from homer.shape import ModelShape
from homer.stack import LayerStack

DECODED_TOKENS = 16


@dataclass(frozen=True)
class NodeTime:
    """One piece of work.

    `kind` is leaf, merge, suffix (a short run through all layers: the prefix, or the refreshed
    suffix) or decode. `tokens` ran, and saw `past` rows before themselves; `flops` as `homer.cost`
    counts them.
    """

    kind: str
    tokens: int
    past: int
    layers: int
    flops: int
    seconds: float


def plans_to_measure(config: HomerConfig, num_layers: int) -> list[MergePlan]:
    """Small trees of several chunk lengths and numbers of layers in leaves and merges."""
    plans = []
    for chunk in (config.max_chunk_len, config.max_chunk_len * 3 // 4):
        for warmup in sorted({config.warmup_layers, config.warmup_layers // 4}):
            changed = config.replace(max_chunk_len=chunk, target_len=chunk, warmup_layers=warmup)
            room = chunk - PREFIX_TOKENS - SUFFIX_TOKENS
            plans.append(
                MergePlan.build(PREFIX_TOKENS, 4 * room, SUFFIX_TOKENS, num_layers, changed)
            )
    return plans


def measure_here(model_path: str, config: HomerConfig, rounds: int, device: str) -> list[NodeTime]:
    """Time every plan of `plans_to_measure` `rounds` times, after once without counting."""
    model = load_model(model_path, dtype="float32" if device == "cpu" else "auto", device=device)
    stack, shape = LayerStack(model), ModelShape.load(model_path)
    plans = plans_to_measure(config, stack.num_layers)
    times: list[NodeTime] = []
    for number in range(rounds + 1):
        for plan in plans:
            found = list(_time_plan(stack, shape, plan))
            if number:
                times += found
    return times


def _time_plan(stack: LayerStack, shape: ModelShape, plan: MergePlan) -> Iterator[NodeTime]:
    prefix, context, suffix = random_prompt(plan.prompt_len, stack.vocab_size)
    layers = plan.num_layers

    def short_run(kind: str, tokens: int, past: int, started: float) -> NodeTime:
        stack.synchronize()
        seconds = time.perf_counter() - started
        flops = suffix_flops(shape, tokens, past, layers)
        return NodeTime(kind, tokens, past, layers, flops, seconds)

    encoder = TreeEncoder(stack, plan, prefix, suffix)
    started = time.perf_counter()
    encoder.prefix_kv()
    yield short_run("suffix", plan.prefix_len, 0, started)

    done: list[NodeTime] = []

    def on_node(report: NodeReport) -> None:
        nonlocal started
        stack.synchronize()
        node, now = plan.by_id[report.node], time.perf_counter()
        tokens = node.context_in + plan.suffix_len
        flops = node_flops(plan, shape, node)
        kind = "leaf" if node.is_leaf else "merge"
        run_layers = node.layer_end - node.layer_start
        done.append(NodeTime(kind, tokens, plan.prefix_len, run_layers, flops, now - started))
        started = time.perf_counter()

    started = time.perf_counter()
    state = encoder.run_subtree(plan.root.id, context, on_node)
    yield from done
    started = time.perf_counter()
    compressed = encoder.finish(state)
    yield short_run("suffix", plan.suffix_len, plan.prefix_len + plan.root.context_out, started)
    params = SamplingParams(max_new_tokens=DECODED_TOKENS, ignore_eos=True)
    answer = generate_tokens(stack, compressed, params)
    next(answer)
    for _ in range(DECODED_TOKENS - 1):
        started = time.perf_counter()
        next(answer)
        yield short_run("decode", 1, plan.kept_len, started)


def measure_side_by_side(
    model_path: str, config: HomerConfig, processes: int, *, rounds: int = 3, threads: int = 1
) -> list[NodeTime]:
    """The same in `processes` processes at once, on the CPU; the times of all of them."""
    command = [sys.executable, "-m", "homer.bench.node_times", model_path]
    command += [json.dumps(dataclasses.asdict(config)), str(rounds), str(threads), "cpu"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        # Each says when it is ready, and all begin together.
        for process in running:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise HomerError("a measuring process did not start")
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        times: list[NodeTime] = []
        for process in running:
            out, _ = process.communicate()
            if process.returncode:
                raise HomerError(f"a measuring process ended with status {process.returncode}")
            times += [NodeTime(**values) for values in json.loads(out)]
        return times
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in this process and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m homer.bench.node_times")
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("config", help="fields of HomerConfig, as JSON")
    parser.add_argument("rounds", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("device")
    given = parser.parse_args(arguments)
    disable_progress_bar()
    torch.set_num_threads(given.threads)
    print("ready", flush=True)
    sys.stdin.readline()
    config = HomerConfig(**json.loads(given.config))
    times = measure_here(given.model, config, given.rounds, given.device)
    print(json.dumps([asdict(one) for one in times]))


if __name__ == "__main__":
    main()
