"""What every measurement of `homer bench` prints and saves: its command, the machine, the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.settings import ended_by_signals

OUT = Path("out/bench")

Out = Annotated[Path, typer.Option(help="Folder for JSON, plots and single answers.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths: multiples of the window, or tokens.")]
Threads = Annotated[int, typer.Option(help="CPU threads of each process.", min=1)]


# Whether results are printed as JSON and not as tables.
_AS_JSON = ContextVar("_AS_JSON", default=False)


@contextmanager
def measuring(as_json: bool) -> Iterator[None]:
    """Only what is measured is printed; SIGTERM ends child processes as well."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    before = _AS_JSON.set(as_json)
    try:
        with ended_by_signals():
            yield
    finally:
        _AS_JSON.reset(before)


def machine_facts() -> dict[str, Any]:
    """The machine as one line and in parts."""
    from homer.bench.machine import Machine

    machine = Machine.here()
    return {"machine": str(machine), **asdict(machine)}


def print_table(machine: dict[str, Any], table: Any) -> None:
    """The command, the machine, and a table; nothing where JSON is wanted."""
    if _AS_JSON.get():
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(f"$ {_command()}", highlight=False, markup=False, soft_wrap=True)
    console.print(machine["machine"], highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def save_results(path: Path, machine: dict[str, Any], results: Any) -> None:
    """The same as JSON: into a file, and where that is wanted to stdout, in one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": _command(), "machine": machine, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if _AS_JSON.get():
        print(json.dumps(content), flush=True)


def _command() -> str:
    return " ".join(["homer", *sys.argv[1:]])
