"""The options of every command that loads a model: the fields of `homer.load_options.LoadOptions`.

One home for names, defaults and help, so that commands and workers cannot drift apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from cluster.cli.option_group import Command, option, option_group
from homer.load_options import LOAD_HELP, TOKEN_FILE_HELP, LoadOptions, read_token

_PANEL = "Loading the model"
_TOKEN_FILE = "hub_token_file"


def loads_a_model(*, device: bool) -> Callable[[Command], Command]:
    """Give a command, in place of its parameter `load`, an option for each field of `LoadOptions`.

    With `device`, that is one of them: not where workers choose theirs. The hub's token is never an
    option, which everybody on the machine could read: it comes from HF_TOKEN or a file.
    """
    types = get_type_hints(LoadOptions)
    options = [
        option(field.name, types[field.name], field.default, LOAD_HELP[field.name], _PANEL)
        for field in dataclasses.fields(LoadOptions)
        if field.name in LOAD_HELP and (device or field.name != "device")
    ]
    options.append(option(_TOKEN_FILE, Path | None, None, TOKEN_FILE_HELP, _PANEL))
    return option_group("load", options, _load)


def reads_a_config(command: Command) -> Command:
    """As `loads_a_model`, for commands that read no weights: only where files come from."""
    types = get_type_hints(LoadOptions)
    options = [
        option(name, types[name], getattr(LoadOptions, name), LOAD_HELP[name], _PANEL)
        for name in ("revision", "local_files_only")
    ]
    options.append(option(_TOKEN_FILE, Path | None, None, TOKEN_FILE_HELP, _PANEL))
    return option_group("load", options, _load)(command)


def _load(**given: Any) -> LoadOptions:
    return LoadOptions(token=read_token(given.pop(_TOKEN_FILE)), **given)
