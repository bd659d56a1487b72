"""`homer status`: the workers of a service, its queue, and what runs now."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from cluster.cli import settings
from cluster.cli.connection import Connection, asks_a_service

TABLE_COLUMNS = 160


@asks_a_service
def status(
    *,
    connection: Connection,
    server: settings.Server = settings.DEFAULT_SERVER,
    as_json: settings.AsJson = False,
    watch: Annotated[bool, typer.Option(help="Go on until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two looks with --watch.", min=0.1)
    ] = 1.0,
) -> None:
    """Show the workers of a running service, their load and memory, the queue, and its requests."""
    from rich.console import Console
    from rich.live import Live

    from cluster.cli.status_view import status_view

    # Where nobody's window says how wide it is, every worker keeps its line.
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    with connection.client(server) as client:
        if not watch:
            info = client.server_info()
            if as_json:
                typer.echo(json.dumps(_as_json(info)))
            else:
                console.print(status_view(info, server))
            return
        try:
            if as_json:
                while True:
                    typer.echo(json.dumps(_as_json(client.server_info())))
                    time.sleep(interval)
            with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
                while True:
                    live.update(status_view(client.server_info(), server), refresh=True)
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


def _as_json(info: Any) -> dict[str, Any]:
    """The fields of `homer.v1.GetServerInfoResponse` by their names, zeros included."""
    from cluster.client_wire import message_fields

    return _plain(message_fields(info))


def _plain(value: Any) -> Any:
    """JSON from protobuf writes 64-bit integers as text, and enums with their type before them."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {
            name: int(one)
            if isinstance(one, str) and name.endswith(("_bytes", "_tokens", "_done"))
            else _plain(one)
            for name, one in value.items()
        }
    if isinstance(value, str):
        for prefix in ("WORKER_STATE_", "REQUEST_STAGE_"):
            if value.startswith(prefix):
                return value.removeprefix(prefix).lower()
    return value
