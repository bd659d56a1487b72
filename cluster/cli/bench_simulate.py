"""`homer bench costs | simulate`: what work costs here, and what many workers would make of it."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.bench_cluster import parse_numbers
from cluster.cli.bench_output import OUT, Out, machine_facts, measuring, print_table, save_results
from cluster.cli.settings import AsJson
from homer.errors import ConfigError

if TYPE_CHECKING:
    from cluster.sim.grid import Cell
    from cluster.sim.simulate import SimResult

COSTS = Path(__file__).parents[1] / "sim" / "machines" / "bench-cpu.json"
SIM_WORKERS = "1,2,4,8,16,32,64,128,256,512,1024"
SIM_LENGTHS = "32768,262144,1048576,10000000"
FAILURES = "0,60,240,960"


@dataclass(frozen=True)
class FailureOptions:
    """The pool and the requests with which failures are simulated."""

    workers: int = 64
    prompt_tokens: int = 262144
    restart_seconds: float = 30.0
    requests: int = 50


def costs(
    to: Annotated[Path, typer.Option(help="File to write.")] = OUT / "costs.json",
    processes: Annotated[int, typer.Option(help="How many measure side by side.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are kept.", min=1)] = 5,
    derive: Annotated[
        bool, typer.Option(help="From an H100's data sheet instead, for a 7B model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what leaves, merges and tokens of the bench model cost on one thread here."""
    if derive:
        from cluster.sim.derive import GpuSheet, derive_costs
        from homer.shape import ModelShape

        derive_costs(GpuSheet(), ModelShape()).save(to)
        _print_costs(to, as_json)
        return
    import tempfile

    from cluster.bench.costs import measure_costs
    from homer.bench.bench_model import BenchSize, save_bench_model

    with measuring(as_json), tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
        machine, size = machine_facts(), BenchSize()
        save_bench_model(Path(folder), size)
        found = measure_costs(
            Path(folder),
            size.config,
            about="bench model, one CPU thread per worker",
            processes=processes,
            rounds=rounds,
            details={"machine": machine["machine"], "command": "homer bench costs"},
        )
        found.save(to)
        print(
            f"{to}: {len(found.points)} points; the fitted lines differ from them by at most "
            f"{100 * found.largest_error:.0f}%",
            file=sys.stderr,
        )
        _print_costs(to, as_json)


def _print_costs(file: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(json.loads(file.read_text(encoding="utf-8"))))


def simulate(
    costs: Annotated[Path, typer.Option(help="File of costs: homer bench costs.")] = COSTS,
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = SIM_WORKERS,
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = SIM_LENGTHS,
    gigabits: Annotated[float, typer.Option(help="Network card of a host, Gbit/s.")] = 100.0,
    workers_per_host: Annotated[int, typer.Option(help="Workers that share it.", min=1)] = 8,
    failures: Annotated[str, typer.Option(help="Failures per hour of all workers.")] = FAILURES,
    failing_workers: Annotated[int, typer.Option(help="Workers of that scenario.")] = 64,
    failing_tokens: Annotated[int, typer.Option(help="Prompt tokens of its requests.")] = 262144,
    restart_seconds: Annotated[float, typer.Option(help="Until a worker is back.")] = 30.0,
    plot: Annotated[Path | None, typer.Option(help="Picture; else in the folder.")] = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Run the scheduler against workers of virtual time: 1 to 1,024 of them, and some that die."""
    from cluster.sim.network import GIGABIT, NetworkOptions

    network = replace(
        NetworkOptions(), bytes_per_second=gigabits * GIGABIT, workers_per_host=workers_per_host
    )
    with measuring(as_json):
        run_simulations(
            costs,
            parse_numbers(workers),
            parse_numbers(lengths),
            network,
            _parse_rates(failures),
            FailureOptions(failing_workers, failing_tokens, restart_seconds),
            plot or out / "simulate.png",
            out,
        )


def _parse_rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers; write 0,60,240") from error


def run_simulations(
    costs_file: Path,
    workers: list[int],
    lengths: list[int],
    network: Any,
    failures: list[float],
    failing: FailureOptions,
    plot: Path,
    out: Path,
) -> None:
    """Simulate, print both tables, and draw."""
    from cluster.sim import show
    from cluster.sim.costs import Costs
    from cluster.sim.grid import simulate_failures, simulate_grid
    from cluster.sim.simulate import Scenario
    from homer.bench.plot import can_plot

    machine, costs = machine_facts(), Costs.load(costs_file)
    # Every simulated worker that dies would be a warning.
    logging.getLogger("cluster").setLevel(logging.ERROR)

    def on_cell(cell: Cell) -> None:
        scenario = cell.result.scenario
        print(
            f"{scenario.prompt_tokens:,} tokens, {scenario.workers} workers: "
            f"{cell.first_token:.3f} s, {cell.result.real_seconds:.1f} s to simulate",
            file=sys.stderr,
            flush=True,
        )

    def on_result(result: SimResult) -> None:
        print(
            f"{result.scenario.failures_per_hour:g} failures per hour: {result.seconds:.0f} s, "
            f"{result.real_seconds:.1f} s to simulate",
            file=sys.stderr,
            flush=True,
        )

    cells = simulate_grid(costs, workers, lengths, network, on_cell=on_cell)
    print_table(machine, show.grid_table(costs, network, cells))
    scenario = Scenario(
        workers=failing.workers,
        prompt_tokens=failing.prompt_tokens,
        requests=failing.requests,
        concurrent=4,
        new_tokens=64,
        restart_seconds=failing.restart_seconds,
        network=network,
    )
    results = simulate_failures(costs, scenario, failures, on_result=on_result)
    print_table(machine, show.failures_table(results))
    values = [{**asdict(cell.result), "alone": cell.alone, "losses": cell.losses} for cell in cells]
    save_results(out / "simulate.json", machine, [*values, *(asdict(r) for r in results)])
    if can_plot():
        show.plot_grid(costs, cells, plot)
        print(f"plot: {plot}", file=sys.stderr)
    else:
        print("no plot: install matplotlib for one", file=sys.stderr)


def simulate_few(out: Path) -> None:
    """A small grid and few failures."""
    from cluster.sim.network import NetworkOptions

    lengths, workers = [32768, 1048576], [1, 8, 64, 512]
    failing = FailureOptions(requests=20)
    plot = out / "simulate.png"
    run_simulations(COSTS, workers, lengths, NetworkOptions(), [0, 240], failing, plot, out)
