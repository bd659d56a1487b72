"""`homer generate`: one question about one document."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import settings
from cluster.cli.answer import tell_answer
from cluster.cli.connection import Connection, asks_a_service
from cluster.cli.exit_codes import ExitCode
from cluster.cli.load_settings import loads_a_model
from cluster.cli.settings import DEFAULTS
from homer.documents import read_document
from homer.load_options import LoadOptions

# A coordinator that dies is back in about five seconds.
OWN_RETRIES = 5


@loads_a_model(device=False)
@asks_a_service
def generate(
    *,
    load: LoadOptions,
    command: typer.Context,
    connection: Connection,
    context: settings.Context,
    question: Annotated[str, typer.Option(help="The question; it comes after the document.")],
    prefix: Annotated[str, typer.Option(help="Comes before the document.")] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Model folder in Hugging Face format, or a model id; not with --server."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="A running service (host:port) instead of a cluster here.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; 256 by default.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="0 is off.", min=0, max=1)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", min=0)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.", min=0)] = None,
    n: Annotated[
        int, typer.Option("--n", help="Answers to draw from the one compressed document.", min=1)
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="Show each token's log-probability, and those of so many likeliest (0: none).",
            min=0,
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML file that shows what the answer was made from.", dir_okay=False
        ),
    ] = None,
    as_json: settings.AsJson = False,
    retries: Annotated[
        int | None,
        typer.Option(
            help="How often to ask again when the service is away or overloaded; with --server "
            f"never by default, else {OWN_RETRIES} times.",
            min=0,
        ),
    ] = None,
    workers: settings.Workers = DEFAULTS.workers,
    cpu: settings.Cpu = DEFAULTS.cpu,
    threads: settings.Threads = DEFAULTS.threads,
    address: settings.Address = None,
    bias: settings.Bias = DEFAULTS.bias,
    memory_budget: settings.MemoryBudget = DEFAULTS.memory_budget,
    placement_timeout: settings.PlacementTimeout = DEFAULTS.placement_timeout_seconds,
    max_chunk_len: settings.MaxChunkLen = None,
    target_len: settings.TargetLen = None,
    warmup_layers: settings.WarmupLayers = None,
    max_initial_chunk_len: settings.MaxInitialChunkLen = None,
    fan_in: settings.FanIn = None,
    score: settings.Score = None,
    paper: settings.Paper = False,
) -> None:
    """Ask one question about one document, on a cluster for this question alone or on a service.

    The answer goes to stdout, progress to stderr.
    """
    model, server = settings.model_or_server(command, model, server)
    if evidence is not None and not evidence.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {evidence.parent} for --evidence {evidence}")
    document = read_document(context)
    compression = settings.overrides(
        paper,
        max_chunk_len=max_chunk_len,
        target_len=target_len,
        warmup_layers=warmup_layers,
        max_initial_chunk_len=max_initial_chunk_len,
        fan_in=fan_in,
        score=score,
    )
    request: dict[str, Any] = {
        "context": document,
        "question": question,
        "prefix": prefix,
        "compression": compression.given(),
        "return_kept_indices": as_json,
        "return_evidence": evidence is not None,
        "sampling": {
            "max_tokens": max_tokens or 0,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop,
            "seed": seed,
            "n": n,
            "logprobs": logprobs,
        },
    }
    try:
        with settings.ended_by_signals(), ExitStack() as stack:
            from cluster.cli.progress import progress_view

            view = stack.enter_context(progress_view(quiet=as_json))
            if model is not None:
                view.status(f"starting {workers} worker(s) …")
                server = start_service(
                    stack,
                    address,
                    model=model,
                    workers=workers,
                    cpu=cpu,
                    threads=threads,
                    load=load,
                    bias=bias,
                    memory_budget=memory_budget,
                    placement_timeout_seconds=placement_timeout,
                )
                connection = Connection()
            if retries is None:
                retries = 0 if model is None else OWN_RETRIES
            client = stack.enter_context(connection.client(server or "", retries=retries))
            summary = tell_answer(client, request, view, as_json)
            if evidence is not None:
                from cluster.evidence_file import evidence_file

                evidence.write_text(evidence_file(document, question, summary), encoding="utf-8")
                view.status(f"wrote {evidence}")
    except KeyboardInterrupt:
        typer.echo("homer: cancelled", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def start_service(stack: ExitStack, address: str | None, **options: Any) -> str:
    """A service of this command alone, which ends with `stack`; where it is reached.

    `options` are fields of `ServeOptions`.
    """
    from cluster.launch import ray_cluster, running_service
    from cluster.options import ServeOptions

    # Several may run on one cluster at once.
    alone = ServeOptions(port=0, name=f"homer-generate-{uuid.uuid4().hex}", **options)
    placed = stack.enter_context(ray_cluster(address, alone))
    return stack.enter_context(running_service(placed))
