"""Command lines that manifests hold, read by the programs that they call; nothing is run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import typer.main
from ray.scripts.scripts import start as ray_start

from cluster.cli import app

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
    command, prefix = HOMER.commands[name], f"HOMER_{name.upper()}"
    known = {f"{prefix}_{parameter.name.upper()}" for parameter in command.params}
    unknown = set(variables or {}) - known
    assert not unknown, f"no option of homer {name} has the variables {unknown}"
    with patch.dict(os.environ, variables or {}):
        context = command.make_context(name, options, auto_envvar_prefix=prefix)
    return dict(context.params)


def parse_ray_start(parameters: Mapping[str, str], head: bool) -> dict[str, Any]:
    """`rayStartParams` as KubeRay makes options of `ray start` of them."""
    options = ["--head"] if head else ["--address=head:6379"]
    options += [
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in parameters.items()
    ]
    return parse_ray_options(options)


def parse_ray_options(options: list[str]) -> dict[str, Any]:
    """What `ray start` makes of its options."""
    return dict(ray_start.make_context("start", list(options)).params)
