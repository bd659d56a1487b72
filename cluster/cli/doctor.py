"""`homer doctor`: what would happen, before anything is started."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.exit_codes import ExitCode
from cluster.cli.load_settings import reads_a_config
from cluster.cli.settings import DEFAULTS, AsJson, Cpu
from cluster.errors import PlacementError
from homer.load_options import LoadOptions

if TYPE_CHECKING:
    from cluster.machine_checks import Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@reads_a_config
def doctor(
    *,
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a model; only its config is read.")
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Longest document; by default 16 times the model's window.", min=1),
    ] = None,
    cpu: Cpu = False,
    host: Annotated[str, typer.Option(help="Address of homer serve.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port of homer serve.")] = DEFAULTS.port,
    address: Annotated[
        str | None,
        typer.Option(
            help="A running Ray cluster (host:port, or auto), whose nodes are checked too.",
            envvar="RAY_ADDRESS",
        ),
    ] = None,
    load: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Check this machine, a model and a cluster, and say what to change. Loads no weights."""
    import transformers

    from homer.doctor import examine_model

    transformers.utils.logging.set_verbosity_error()
    report = None if model is None else examine_model(model, context_tokens, **load.hub)
    checks = _check(report, cpu, host, port, address)
    if as_json:
        told = {"checks": [asdict(check) for check in checks]}
        model_told = {} if report is None else {"model": report.as_json()}
        typer.echo(json.dumps({**model_told, **told}))
    else:
        if report is not None:
            _show(report)
        _show_checks(checks)
    if report is not None and not report.supported:
        raise typer.Exit(ExitCode.MISTAKE)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def _check(report: Any, cpu: bool, host: str, port: int, address: str | None) -> list[Check]:
    from cluster.machine import MachineFacts, port_is_free
    from cluster.machine_checks import (
        Check,
        check_machine,
        check_model_memory,
        check_nodes,
        check_port,
    )

    here = MachineFacts.here()
    checks = [*check_machine(here), check_port(host, port, port_is_free(host, port))]
    machines = [here]
    if address is not None:
        from cluster.launch import ray_cluster
        from cluster.node_facts import gather_nodes

        with ExitStack() as stack:
            try:
                stack.enter_context(ray_cluster(address, DEFAULTS))
            except PlacementError as error:
                change = "ray start --head there, or give another --address"
                checks.append(Check("Ray cluster", "fail", str(error), change, address))
            else:
                nodes = gather_nodes()
                machines = nodes.nodes
                checks += check_nodes(nodes.nodes, nodes.clock_offsets, nodes.silent)
    if report is not None and report.memory is not None:
        needs = report.memory.total_bytes
        checks += [check_model_memory(machine, needs, cpu=cpu) for machine in machines]
    return checks


def _show_checks(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for wraps in (False, False, True):
        table.add_column(no_wrap=not wraps, overflow="fold")
    several = len({check.host for check in checks}) > 2
    for check in checks:
        subject = f"{check.subject} ({check.host})" if several and check.host else check.subject
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(status, subject, Text(check.found))
        if check.change:
            table.add_row("", "", Text(f"→ {check.change}", style="bold"))
    Console().print(table)


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
    table.add_row("attention", ", ".join(report.attentions))
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
