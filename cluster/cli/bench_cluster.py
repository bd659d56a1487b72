"""`homer bench scaling | overhead | wire | worker-memory`: workers and service on this machine."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.bench_output import OUT, Out, machine_facts, measuring, print_table, save_results
from cluster.cli.settings import AsJson
from homer.config import PlanKind

if TYPE_CHECKING:
    from cluster.bench.scaling import JobTimes

SCALING_LENGTHS = "16384,65536"
MEMORY_LENGTHS = "16384,32768,65536,131072"
WORKERS = "1,2"
WIRE_WORKERS = "2,3,4"

Lengths = Annotated[str, typer.Option(help="Prompt tokens, prefix and question included.")]
Tokens = Annotated[int, typer.Option(help="Prompt tokens, prefix and question included.", min=64)]
Runs = Annotated[int, typer.Option(help="Rounds; each runs every way once.", min=1)]
Workers = Annotated[str, typer.Option(help="Numbers of workers; the first must be 1.")]
WireWorkers = Annotated[str, typer.Option(help="Numbers of workers.")]


def scaling(
    lengths: Lengths = SCALING_LENGTHS,
    workers: Workers = WORKERS,
    runs: Runs = 3,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time one and more workers beside what the tree allows, and check the simulator by them."""
    with measuring(as_json):
        measure_scaling(lengths, workers, runs, out)


def overhead(
    tokens: Tokens = 1024,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 32,
    runs: Runs = 25,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time a service of one worker beside the same work in one process."""
    with measuring(as_json):
        measure_overhead(tokens, new_tokens, runs, out)


def wire(
    tokens: Tokens = 16384,
    workers: WireWorkers = WIRE_WORKERS,
    model: Annotated[str | None, typer.Option(help="Model folder; else the bench model.")] = None,
    plan: Annotated[PlanKind, typer.Option(help="How the context is cut.")] = "balanced",
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Count the bytes between workers, beside the least that must travel."""
    with measuring(as_json):
        measure_wire(tokens, workers, out, plan, model)


def worker_memory(
    lengths: Lengths = MEMORY_LENGTHS,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 2,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure the peak memory of each worker by the length of the document."""
    with measuring(as_json):
        measure_worker_memory(lengths, workers, out)


def measure_scaling(lengths: str, workers: str, runs: int, out: Path) -> None:
    """Measure the machine's costs, real runs and simulated ones, and print all of it."""
    import tempfile

    from cluster.bench import scaling, show
    from cluster.bench.costs import measure_costs
    from cluster.sim.simulate import Scenario, make_plan, simulate
    from homer.bench.bench_model import BenchSize, save_bench_model

    machine, size, counts = machine_facts(), BenchSize(), parse_numbers(workers)

    def on_run(tokens: int, times: JobTimes) -> None:
        _say(f"{tokens:,} tokens, {times.workers} worker(s): {times.first_token:.2f} s")

    with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        save_bench_model(Path(folder), size)
        costs = {}
        for count in counts:
            _say(f"costs of nodes in {count} process(es)")
            costs[count] = measure_costs(Path(folder), size.config, about="", processes=count)
        rows = scaling.measure_scaling(
            Path(folder), size, parse_numbers(lengths), counts, runs=runs, on_run=on_run
        )
    simulated, apart = {}, {}
    for row in rows:
        scenario = Scenario(workers=row.workers, prompt_tokens=row.tokens)
        simulated[row.tokens, row.workers] = simulate(costs[row.workers], scenario).first_token
        plan = make_plan(costs[1], row.tokens)
        alone, beside = (
            sum(costs[n].node_seconds(plan, node) for node in plan.nodes) for n in (1, row.workers)
        )
        apart[row.workers] = beside / alone
    print_table(machine, show.scaling_table(rows, apart, simulated))
    event = statistics.median(row.event_seconds for row in rows)
    _say(f"processor time of the scheduler's process for each event: {1e3 * event:.2f} ms")
    values = [
        {
            "tokens": row.tokens,
            "workers": row.workers,
            "seconds": row.seconds,
            "median_seconds": row.median_seconds,
            "speedup": row.speedup,
            "ideal_speedup": row.ideal_speedup,
            "of_ideal": row.efficiency,
            "nodes_slower": row.slowdown,
            "apart_slower": apart[row.workers],
            "without_core": row.waited,
            "event_seconds": row.event_seconds,
            "simulated_seconds": simulated[row.tokens, row.workers],
            "rounds": [run.first_token for run in row.runs],
        }
        for row in rows
    ]
    save_results(out / "scaling.json", machine, values)


def measure_overhead(tokens: int, new_tokens: int, runs: int, out: Path) -> None:
    """Measure and print what a service adds."""
    from cluster.bench import overhead, show

    machine = machine_facts()
    result = overhead.measure_overhead(
        tokens,
        new_tokens,
        runs=runs,
        on_run=lambda alone, service: _say(
            f"first token: one process {1e3 * alone.first_token:.1f} ms, "
            f"service {1e3 * service.first_token:.1f} ms"
        ),
    )
    print_table(machine, show.overhead_table(result))
    save_results(out / "overhead.json", machine, asdict(result))


def measure_wire(
    tokens: int, workers: str, out: Path, plan: PlanKind = "balanced", model: str | None = None
) -> None:
    """Count and print the bytes of a request."""
    from cluster.bench import show, wire
    from homer.bench.bench_model import BenchSize

    machine, counts = machine_facts(), parse_numbers(workers)
    _say(f"bytes of a request of {tokens:,} tokens on {workers} workers")
    if model is None:
        results = wire.measure_wire(tokens, counts, size=BenchSize(plan=plan))
    else:
        results = wire.measure_model_wire(model, tokens, counts, plan)
    print_table(machine, show.wire_table(results))
    save_results(out / "wire.json", machine, [{**asdict(r), "ratio": r.ratio} for r in results])


def measure_worker_memory(lengths: str, workers: int, out: Path) -> None:
    """Measure and print each worker's memory."""
    from cluster.bench import show, worker_memory

    machine = machine_facts()
    results = worker_memory.measure_worker_memory(
        parse_numbers(lengths),
        workers,
        on_start=lambda tokens: _say(f"memory of {workers} workers at {tokens:,} tokens"),
    )
    fit = worker_memory.LogFit.of(results)
    print_table(machine, show.worker_memory_table(results, fit))
    values = [{**asdict(r), "above_bytes": r.above_bytes} for r in results]
    save_results(out / "worker-memory.json", machine, values)


def parse_numbers(text: str) -> list[int]:
    """Whole numbers from a list such as `1,2,4`.

    Raises
    ------
    ConfigError
        For what is none.
    """
    from homer.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"{text!r} is no list of numbers; write 1,2,4")
    return numbers


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
