"""`homer drain`: lets what runs on a node end before the node goes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cluster.cli import settings
from cluster.cli.exit_codes import ExitCode
from cluster.cli.settings import DEFAULTS


def drain(
    address: settings.Address = "auto",
    node: Annotated[
        str | None,
        typer.Option(help="Ray's id of the node (`ray list nodes`); else the one where this runs."),
    ] = None,
    name: Annotated[
        str, typer.Option(help="The coordinator's name on the Ray cluster.")
    ] = DEFAULTS.name,
    timeout_seconds: Annotated[
        float,
        typer.Option(
            "--timeout-seconds", help="How long what runs on the node may take to end.", min=0
        ),
    ] = 300.0,
    as_json: settings.AsJson = False,
) -> None:
    """Let a service's part on a node of the Ray cluster end what it does, before the node goes.

    Its workers get nothing new and keep what running requests need of them. Where the service
    itself is on the node its door takes no new requests. Nothing of it comes back before the node
    has gone. For a preStop hook, and before a machine is taken away by hand.
    """
    from cluster.launch import drain_node, ray_cluster

    with ray_cluster(address, DEFAULTS):
        workers = drain_node(name, node, timeout_seconds)
    left = [worker for worker, empty in workers.items() if not empty]
    if as_json:
        drained = [worker for worker in workers if worker not in left]
        typer.echo(json.dumps({"drained": drained, "left": left}))
    else:
        for worker in workers:
            typer.echo(f"{worker}: {'still holds requests' if worker in left else 'drained'}")
    if left:
        typer.echo(
            f"homer: {', '.join(left)} did not end in {timeout_seconds:g} s; where the node goes "
            "now, what they hold is run again elsewhere",
            err=True,
        )
        raise typer.Exit(ExitCode.FAILED)
