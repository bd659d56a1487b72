"""`homer batch`: many questions from a file."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.batch.options import BatchOptions
from cluster.cli import settings
from cluster.cli.asked import Asked, asks
from cluster.cli.connection import Connection
from cluster.cli.exit_codes import ExitCode
from homer.errors import HomerError

if TYPE_CHECKING:
    from cluster.batch.run import Batch, Counts

_OPENAI = "Lines in OpenAI's format"


@asks
def batch(
    *,
    input: Annotated[
        str,
        typer.Option(
            "--input", help="Questions, one JSON object a line: a path, or a URI for fsspec."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Answers, one JSON object a line; goes on where it ended.")
    ],
    errors: Annotated[
        Path | None,
        typer.Option(help="Lines that failed; OUTPUT with .errors in its name by default."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Lines asked at once, while the service takes as many.", min=1)
    ] = BatchOptions.concurrency,
    priority: Annotated[
        int,
        typer.Option(help="Of lines that name none; 0 is that of other requests.", min=-8, max=8),
    ] = BatchOptions.priority,
    retries: Annotated[
        int,
        typer.Option(help="How often a line is asked again when its workers were lost.", min=0),
    ] = BatchOptions.retries,
    as_json: settings.AsJson = False,
    served_model_name: Annotated[
        str,
        typer.Option(help="What lines call the model.", rich_help_panel=_OPENAI),
    ] = "",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder or model id of the tokenizer, where the service's model is not here.",
            rich_help_panel=_OPENAI,
        ),
    ] = "",
    asked: Asked,
) -> None:
    """Answer the questions of a file, on a service or on a cluster of its own: docs/batch.md.

    What was stopped goes on when it is run again. Exit code 4: lines failed.
    """
    from cluster.batch.run import Batch
    from cluster.cli.batch_view import BatchProgress
    from cluster.text import leave_out_torch

    leave_out_torch()
    options = BatchOptions(
        input=input,
        output=output,
        errors=errors or output.with_suffix(f".errors{output.suffix}"),
        concurrency=concurrency,
        priority=priority,
        retries=retries,
        model_name=served_model_name,
        tokenizer=tokenizer,
    )
    started = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(settings.ended_by_signals())
        view = stack.enter_context(BatchProgress())
        run = stack.enter_context(Batch(options, view))
        counts = run.counts
        try:
            if counts.left:
                server, connection = stack.enter_context(asked.reached(view.note))
                asyncio.run(_ask_all(run, server, connection))
        except KeyboardInterrupt:
            view.note(
                f"homer: stopped; {_told(counts, output)}. The same command goes on from there"
            )
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except HomerError:
            view.note(f"{_told(counts, output)}. The same command goes on from there")
            raise
    told = _told(counts, output)
    if counts.failed:
        told += f"; {counts.failed} failed: see {options.errors}, and run again to ask them again"
    typer.echo(f"homer: {told}", err=True)
    if as_json:
        result = {
            "lines": counts.lines,
            "answered": counts.before + counts.answered,
            "answered_before": counts.before,
            "failed": counts.failed,
            "seconds": round(time.monotonic() - started, 3),
            "output": str(output),
            "errors": str(options.errors) if counts.failed else None,
        }
        print(json.dumps(result))
    if counts.failed:
        raise typer.Exit(ExitCode.LINES_FAILED)


def _told(counts: Counts, output: Path) -> str:
    answered = counts.before + counts.answered
    return f"{answered} of {counts.lines} lines are answered in {output}"


async def _ask_all(run: Batch, server: str, connection: Connection) -> None:
    """All lines, until a signal ends them: what is being written then is written to its end."""
    loop = asyncio.get_running_loop()
    asking = asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        if asking is not None:
            asking.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop)
    try:
        async with connection.async_client(server) as client:
            await run.run(client)
    except asyncio.CancelledError:
        if not stopped:
            raise
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
