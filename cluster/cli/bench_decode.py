"""`homer bench decode`: several answers decoded together, beside one alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli.bench_output import OUT, Out, machine_facts, measuring, print_table, save_results
from cluster.cli.settings import AsJson


def decode(
    answers: Annotated[int, typer.Option(help="Answers decoded together.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=2)] = 64,
    runs: Annotated[int, typer.Option(help="Rounds, one and all in turn.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time answers decoded together beside one alone, on a model of 12 random layers."""
    with measuring(as_json):
        _decode(answers, tokens, runs, threads, out)


def _decode(answers: int, tokens: int, runs: int, threads: int, out: Out) -> None:
    from rich.table import Table

    from homer.bench.decoding import measure_decode

    machine = machine_facts()
    result = measure_decode(answers, tokens, runs=runs, threads=threads)
    table = Table(
        title=f"Answers of {tokens} tokens decoded together",
        caption=f"{threads} thread(s); best of {runs} rounds in turn; the ratio is the median of "
        f"each round's; same tokens as alone: {'yes' if result.same_tokens else 'NO'}",
    )
    for title in ("answers", "tokens per second", "of one alone"):
        table.add_column(title, justify="right")
    one = tokens / min(result.alone_seconds)
    table.add_row("1", f"{one:.1f}", "1.00")
    several = answers * tokens / min(result.together_seconds)
    table.add_row(str(answers), f"{several:.1f}", f"{result.ratio:.2f}")
    print_table(machine, table)
    save_results(out / "decode.json", machine, {**asdict(result), "ratio": result.ratio})
