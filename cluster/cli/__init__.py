"""The `homer` command. Each command is a module here; heavy imports happen inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from cluster.cli import (
    batch,
    bench,
    calibrate,
    chat,
    doctor,
    drain,
    generate,
    plan,
    serve,
    status,
    trace,
)
from cluster.cli.config_file import read_defaults
from cluster.cli.exit_codes import MEANINGS, ExitCode, exit_code
from homer import __version__
from homer.errors import HomerError

# Where a value is from that was not written on the command line.
_ELSEWHERE = {"ENVIRONMENT": "from its variable", "DEFAULT_MAP": "from the configuration file"}

app = typer.Typer(
    name="homer",
    help="Questions about documents far beyond a model's window, on a Ray cluster.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in MEANINGS.items()) + ".",
    # Every option has a variable: HOMER_SERVE_PORT is --port of homer serve.
    context_settings={"auto_envvar_prefix": "HOMER"},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(batch.batch)
app.command()(drain.drain)
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
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML or YAML file with defaults for the options of all commands: docs/cli.md."
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if config is not None:
        context.default_map = read_defaults(config, context.command)


def main() -> None:
    """Run the command line; a known error is one line on stderr, not a traceback."""
    try:
        code = app(standalone_mode=False, prog_name="homer")
    except TyperException as error:
        code = _tell_usage(error)
    except typer.Abort:
        code = ExitCode.INTERRUPTED
    except HomerError as error:
        typer.echo(f"homer: {' '.join(str(error).split())}", err=True)
        code = exit_code(error)
    except OSError as error:
        # A file that cannot be read or written; what else the system refuses is no user's mistake.
        if error.filename is None:
            raise
        typer.echo(f"homer: {error.filename}: {error.strerror}", err=True)
        code = ExitCode.MISTAKE
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)


def _tell_usage(error: Any) -> ExitCode:
    """What is wrong with a command line, a variable or the configuration file, in one line."""
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    message = " ".join(error.format_message().split())
    if context is None or not message:
        # Without arguments typer prints the help itself.
        return ExitCode.MISTAKE
    if getattr(error, "option_name", None) == "--config":
        called, _, command = context.command_path.partition(" ")
        message = f"--config goes before the command: {called} --config FILE {command} …"
    source = context.get_parameter_source(parameter.name) if parameter is not None else None
    if source is not None and source.name in _ELSEWHERE:
        message += f" ({_ELSEWHERE[source.name]})"
    typer.echo(f"homer: {message.rstrip('.')}; see {context.command_path} --help", err=True)
    return ExitCode.MISTAKE
