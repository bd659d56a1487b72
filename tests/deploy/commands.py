"""Command lines that manifests hold, read by the programs that they call; nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import typer.main
from ray.scripts.scripts import start as ray_start

from cluster.cli import app
from workers.__main__ import parse_options

HOMER: Any = typer.main.get_command(app)


def homer_commands(text: str) -> Iterator[list[str]]:
    """The `homer` commands of a line for a shell, each as its arguments."""
    for command in re.split(r"&&|\|\||;", text):
        words = shlex.split(command, comments=True)
        while words[:1] in (["exec"], ["do"]):
            words = words[1:]
        if words[:1] == ["homer"]:
            yield words[1:]


def parse_homer(arguments: list[str], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `homer` makes of its arguments and of variables; of the latter every one must count.

    Raises
    ------
    click.UsageError
        As the command line does where an option or a value is wrong.
    """
    name, *options = arguments
    command = HOMER.commands[name]
    prefix = f"HOMER_{name.upper()}"
    known = {f"{prefix}_{parameter.name.upper()}": parameter for parameter in command.params}
    for variable, value in (variables or {}).items():
        parameter = known[variable]
        if getattr(parameter, "is_flag", False):
            assert value in ("true", "false"), f"{variable} is {value!r}"
            options += [parameter.opts[0]] if value == "true" else []
        else:
            options += [parameter.opts[0], value]
    context = command.make_context(name, options, resilient_parsing=False)
    return dict(context.params)


def parse_ray_start(parameters: Mapping[str, str], head: bool) -> dict[str, Any]:
    """`rayStartParams` as KubeRay makes options of `ray start` of them."""
    options = ["--head"] if head else ["--address=head:6379"]
    options += [
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in parameters.items()
    ]
    return dict(ray_start.make_context("start", options).params)


def parse_worker(arguments: list[str]) -> Any:
    """What `python -m workers` makes of its arguments."""
    return parse_options(arguments)
