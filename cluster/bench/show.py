"""Measurements of workers and service as tables. Draws with rich; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from cluster.bench.overhead import OverheadResult
from cluster.bench.scaling import ScalingRow
from cluster.bench.wire import WireResult
from cluster.bench.worker_memory import LogFit, WorkerMemory


def scaling_table(
    rows: Sequence[ScalingRow],
    side_by_side: Mapping[int, float],
    simulated: Mapping[tuple[int, int], float],
) -> Table:
    """Time to the first token by workers, beside what the tree allows and the simulator says.

    `side_by_side` says by how much the same work is slower in so many processes that know nothing
    of each other; `simulated` are seconds by tokens and workers.
    """
    runs = len(rows[0].runs)
    table = Table(
        title="Time to the first token by workers of one thread each",
        caption=f"fastest of {runs} rounds in which the numbers of workers took turns; ideal: "
        "work / best schedule of the nodes as one worker timed them; nodes slower: the same nodes "
        "against one worker; apart: against one process in as many that share no work; no core: "
        "part of the time in which a worker was ready and did not run, other programs included; "
        "simulated: the same scheduler in virtual time, from costs measured in the same run",
    )
    for title in (
        "prompt\ntokens",
        "workers",
        "seconds",
        "median",
        "speed-up",
        "ideal",
        "of\nideal",
    ):
        table.add_column(title, justify="right")
    for title in ("nodes\nslower", "apart", "no core", "MB", "simu-\nlated", "simulated\n/ real"):
        table.add_column(title, justify="right")
    for row in rows:
        seconds = simulated[row.tokens, row.workers]
        table.add_row(
            f"{row.tokens:,}",
            str(row.workers),
            f"{row.seconds:.2f}",
            f"{row.median_seconds:.2f}",
            f"{row.speedup:.2f}",
            f"{row.ideal_speedup:.2f}",
            f"{row.efficiency:.2f}",
            f"{100 * (row.slowdown - 1):.1f}%",
            f"{100 * (side_by_side[row.workers] - 1):.1f}%",
            f"{100 * row.waited:.1f}%",
            f"{row.runs[-1].moved_bytes / 1e6:.1f}",
            f"{seconds:.2f}",
            f"{seconds / row.seconds:.2f}",
        )
    return table


def overhead_table(result: OverheadResult) -> Table:
    """What client, coordinator and worker add."""
    runs = len(result.service)
    table = Table(
        title=f"Service beside one process: {result.tokens:,} prompt tokens, "
        f"{result.new_tokens} new ones",
        caption=f"medians of {runs} rounds in which both took turns; added: medians of each "
        "round's difference; added around the work: the same without the seconds of nodes and "
        "refreshed suffix, as each process timed its own",
    )
    for title in ("", "one process", "service", "added", "added around the work"):
        table.add_column(title, justify="right")
    first_alone, first = result.medians(lambda times: times.first_token)
    token_alone, token = result.medians(lambda times: times.per_token)
    table.add_row(
        "time to the first token, ms",
        f"{1e3 * first_alone:.1f}",
        f"{1e3 * first:.1f}",
        f"{1e3 * result.first_token_seconds:.1f}",
        f"{1e3 * result.around_work_seconds:.1f}",
    )
    table.add_row(
        "each further token, ms",
        f"{1e3 * token_alone:.2f}",
        f"{1e3 * token:.2f}",
        f"{1e3 * result.per_token_seconds:.2f}",
        "",
    )
    return table


def wire_table(results: Sequence[WireResult]) -> Table:
    """Bytes between workers, beside the lower bound."""
    table = Table(
        title="Bytes that one request moves between workers",
        caption="least: the states and surviving KV rows that shares as large as these must move, "
        "without any header; sent: as the workers count them, message by message",
    )
    for title in ("prompt tokens", "workers", "states moved", "least, bytes", "sent, bytes"):
        table.add_column(title, justify="right")
    table.add_column("sent / least", justify="right")
    for result in results:
        table.add_row(
            f"{result.tokens:,}",
            str(result.workers),
            str(result.states_moved),
            f"{result.least:,}",
            f"{result.sent:,}",
            f"{result.ratio:.4f}",
        )
    return table


def worker_memory_table(results: Sequence[WorkerMemory], fit: LogFit) -> Table:
    """Peak memory of each worker by length."""
    workers = len(results[0].peak_bytes)
    table = Table(
        title=f"Peak memory of each of {workers} workers above the loaded model",
        caption=f"fresh workers for each row; mean of the workers = {fit.at_first / 1e6:.1f} MB + "
        f"{fit.per_doubling / 1e6:.1f} MB for each doubling of the length, within "
        f"{100 * fit.largest_error:.0f}%",
    )
    for title in ("prompt tokens", "leaves", "levels"):
        table.add_column(title, justify="right")
    for number in range(workers):
        table.add_column(f"worker-{number}, MB", justify="right")
    table.add_column("mean, of the shortest", justify="right")
    first = sum(results[0].above_bytes)
    for result in results:
        table.add_row(
            f"{result.tokens:,}",
            str(result.leaves),
            str(result.levels),
            *(f"{above / 1e6:.1f}" for above in result.above_bytes),
            f"{sum(result.above_bytes) / first:.2f}",
        )
    return table
