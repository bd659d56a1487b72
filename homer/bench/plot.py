"""Right answers by length as a picture. Draws with matplotlib; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from homer.bench.quality_run import QualityRun
from homer.bench.results import Cell
from homer.bench.show import window_multiple
from homer.errors import ConfigError

_COLORS = {
    "homer": "#c2410c",
    "paper": "#d9a441",
    "plain": "#475569",
    "truncation": "#7c3aed",
    "yarn": "#0891b2",
}
_OTHER_COLORS = ("#15803d", "#be185d", "#4d7c0f", "#1d4ed8", "#854d0e")
_MARKERS = "osD^vPX*"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_quality(run: QualityRun, cells: Sequence[Cell], path: Path) -> None:
    """Write a picture of all methods side by side; the ending of `path` chooses the format.

    Raises
    ------
    ConfigError
        Without matplotlib.
    """
    if not can_plot():
        raise ConfigError("plots need matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    others = iter(_OTHER_COLORS * len(run.methods))
    for number, method in enumerate(run.methods):
        mine = [cell for cell in cells if cell.method == method.name]
        if not mine:
            continue
        # Lines that lie on each other stay apart by a hair.
        shift = 1.02 ** (number - (len(run.methods) - 1) / 2)
        below = [100 * (cell.share - cell.interval[0]) for cell in mine]
        above = [100 * (cell.interval[1] - cell.share) for cell in mine]
        counts = sorted({cell.samples for cell in mine})
        samples = "–".join(str(count) for count in (counts[:1] + counts[1:][-1:]))
        axes.errorbar(
            [cell.length * shift for cell in mine],
            [100 * cell.share for cell in mine],
            yerr=[[max(0.0, b) for b in below], [max(0.0, a) for a in above]],
            label=f"{method.name} (n {samples})",
            color=_COLORS.get(method.name) or next(others),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            capsize=2,
            linewidth=2 if method.name == "homer" else 1.3,
        )
    lengths = sorted(set(run.lengths))
    axes.axvline(run.window, color="#94a3b8", linestyle=":", linewidth=1)
    axes.annotate(" window", (run.window, 50), color="#64748b", fontsize=8, rotation=90)
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        lengths, [f"{n:,}\n{window_multiple(n, run.window)}" for n in lengths], fontsize=8
    )
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("prompt tokens, and windows of the model")
    axes.set_ylabel("right answers, %")
    keys = f", {run.keys} keys in the text" if run.task == "multikey" else ""
    axes.set_title(f"{run.task}{keys}: exact match with 95% interval", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
