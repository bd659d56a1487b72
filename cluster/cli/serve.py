"""`homer serve`: a service that runs until it is told to end."""

from __future__ import annotations

import json
from typing import Annotated, cast

import typer

from cluster.cli import settings
from cluster.cli.compression import compresses
from cluster.cli.connection import Doors, lets_in
from cluster.cli.load_settings import loads_a_model
from cluster.cli.settings import DEFAULTS
from cluster.options import CompressionOverrides
from homer.engines import Engine
from homer.load_options import LoadOptions


@loads_a_model(device=False)
@lets_in
@compresses
def serve(
    *,
    model: Annotated[str, typer.Option(help="Model folder in Hugging Face format, or a model id.")],
    workers: settings.Workers = DEFAULTS.workers,
    cpu: settings.Cpu = DEFAULTS.cpu,
    threads: settings.Threads = DEFAULTS.threads,
    address: settings.Address = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port of the gRPC door; 0: any.")] = DEFAULTS.port,
    reflection: Annotated[
        bool, typer.Option(help="Tell clients that ask what services and messages there are.")
    ] = DEFAULTS.reflection,
    name: Annotated[
        str, typer.Option(help="The coordinator's name on the Ray cluster.")
    ] = DEFAULTS.name,
    wire_dtype: settings.WireDtype = DEFAULTS.wire_dtype,
    bias: settings.Bias = DEFAULTS.bias,
    memory_budget: settings.MemoryBudget = DEFAULTS.memory_budget,
    max_context_tokens: Annotated[
        int, typer.Option(help="Longest document, in tokens.", min=1)
    ] = DEFAULTS.limits.context_tokens,
    max_calls_per_token: Annotated[
        int, typer.Option(help="Calls that one token may have at once; 0: no limit.", min=0)
    ] = DEFAULTS.limits.calls_per_token,
    max_document_bytes: Annotated[
        int, typer.Option(help="Longest document that is sent in pieces, in bytes.", min=1)
    ] = DEFAULTS.limits.document_bytes,
    grace_seconds: Annotated[
        float,
        typer.Option(
            "--grace-seconds", help="How long running requests may take to end on SIGTERM.", min=0
        ),
    ] = DEFAULTS.grace_seconds,
    min_workers: settings.MinWorkers = None,
    max_workers: settings.MaxWorkers = None,
    grow_after_seconds: settings.GrowAfterSeconds = DEFAULTS.grow_after_seconds,
    idle_seconds: settings.IdleSeconds = DEFAULTS.idle_seconds,
    cpu_workers: settings.CpuWorkers = DEFAULTS.cpu_workers,
    leaf_workers: settings.LeafWorkers = DEFAULTS.leaf_workers,
    leaf_layers: settings.LeafLayers = DEFAULTS.leaf_layers,
    gpus_per_worker: settings.GpusPerWorker = DEFAULTS.gpus_per_worker,
    engine: settings.EngineOption = DEFAULTS.engine,
    ranks: settings.Ranks = DEFAULTS.ranks,
    zero_offload: settings.ZeroOffload = DEFAULTS.zero_offload,
    placement: settings.PlacementOption = DEFAULTS.placement,
    resources: settings.Resources = None,
    labels: settings.Labels = None,
    worker_host: settings.WorkerHost = DEFAULTS.worker_host,
    placement_timeout: settings.PlacementTimeout = DEFAULTS.placement_timeout_seconds,
    log_format: settings.LogFormat = DEFAULTS.log_format,
    metrics_port: settings.MetricsPort = DEFAULTS.metrics_port,
    otlp_endpoint: settings.OtlpEndpoint = DEFAULTS.otlp_endpoint,
    as_json: settings.AsJson = False,
    compression: CompressionOverrides,
    load: LoadOptions,
    doors: Doors,
) -> None:
    """Serve a model on a Ray cluster until Ctrl-C.

    SIGTERM lets the requests that run end first.
    """
    from cluster.launch import drain_service, ray_cluster, running_service, watch_service
    from cluster.options import ServeOptions
    from cluster.placement import Placement
    from cluster.service import Limits

    options = ServeOptions(
        model=model,
        workers=workers,
        min_workers=min_workers,
        max_workers=max_workers,
        grow_after_seconds=grow_after_seconds,
        idle_seconds=idle_seconds,
        cpu=cpu,
        cpu_workers=cpu_workers,
        leaf_workers=leaf_workers,
        leaf_layers=leaf_layers,
        threads=threads,
        gpus_per_worker=gpus_per_worker,
        engine=cast(Engine, engine),
        ranks=ranks,
        zero_offload=zero_offload,
        placement=cast(Placement, placement),
        resources=resources or {},
        labels=labels or {},
        worker_host=worker_host,
        load=load,
        wire_dtype=wire_dtype,
        bias=bias,
        memory_budget=memory_budget,
        host=host,
        port=port,
        reflection=reflection,
        name=name,
        compression=compression,
        limits=Limits(
            context_tokens=max_context_tokens,
            document_bytes=max_document_bytes,
            calls_per_token=max_calls_per_token,
        ),
        placement_timeout_seconds=placement_timeout,
        grace_seconds=grace_seconds,
        log_format=log_format,
        metrics_port=metrics_port,
        otlp_endpoint=otlp_endpoint,
        security=doors.security,
        worker_tls=doors.worker_tls,
    )
    try:
        with (
            settings.ended_by_signals() as signals,
            ray_cluster(address, options, show_logs=True) as placed,
            running_service(placed) as service,
        ):
            # On stdout and in one line, for scripts that wait for it.
            count = len(options.initial)
            if as_json:
                typer.echo(json.dumps({"model": model, "address": service, "workers": count}))
            else:
                typer.echo(f"homer serves {model} at {service} with {count} worker(s)")
            try:
                watch_service(name, lambda news: typer.echo(f"homer: {news}", err=True))
            except KeyboardInterrupt:
                if not signals.terminated:
                    raise
                typer.echo(
                    f"homer: running requests have {grace_seconds:g} s to end; another signal ends "
                    "them now",
                    err=True,
                )
                drain_service(placed)
    except KeyboardInterrupt:
        pass
    typer.echo("homer: stopped", err=True)
