"""Measurements as tables. Draws with rich; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from homer.bench.memory import MemoryResult
from homer.bench.quality_run import QualityRun
from homer.bench.results import Cell
from homer.bench.speed import METHODS, SpeedResult


def speed_table(results: Sequence[SpeedResult]) -> Table:
    """Seconds to the first token, and the ratio to full attention."""
    runs, threads = len(results[0].timings["plain"]), results[0].threads
    table = Table(
        title="Seconds from token ids to the first token",
        caption=f"{threads} thread(s); medians of {runs} rounds in which all methods took turns; "
        "ratios are medians of each round's ratio; processor time leaves out waiting for others",
    )
    table.add_column("prompt tokens", justify="right")
    for method in METHODS:
        table.add_column(method, justify="right")
    for title in ("homer / plain", "paper / plain"):
        table.add_column(title, justify="right")
    for title in ("homer / plain\nprocessor time", "paper / plain\nprocessor time"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            f"{result.tokens:,}",
            *(f"{result.median_seconds(method):.2f}" for method in METHODS),
            *(f"{result.ratio(method):.3f}" for method in ("homer", "paper")),
            *(f"{result.cpu_ratio(method):.3f}" for method in ("homer", "paper")),
        )
    return table


def memory_table(results: Sequence[MemoryResult]) -> Table:
    """Peak memory above the loaded model, and how it grows with the length."""
    table = Table(
        title="Peak memory above the loaded model",
        caption=f"{results[0].threads} thread(s); a fresh process for each row",
    )
    table.add_column("method")
    for title in ("prompt tokens", "MB above the model", "of the shortest", "MB model and code"):
        table.add_column(title, justify="right")
    for result in results:
        first = next(other for other in results if other.method == result.method)
        table.add_row(
            result.method,
            f"{result.tokens:,}",
            f"{result.above_bytes / 1e6:.1f}",
            f"{result.above_bytes / first.above_bytes:.2f}",
            f"{result.loaded_bytes / 1e6:.0f}",
        )
    return table


def quality_table(run: QualityRun, cells: Sequence[Cell]) -> Table:
    """Right answers in percent with their 95% intervals, a line per length."""
    title = f"{run.task}: right answers" + (
        f" ({run.keys} keys in the text)" if run.task == "multikey" else ""
    )
    table = Table(
        title=title,
        caption=f"exact match, greedy, {run.dtype} weights; 95% interval (Wilson) and number of "
        "samples; 'key kept': all tokens of the key were in the cache",
        show_lines=True,
    )
    table.add_column("prompt tokens", justify="right")
    for method in run.methods:
        table.add_column(method.name, justify="right")
    found = {(cell.length, cell.method): cell for cell in cells}
    for length in sorted(set(run.lengths)):
        entries = [found.get((length, method.name)) for method in run.methods]
        row = [_entry(cell, method.kind) for cell, method in zip(entries, run.methods, strict=True)]
        table.add_row(f"{length:,}\n{window_multiple(length, run.window)} window", *row)
    return table


def window_multiple(length: int, window: int) -> str:
    """A length in windows: `0.75x`, `8x`."""
    return f"{length / window:.4g}x"


def _entry(cell: Cell | None, kind: str) -> str:
    if cell is None:
        return "not run"
    low, high = cell.interval
    lines = [
        f"{100 * cell.share:.0f}%",
        f"{100 * low:.0f}–{100 * high:.0f}, n {cell.samples}",
        f"{cell.seconds:.2f} s each",
    ]
    if kind in ("homer", "truncation"):
        lines.append(f"key kept {100 * cell.keys_kept / cell.samples:.0f}%")
    return "\n".join(lines)
