"""Simulations as tables and as a picture. Simulates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cluster.sim.costs import Costs
from cluster.sim.grid import Cell
from cluster.sim.network import NetworkOptions
from cluster.sim.simulate import SimResult
from homer.errors import ConfigError


def grid_table(costs: Costs, network: NetworkOptions, cells: Sequence[Cell]) -> Table:
    """Efficiency, time to the first token, bytes, and what holds each cell back."""
    table = Table(
        title=f"One request on an idle pool, simulated: {costs.about}"
        + ("" if costs.measured else " (derived, not measured)"),
        caption=f"hosts of {network.workers_per_host} workers, "
        f"{network.bytes_per_second / 1e9:g} GB/s between them; efficiency: time of one worker / "
        "(workers x time); of ideal: best schedule of the tree / time; coordinator: part of the "
        "time in which it is busy; next bottleneck: what takes most of the time that is not an "
        "even share of the work",
    )
    for title in ("prompt tokens", "workers", "first token, s", "speed-up", "efficiency"):
        table.add_column(title, justify="right")
    for title in ("of ideal", "MB moved", "coordinator"):
        table.add_column(title, justify="right")
    table.add_column("next bottleneck")
    for cell in cells:
        seconds, scenario = cell.first_token, cell.result.scenario
        table.add_row(
            f"{scenario.prompt_tokens:,}",
            f"{scenario.workers:,}",
            f"{seconds:.3f}" if seconds < 100 else f"{seconds:,.0f}",
            f"{cell.alone / seconds:.1f}",
            f"{100 * cell.efficiency:.1f}%",
            f"{cell.of_ideal:.2f}",
            f"{cell.result.moved_bytes / 1e6:,.1f}",
            f"{100 * cell.result.coordinator_busy_seconds / cell.result.seconds:.0f}%",
            f"{cell.bottleneck}, {1e3 * cell.losses[cell.bottleneck]:,.0f} ms",
        )
    return table


def failures_table(results: Sequence[SimResult]) -> Table:
    """What dying workers cost."""
    scenario = results[0].scenario
    table = Table(
        title=f"Workers that die, simulated: {scenario.requests} requests of "
        f"{scenario.prompt_tokens:,} tokens on {scenario.workers} workers, "
        f"{scenario.concurrent} at a time",
        caption=f"a worker that died is back after {scenario.restart_seconds:g} s; work: what all "
        "workers computed, lost work included, and throughput: against no failures",
    )
    for title in ("failures per hour", "failures", "requests failed", "nodes run again"):
        table.add_column(title, justify="right")
    for title in ("hours", "tokens/s"):
        table.add_column(title, justify="right")
    for title in ("first token, median s", "longest s", "work", "throughput"):
        table.add_column(title, justify="right")
    first = results[0]
    for result in results:
        tokens = scenario.prompt_tokens * scenario.requests
        table.add_row(
            f"{result.scenario.failures_per_hour:,g}",
            str(result.failures),
            str(result.failed_requests),
            f"{result.retried_nodes:,}",
            f"{result.seconds / 3600:.2f}",
            f"{tokens / result.seconds:,.0f}",
            f"{result.first_token:.2f}",
            f"{max(result.first_token_seconds):.2f}",
            f"{100 * result.work_seconds / first.work_seconds:.1f}%",
            f"{100 * first.seconds / result.seconds:.1f}%",
        )
    return table


def plot_grid(costs: Costs, cells: Sequence[Cell], path: Path) -> None:
    """Speed-up and time to the first token by workers; the ending of `path` chooses the format.

    Raises
    ------
    ConfigError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speedups, times = figure.subplots(1, 2)
    lengths = sorted({cell.result.scenario.prompt_tokens for cell in cells})
    colors = ["#0891b2", "#7c3aed", "#c2410c", "#15803d", "#475569", "#be185d"]
    counts = sorted({cell.result.scenario.workers for cell in cells})
    speedups.plot(counts, counts, color="#94a3b8", linestyle=":", linewidth=1, label="linear")
    for color, tokens in zip(colors * len(lengths), lengths, strict=False):
        mine = [cell for cell in cells if cell.result.scenario.prompt_tokens == tokens]
        workers = [cell.result.scenario.workers for cell in mine]
        style = {"color": color, "marker": "o", "markersize": 3.5, "linewidth": 1.6}
        speedups.plot(
            workers, [c.alone / c.first_token for c in mine], label=f"{tokens:,} tokens", **style
        )
        ideal = [c.tree.work / c.tree.best for c in mine]
        speedups.plot(workers, ideal, color=color, linestyle="--", linewidth=0.8)
        times.plot(workers, [c.first_token for c in mine], label=f"{tokens:,} tokens", **style)
    speedups.set_ylabel("speed-up over one worker (dashed: what the tree allows)")
    times.set_ylabel("seconds to the first token")
    for axes in (speedups, times):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("workers")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    kind = "simulated" if costs.measured else "simulated, costs derived and not measured"
    figure.suptitle(f"One request on an idle pool, {kind}: {costs.about}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
