"""The `homer` command. Each command is a module here; heavy imports happen inside them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli import bench, calibrate, doctor, generate, plan, serve, status, trace
from cluster.errors import PlacementError, ServiceError
from homer import __version__
from homer.errors import (
    BiasError,
    ConfigError,
    HomerError,
    ModelError,
    PlanError,
    PromptError,
)

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_NO_SERVICE = 3

_MISTAKES = (BiasError, ConfigError, ModelError, PlanError, PromptError)
_MISTAKE_CODES = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND")

app = typer.Typer(
    name="homer",
    help="Questions about documents far beyond a model's window, on a Ray cluster.",
    epilog="Exit codes: 1 the service failed, 2 a mistake in the request, 3 no service or no room.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(status.status)
app.command()(trace.trace)
app.command()(plan.plan)
app.command()(calibrate.calibrate)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"homer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def exit_code(error: HomerError) -> int:
    """The exit code that an error means."""
    if isinstance(error, ServiceError):
        if error.code in _MISTAKE_CODES:
            return EXIT_MISTAKE
        return EXIT_NO_SERVICE if error.code == "UNAVAILABLE" else EXIT_FAILED
    if isinstance(error, PlacementError):
        return EXIT_NO_SERVICE
    return EXIT_MISTAKE if isinstance(error, _MISTAKES) else EXIT_FAILED


def main() -> None:
    """Run the command line; a known error is one line on stderr, not a traceback."""
    try:
        app()
    except HomerError as error:
        typer.echo(f"homer: {error}", err=True)
        sys.exit(exit_code(error))
