"""`homer generate`: one question about one document."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import settings
from cluster.cli.answer import tell_answer
from cluster.cli.asked import OWN_RETRIES, Asked, asks
from cluster.cli.compression import compresses
from cluster.cli.exit_codes import ExitCode
from cluster.cli.sampling import samples
from cluster.options import CompressionOverrides
from homer.documents import read_document


@asks
@samples
@compresses
def generate(
    *,
    context: settings.Context,
    question: Annotated[str, typer.Option(help="The question; it comes after the document.")],
    prefix: Annotated[str, typer.Option(help="Comes before the document.")] = "",
    sampling: dict[str, Any],
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
    asked: Asked,
    compression: CompressionOverrides,
) -> None:
    """Ask one question about one document, on a cluster for this question alone or on a service.

    The answer goes to stdout, progress to stderr.
    """
    if evidence is not None and not evidence.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {evidence.parent} for --evidence {evidence}")
    document = read_document(context)
    request: dict[str, Any] = {
        "context": document,
        "question": question,
        "prefix": prefix,
        "compression": compression.given(),
        "return_kept_indices": as_json,
        "return_evidence": evidence is not None,
        "sampling": sampling,
    }
    try:
        with settings.ended_by_signals(), ExitStack() as stack:
            from cluster.cli.progress import progress_view

            view = stack.enter_context(progress_view(quiet=as_json))
            server, connection = stack.enter_context(asked.reached(view.status))
            if retries is None:
                retries = 0 if asked.model is None else OWN_RETRIES
            client = stack.enter_context(connection.client(server, retries=retries))
            summary = tell_answer(client, request, view, as_json)
            if evidence is not None:
                from cluster.evidence_file import evidence_file

                evidence.write_text(evidence_file(document, question, summary), encoding="utf-8")
                view.status(f"wrote {evidence}")
    except KeyboardInterrupt:
        typer.echo("homer: cancelled", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
