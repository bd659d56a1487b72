"""What every measurement of `homer bench` prints and saves: its command, the machine, the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.settings import ended_by_signals

OUT = Path("out/bench")

Out = Annotated[Path, typer.Option(help="Folder for JSON, plots and single answers.")]


@contextmanager
def measuring() -> Iterator[None]:
    """Only what is measured is printed; SIGTERM ends child processes as well."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with ended_by_signals():
        yield


def machine_facts() -> dict[str, Any]:
    """The machine as one line and in parts."""
    from homer.bench.machine import Machine

    machine = Machine.here()
    return {"machine": str(machine), **asdict(machine)}


def print_table(machine: dict[str, Any], table: Any) -> None:
    """The command, the machine, and a table."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(f"$ {_command()}", highlight=False, markup=False, soft_wrap=True)
    console.print(machine["machine"], highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def save_results(path: Path, machine: dict[str, Any], results: Any) -> None:
    """The same as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": _command(), "machine": machine, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _command() -> str:
    return " ".join(["homer", *sys.argv[1:]])
