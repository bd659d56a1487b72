"""`homer bench`: measures speed, memory, transfer and answers, and says on what.

Tables on stdout, progress on stderr; JSON, plots and single answers in a folder.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import (
    bench_cluster,
    bench_decode,
    bench_offload,
    bench_quality,
    bench_simulate,
)
from cluster.cli.bench_output import (
    OUT,
    Lengths,
    Out,
    Threads,
    machine_facts,
    measuring,
    print_table,
    save_results,
)
from cluster.cli.bench_quality import Model, QualityOptions
from cluster.cli.settings import AsJson

if TYPE_CHECKING:
    pass

SPEED_LENGTHS = "8192,16384"
MEMORY_LENGTHS = "8192,32768"

app = typer.Typer(
    help="Measure speed, memory, transfer, answers and scaling.", no_args_is_help=True
)
app.command()(bench_decode.decode)
app.command()(bench_offload.offload)
app.command()(bench_cluster.scaling)
app.command()(bench_cluster.overhead)
app.command()(bench_cluster.wire)
app.command()(bench_cluster.worker_memory)
app.command()(bench_simulate.costs)
app.command()(bench_simulate.simulate)
app.command()(bench_quality.passkey)
app.command()(bench_quality.multikey)

Runs = Annotated[int, typer.Option(help="Rounds; each runs every method once.", min=1)]


@app.command()
def speed(
    lengths: Lengths = SPEED_LENGTHS,
    runs: Runs = 3,
    threads: Threads = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time compression beside full attention, on a model of 12 random layers."""
    with measuring(as_json):
        _speed(lengths, runs, threads, out)


@app.command()
def memory(
    lengths: Lengths = MEMORY_LENGTHS,
    methods: Annotated[str, typer.Option(help="Which of: homer, paper, plain.")] = "homer,paper",
    threads: Threads = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure peak memory above the loaded model, in a fresh process for each length."""
    with measuring(as_json):
        _memory(lengths, methods, threads, out)


@app.command()
def transport(
    megabytes: Annotated[int, typer.Option(help="MiB per run.", min=16)] = 512,
    runs: Runs = 9,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time the tensor stream between workers beside a raw TCP socket and a copy in memory."""
    with measuring(as_json):
        _transport(megabytes, runs, out)


@app.command("wire-dtype")
def wire_dtype(
    prompts: Annotated[int, typer.Option(help="Pass-key prompts.", min=1)] = 20,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure what narrower types between workers cost in accuracy, and the bytes they save."""
    with measuring(as_json):
        _wire_dtype(prompts, out)


@app.command("all")
def everything(model: Model = None, out: Out = OUT, as_json: AsJson = False) -> None:
    """All of it with few samples, in about 15 minutes on two cores."""
    few = QualityOptions(
        model=model, lengths="0.75x,8x,64x", samples=10, plain_max_length="8x", out=out
    )
    with measuring(as_json):
        _speed(SPEED_LENGTHS, 1, 1, out)
        _memory(MEMORY_LENGTHS, "homer,paper", 1, out)
        bench_cluster.measure_scaling(bench_cluster.SCALING_LENGTHS, "1,2", 1, out)
        bench_cluster.measure_overhead(1024, 32, 12, out)
        bench_cluster.measure_wire(16384, bench_cluster.WIRE_WORKERS, out)
        bench_cluster.measure_worker_memory("16384,65536", 2, out)
        _transport(512, 5, out)
        _wire_dtype(10, out)
        bench_offload.measure_batches(bench_offload.OFFLOAD_TOKENS, [1, 0], 1, out)
        bench_simulate.simulate_few(out)
        bench_quality.measure_quality("passkey", few)
        bench_quality.measure_quality("multikey", few)


def _speed(lengths: str, runs: int, threads: int, out: Path) -> None:
    from homer.bench.bench_model import BenchSize
    from homer.bench.quality_run import parse_lengths
    from homer.bench.show import speed_table
    from homer.bench.speed import measure_speed

    machine = machine_facts()
    results = measure_speed(
        parse_lengths(lengths, BenchSize().window), runs=runs, threads=threads, on_run=_say_run
    )
    print_table(machine, speed_table(results))
    save_results(out / "speed.json", machine, [asdict(result) for result in results])


def _say_run(tokens: int, method: str, seconds: float) -> None:
    print(f"{tokens:,} tokens, {method}: {seconds:.2f} s", file=sys.stderr, flush=True)


def _memory(lengths: str, methods: str, threads: int, out: Path) -> None:
    from homer.bench.bench_model import BenchSize
    from homer.bench.memory import measure_memory
    from homer.bench.quality_run import parse_lengths
    from homer.bench.show import memory_table

    machine = machine_facts()
    results = measure_memory(
        parse_lengths(lengths, BenchSize().window),
        methods.split(","),
        threads=threads,
        on_start=lambda tokens, method: print(
            f"memory of {method} at {tokens:,} tokens", file=sys.stderr, flush=True
        ),
    )
    results.sort(key=lambda result: result.method)
    print_table(machine, memory_table(results))
    values = [{**asdict(r), "above_bytes": r.above_bytes} for r in results]
    save_results(out / "memory.json", machine, values)


def _wire_dtype(prompts: int, out: Path) -> None:
    from rich.table import Table

    from workers.wire_bench import measure

    machine = machine_facts()
    print(f"types on the wire, {prompts} prompts", file=sys.stderr, flush=True)
    costs = measure(prompts=prompts)
    table = Table(
        title="The demo model on two workers, by the type in which floats travel",
        caption=f"{prompts} pass-key prompts; beside float32 as it is",
    )
    for title in ("wire", "bytes", "logits: worst", "mean", "equal tokens", "equal kept tokens"):
        table.add_column(title, justify="left" if title == "wire" else "right")
    for cost in costs:
        table.add_row(
            cost.wire_dtype,
            f"{cost.share_of_bytes:.1%}",
            f"{cost.worst_logit_difference:.4f}",
            f"{cost.mean_logit_difference:.4f}",
            f"{cost.token_agreement:.1%}",
            f"{cost.kept_agreement:.1%}",
        )
    print_table(machine, table)
    save_results(out / "wire-dtype.json", machine, [asdict(cost) for cost in costs])


def _transport(megabytes: int, runs: int, out: Path) -> None:
    from rich.table import Table

    from workers.bench import measure

    machine = machine_facts()
    print(f"transport of {megabytes} MiB, {runs} runs", file=sys.stderr, flush=True)
    result = measure(megabytes, runs)
    table = Table(
        title=f"{result.megabytes} MiB between two processes on loopback",
        caption=f"medians of {result.runs} runs in turn; ratios are those of neighbouring runs",
    )
    for title in ("way", "GB/s", "of raw TCP"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for way, gb_per_second, ratio in result.rows:
        table.add_row(way, f"{gb_per_second:.2f}", f"{ratio:.2f}")
    print_table(machine, table)
    save_results(out / "transport.json", machine, asdict(result))
