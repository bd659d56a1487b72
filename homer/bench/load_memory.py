"""`python -m homer.bench.load_memory`: what a worker holds with all layers, and with the lowest.

Each loads the same checkpoint in a process of its own, which then reads all of its weights, and
tells what it has resident beside the code. "Twice" loads as one would by hand: a model with random
weights, and a state dict read into it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from homer.bench.bench_model import BenchSize, save_bench_model
from homer.load_options import LoadOptions
from homer.loading import load_model

_STATUS = Path("/proc/self/status")
_MIB = 1 << 20


def main() -> None:
    """Measure loading: all layers, the lowest ones, and by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m homer.bench.load_memory", description=main.__doc__
    )
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--lowest", type=int, default=17, help="layers of a leaf worker")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(_measure(given.here[0], given.here[1], given.lowest)))
        return
    size = BenchSize(layers=given.layers, hidden=given.hidden, intermediate=3 * given.hidden)
    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        file_mib = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / _MIB
        print(f"checkpoint of {given.layers} layers: {file_mib:.0f} MiB")
        print("how         weights   resident   peak while loading   seconds")
        for how in ("all", "lowest", "twice"):
            command = [sys.executable, "-m", "homer.bench.load_memory", "--lowest"]
            command += [str(given.lowest), "--here", folder, how]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            told = json.loads(done.stdout)
            print(
                f"{how:8} {told['weights']:8.0f} MiB {told['resident']:6.0f} MiB "
                f"{told['peak']:16.0f} MiB {told['seconds']:9.2f}"
            )


def _measure(folder: str, how: str, lowest: int) -> dict[str, float]:
    disable_progress_bar()
    before, started = _status_mib("VmRSS"), time.perf_counter()
    if how == "twice":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    else:
        layers = lowest if how == "lowest" else None
        model = load_model(folder, LoadOptions(device="cpu", lower_layers=layers))
    # Weights are mapped from the file, and count from when they are first read.
    for weights in model.parameters():
        weights.detach().sum()
    seconds, peak = time.perf_counter() - started, _status_mib("VmHWM")
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / _MIB
    return {
        "weights": size,
        "resident": _status_mib("VmRSS") - before,
        "peak": peak - before,
        "seconds": seconds,
    }


def _status_mib(field: str) -> float:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    return int(lines[field].split()[0]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
