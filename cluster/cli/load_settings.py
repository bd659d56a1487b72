"""The options of every command that loads a model: the fields of `homer.load_options.LoadOptions`.

One home for names, defaults and help, so that commands and workers cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from homer.load_options import LOAD_HELP, TOKEN_FILE_HELP, LoadOptions, read_token

_PANEL = "Loading the model"
_TOKEN_FILE = "token_file"


def loads_a_model(*, device: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in place of its parameter `load`, an option for each field of `LoadOptions`.

    With `device`, that is one of them: not where workers choose theirs. The hub's token is never an
    option, which everybody on the machine could read: it comes from HF_TOKEN or a file.
    """
    fields = [
        field
        for field in dataclasses.fields(LoadOptions)
        if field.name in LOAD_HELP and (device or field.name != "device")
    ]
    types = get_type_hints(LoadOptions)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            token = read_token(given.pop(_TOKEN_FILE))
            chosen = {field.name: given.pop(field.name) for field in fields}
            command(load=LoadOptions(token=token, **chosen), **given)

        signature = inspect.signature(command, eval_str=True)
        ours = [p for p in signature.parameters.values() if p.name != "load"]
        loads = [_parameter(f.name, types[f.name], f.default, LOAD_HELP[f.name]) for f in fields]
        loads.append(_parameter(_TOKEN_FILE, Path | None, None, TOKEN_FILE_HELP))
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*ours, *loads)]
        shown: Any = run
        shown.__signature__ = signature.replace(parameters=keyword_only)
        shown.__annotations__ = {p.name: p.annotation for p in keyword_only}
        # Whoever asks for type hints would look at the command itself else.
        del shown.__wrapped__
        return run

    return decorate


def _parameter(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    option = typer.Option(help=f"{text[0].upper()}{text[1:]}.", rich_help_panel=_PANEL)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
