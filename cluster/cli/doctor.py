"""`homer doctor`: what would happen, before anything is started."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cluster.cli.exit_codes import ExitCode
from cluster.cli.settings import AsJson


def doctor(
    model: Annotated[str, typer.Option(help="Folder or id of a model; only its config is read.")],
    as_json: AsJson = False,
) -> None:
    """Tell whether Homer can run a model, how it would, and what that takes. Loads no weights."""
    import transformers

    from homer.doctor import examine_model

    transformers.utils.logging.set_verbosity_error()
    report = examine_model(model)
    if as_json:
        typer.echo(json.dumps({"model": report.as_json()}))
    else:
        _show(report)
    if not report.supported:
        raise typer.Exit(ExitCode.MISTAKE)


def _show(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from homer.report import add_settings, format_bytes

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("model", f"{report.model} ({report.model_type})")
    if not report.supported:
        table.add_row("supported", f"no: {report.reason}")
        Console().print(table)
        return
    shape, memory = report.shape, report.memory
    table.add_row("supported", "yes" if report.tested else "if it agrees with its own forward pass")
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row(
        "layers",
        f"{shape.num_layers}, {shape.num_heads} heads, {shape.num_kv_heads} of keys and values",
    )
    for name, count in report.local_layers.items():
        table.add_row("", f"{count} of them local: {name} positions")
    add_settings(table, report.config, shape, report.setting_sources)
    table.add_row("KV cache", f"{format_bytes(report.kv_bytes_per_token)} per token")
    if memory is not None:
        table.add_row(
            "memory",
            f"about {format_bytes(memory.total_bytes)} in one process: "
            f"{format_bytes(memory.weight_bytes)} weights, {format_bytes(memory.kv_bytes)} KV for "
            f"a document of {memory.document_tokens:,} tokens, "
            f"{format_bytes(memory.chunk_bytes)} for a running chunk",
        )
    table.add_row("calibrated", "yes" if report.calibrated else "no")
    for note in report.notes:
        table.add_row("note", note)
    Console().print(table)
