"""`homer chat`: question after question about one document."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import settings
from cluster.cli.answer import tell_answer
from cluster.cli.asked import OWN_RETRIES, Asked, asks
from cluster.cli.compression import compresses
from cluster.cli.exit_codes import ExitCode, exit_code
from cluster.cli.sampling import samples
from cluster.options import CompressionOverrides
from homer.documents import STDIN, read_document
from homer.errors import ConfigError, HomerError

if TYPE_CHECKING:
    from cluster.client import HomerClient

PROMPT = "> "
HELP = """\
Type a question and Enter. Each is asked of the document alone: earlier ones are not seen.
  Ctrl-C       cancel the answer that comes now, or drop the line; on an empty line: end
  /help        this text
  /quit        end; Ctrl-D does too"""


@asks
@samples
@compresses
def chat(
    *,
    context: settings.Context,
    prefix: Annotated[str, typer.Option(help="Comes before the document.")] = "",
    sampling: dict[str, Any],
    as_json: settings.AsJson = False,
    retries: Annotated[
        int,
        typer.Option(help="How often to ask again when the service is away or overloaded.", min=0),
    ] = OWN_RETRIES,
    asked: Asked,
    compression: CompressionOverrides,
) -> None:
    """Ask question after question about one document; one a line, where stdin is no terminal.

    Answers go to stdout, all else to stderr. Ctrl-C cancels an answer, and ends at the prompt.
    """
    if context == STDIN:
        raise ConfigError("questions come from stdin, so the document cannot; give --context FILE")
    request: dict[str, Any] = {
        "context": read_document(context),
        "prefix": prefix,
        "compression": compression.given(),
        "sampling": sampling,
    }
    try:
        with settings.ended_by_signals() as signals, ExitStack() as stack:
            server, connection = stack.enter_context(
                asked.reached(lambda news: typer.echo(news, err=True))
            )
            client = stack.enter_context(connection.client(server, retries=retries))
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
        # `input` uses it once it is imported.
        _typed()
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
            dropped = interactive and not answering and _typed()
            typer.echo("\nhomer: cancelled" if answering else "", err=True)
            if signals.terminated or not (answering or dropped):
                raise
        except HomerError as error:
            typer.echo(f"homer: {error}", err=True)
            failed = exit_code(error)
    return ExitCode.DONE if interactive else failed


def _typed() -> str:
    """What stands on the line that is typed now; nothing where the system has no readline."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


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
