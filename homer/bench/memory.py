"""How much memory compression takes above the loaded model: a fresh process for each length.

Resident memory as the kernel counts it (Linux). `python -m homer.bench.memory` is the process that
measures one length. Knows nothing about answers: weights and prompts are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from homer.bench.bench_model import (
    PREFIX_TOKENS,
    SUFFIX_TOKENS,
    BenchSize,
    random_prompt,
    save_bench_model,
)
from homer.bench.plain import plain_context
from homer.errors import ConfigError, HomerError
from homer.loading import load_model
from homer.model import HomerModel

METHODS = ("homer", "paper", "plain")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryResult:
    """One length in one fresh process.

    `loaded_bytes` is resident memory with the model loaded and every code path run once on a small
    prompt; `peak_bytes` is the highest resident memory of the measured run.
    """

    method: str
    tokens: int
    threads: int
    loaded_bytes: int
    peak_bytes: int

    @property
    def above_bytes(self) -> int:
        """Peak above the loaded model."""
        return self.peak_bytes - self.loaded_bytes


def measure_memory(
    lengths: Sequence[int],
    methods: Sequence[str] = ("homer",),
    *,
    threads: int = 1,
    size: BenchSize | None = None,
    on_start: Callable[[int, str], None] | None = None,
) -> list[MemoryResult]:
    """Measure each method at each length, one process after the other.

    Raises
    ------
    ConfigError
        Where the kernel does not tell peak memory.
    """
    if unknown := set(methods) - set(METHODS):
        raise ConfigError(f"unknown methods {sorted(unknown)}; choose from {', '.join(METHODS)}")
    if not _CLEAR_REFS.exists():
        raise ConfigError("measuring peak memory needs Linux with /proc mounted")
    size = size or BenchSize()
    results = []
    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        for tokens in lengths:
            for method in methods:
                if on_start is not None:
                    on_start(tokens, method)
                results.append(_in_fresh_process(Path(folder), size, method, tokens, threads))
    return results


def _in_fresh_process(
    model: Path, size: BenchSize, method: str, tokens: int, threads: int
) -> MemoryResult:
    command = [sys.executable, "-m", "homer.bench.memory", str(model), json.dumps(asdict(size))]
    command += [method, str(tokens), str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise HomerError(f"the measuring process failed:\n{done.stderr.strip()}")
    return MemoryResult(**json.loads(done.stdout))


def _measure_here(
    model_path: str, size: BenchSize, method: str, tokens: int, threads: int
) -> MemoryResult:
    disable_progress_bar()
    torch.set_num_threads(threads)
    model = load_model(model_path, dtype="float32", device="cpu")
    config = size.paper_config if method == "paper" else size.config

    def run(length: int, chunk: int) -> None:
        prompt = random_prompt(length, size.vocab)
        if method == "plain":
            plain_context(model, torch.cat(prompt))
        else:
            changed = config.replace(max_chunk_len=chunk, target_len=chunk)
            HomerModel(model, changed).compress(*prompt)

    # Loads all code: two leaves and a merge of a few tokens each, so that hardly any memory is left
    # over which the measured run could use again without being seen.
    affixes = PREFIX_TOKENS + SUFFIX_TOKENS
    run(affixes + 16, chunk=affixes + 8)
    # Weights are mapped from the file and count from when they are first read.
    for weights in model.parameters():
        weights.detach().sum()
    loaded = _status_bytes("VmRSS")
    # 5 sets the peak back to what is resident now.
    _CLEAR_REFS.write_text("5", encoding="ascii")
    run(tokens, size.chunk)
    return MemoryResult(method, tokens, threads, loaded, _status_bytes("VmHWM"))


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise HomerError(f"/proc/self/status has no {field}")


def main() -> None:
    """Measure one length in this process and print it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m homer.bench.memory", description=main.__doc__)
    parser.add_argument("model", help="folder of the bench model")
    parser.add_argument("size", help="its dimensions, as JSON")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("tokens", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    size = BenchSize(**json.loads(arguments.size))
    result = _measure_here(
        arguments.model, size, arguments.method, arguments.tokens, arguments.threads
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
