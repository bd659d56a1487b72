"""`homer chat`: question after question about one document."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import settings
from cluster.cli.answer import tell_answer
from cluster.cli.connection import Connection, asks_a_service
from cluster.cli.exit_codes import ExitCode, exit_code
from cluster.cli.generate import OWN_RETRIES, start_service
from cluster.cli.load_settings import loads_a_model
from cluster.cli.settings import DEFAULTS
from homer.documents import STDIN, read_document
from homer.errors import ConfigError, HomerError
from homer.load_options import LoadOptions

if TYPE_CHECKING:
    from cluster.client import HomerClient

PROMPT = "> "
HELP = """\
Type a question and Enter. Each is asked of the document alone: earlier ones are not seen.
  Ctrl-C       cancel the answer that comes now
  /help        this text
  /quit        end; Ctrl-D does too"""


@loads_a_model(device=False)
@asks_a_service
def chat(
    *,
    load: LoadOptions,
    connection: Connection,
    command: typer.Context,
    context: settings.Context,
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
        list[str] | None, typer.Option(help="End answers before this text; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.", min=0)] = None,
    as_json: settings.AsJson = False,
    retries: Annotated[
        int,
        typer.Option(help="How often to ask again when the service is away or overloaded.", min=0),
    ] = OWN_RETRIES,
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
    """Ask question after question about one document; one a line, where stdin is no terminal.

    Answers go to stdout, all else to stderr. Ctrl-C cancels an answer, /quit ends.
    """
    model, server = settings.model_or_server(command, model, server)
    if context == STDIN:
        raise ConfigError("questions come from stdin, so the document cannot; give --context FILE")
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
        "context": read_document(context),
        "prefix": prefix,
        "compression": compression.given(),
        "sampling": {
            "max_tokens": max_tokens or 0,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop,
            "seed": seed,
        },
    }
    try:
        with settings.ended_by_signals() as signals, ExitStack() as stack:
            if model is not None:
                typer.echo(f"starting {workers} worker(s) …", err=True)
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
            client = stack.enter_context(connection.client(server or "", retries=retries))
            code = _talk(client, request, signals, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    raise typer.Exit(code)


def _talk(
    client: HomerClient, request: dict[str, Any], signals: settings.Signals, as_json: bool
) -> ExitCode:
    """Ask until there are no more questions. Of a script's questions the last failure counts."""
    from cluster.cli.progress import progress_view

    interactive = sys.stdin.isatty()
    failed = ExitCode.DONE
    if interactive:
        # A module that `input` uses once it is there; not every system has it.
        with suppress(ImportError):
            import readline  # noqa: F401
        typer.echo("Ask about the document; /help says what else there is.", err=True)
    while True:
        answering = False
        try:
            if (question := _next_question()) is None:
                break
            answering = True
            with progress_view(quiet=as_json) as view:
                tell_answer(client, {**request, "question": question}, view, as_json)
        except KeyboardInterrupt:
            if signals.terminated or not (interactive or answering):
                raise
            # At the prompt it drops what was typed, as in a shell.
            typer.echo("\nhomer: cancelled" if answering else "", err=True)
        except HomerError as error:
            typer.echo(f"homer: {error}", err=True)
            failed = exit_code(error)
    return ExitCode.DONE if interactive else failed


def _next_question() -> str | None:
    """What is typed at a prompt, with editing and history; or the next line of stdin."""
    while (line := _next_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/quit":
                return None
            case "/help":
                typer.echo(HELP, err=True)
            case word if word.startswith("/") and word.count("/") == len(word.split()) == 1:
                typer.echo(f"homer: there is no {word}; /help says what there is", err=True)
            case question:
                return question
    return None


def _next_line() -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            return None
    return sys.stdin.readline() or None
