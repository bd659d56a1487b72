"""`homer trace`: one request's timeline over all workers, for Perfetto or Chrome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import settings
from cluster.cli.connection import Connection, asks_a_service
from homer.errors import PromptError


@asks_a_service
def trace(
    *,
    connection: Connection,
    request_id: Annotated[
        str, typer.Argument(help="The request: as you named it, or as the service did.")
    ],
    server: settings.Server = settings.DEFAULT_SERVER,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("trace.json"),
    as_json: settings.AsJson = False,
) -> None:
    """Write the timeline of one request, running or of the last 256, as a Chrome/Perfetto trace.

    Open the file at https://ui.perfetto.dev or chrome://tracing.
    """
    from cluster.chrome_trace import chrome_trace

    with connection.client(server) as client:
        answer = client.trace(request_id)
    try:
        out.write_text(json.dumps(chrome_trace(answer)) + "\n", encoding="utf-8")
    except OSError as error:
        raise PromptError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    workers = sorted({one.worker for one in answer.slices})
    if as_json:
        told = {
            "file": str(out),
            "request_id": answer.request_id,
            "outcome": answer.outcome or "running",
            "slices": len(answer.slices),
            "workers": workers,
        }
        typer.echo(json.dumps(told))
        return
    typer.echo(
        f"{out}: request {answer.request_id} ({answer.outcome or 'running'}), "
        f"{len(answer.slices)} slices on {len(workers)} worker(s); open it at "
        "https://ui.perfetto.dev"
    )
