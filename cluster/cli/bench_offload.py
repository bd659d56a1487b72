"""`homer bench offload`: weights that lie on disk, brought in for one leaf or for several."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli.bench_output import OUT, Out, machine_facts, measuring, print_table, save_results
from cluster.cli.settings import AsJson

OFFLOAD_TOKENS = 8192
BATCH_SIZES = "1,2,4,8,0"


def offload(
    tokens: Annotated[int, typer.Option(help="Prompt tokens.", min=64)] = OFFLOAD_TOKENS,
    batch_sizes: Annotated[
        str, typer.Option(help="Leaves that run together; 0: as many as memory has room for.")
    ] = BATCH_SIZES,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Count the bytes of weights moved per leaf, with all layers of a model of 12 on disk."""
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise typer.BadParameter("batch sizes are numbers, like 1,4,0") from error
    with measuring(as_json):
        measure_batches(tokens, sizes, threads, out)


def measure_batches(tokens: int, sizes: list[int], threads: int, out: Out) -> None:
    """What `offload` does."""
    from rich.table import Table

    from homer.bench.offload import measure_offload

    machine = machine_facts()
    results = measure_offload(tokens, sizes, threads=threads, on_run=_say_run)
    table = Table(
        title=f"Weights brought in from disk: {tokens:,} tokens, {results[0].leaves} leaves",
        caption=f"{threads} thread(s); one run each, seconds in memory the fastest of three; "
        "prefix, merges and question included; all numbers as in memory: "
        f"{'yes' if all(one.same for one in results) else 'NO'}",
    )
    for title in (
        "leaves together",
        "MiB moved",
        "MiB per leaf",
        "of the first",
        "seconds",
        "in memory",
    ):
        table.add_column(title, justify="right")
    for one in results:
        table.add_row(
            str(one.leaf_batch_size or "by memory"),
            f"{one.moved_bytes / (1 << 20):,.1f}",
            f"{one.bytes_per_leaf / (1 << 20):.1f}",
            f"{one.moved_bytes / results[0].moved_bytes:.2f}",
            f"{one.seconds:.2f}",
            f"{one.seconds_in_memory:.2f}",
        )
    print_table(machine, table)
    values = [{**asdict(one), "bytes_per_leaf": one.bytes_per_leaf} for one in results]
    save_results(out / "offload.json", machine, values)


def _say_run(batch_size: int, seconds: float) -> None:
    name = batch_size or "as many as there is room for"
    print(f"leaves together: {name}, {seconds:.2f} s", file=sys.stderr, flush=True)
