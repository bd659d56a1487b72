"""`homer serve`: a service that runs until it is told to end."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from cluster.cli import settings
from cluster.cli.settings import DEFAULTS


def serve(
    model: Annotated[str, typer.Option(help="Model folder in Hugging Face format, or a model id.")],
    workers: settings.Workers = DEFAULTS.workers,
    cpu: settings.Cpu = DEFAULTS.cpu,
    threads: settings.Threads = DEFAULTS.threads,
    address: settings.Address = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port of the gRPC door; 0: any.")] = DEFAULTS.port,
    name: Annotated[
        str, typer.Option(help="The coordinator's name on the Ray cluster.")
    ] = DEFAULTS.name,
    dtype: settings.Dtype = DEFAULTS.dtype,
    bias: settings.Bias = DEFAULTS.bias,
    max_context_tokens: Annotated[
        int, typer.Option(help="Longest document, in tokens.", min=1)
    ] = DEFAULTS.limits.context_tokens,
    placement_timeout: settings.PlacementTimeout = DEFAULTS.placement_timeout_seconds,
    max_chunk_len: settings.MaxChunkLen = None,
    target_len: settings.TargetLen = None,
    warmup_layers: settings.WarmupLayers = None,
    max_initial_chunk_len: settings.MaxInitialChunkLen = None,
    fan_in: settings.FanIn = None,
    paper: settings.Paper = False,
) -> None:
    """Serve a model on a Ray cluster until Ctrl-C."""
    from cluster.launch import ray_cluster, running_service
    from cluster.options import ServeOptions
    from cluster.service import Limits

    options = ServeOptions(
        model=model,
        workers=workers,
        cpu=cpu,
        threads=threads,
        dtype=dtype,
        bias=bias,
        host=host,
        port=port,
        name=name,
        compression=settings.overrides(
            paper,
            max_chunk_len=max_chunk_len,
            target_len=target_len,
            warmup_layers=warmup_layers,
            max_initial_chunk_len=max_initial_chunk_len,
            fan_in=fan_in,
        ),
        limits=Limits(context_tokens=max_context_tokens),
        placement_timeout_seconds=placement_timeout,
    )
    try:
        with (
            settings.ended_by_signals(),
            ray_cluster(address, options, show_logs=True) as placed,
            running_service(placed) as service,
        ):
            # On stdout and in one line, for scripts that wait for it.
            typer.echo(f"homer serves {model} at {service} with {workers} worker(s)")
            threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("homer: stopped", err=True)
