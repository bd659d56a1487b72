"""Options that several commands have: each group is one parameter of the command itself.

So names, defaults and help have one home, and commands get one object in place of many values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def option_group(
    parameter: str, options: Sequence[inspect.Parameter], make: Callable[..., Any]
) -> Callable[[Command], Command]:
    """Give a command `options` in place of its `parameter`, which is what `make` makes of them."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = make(**{option.name: given.pop(option.name) for option in options})
            command(**{parameter: made}, **given)

        signature = inspect.signature(command, eval_str=True)
        ours = [p for p in signature.parameters.values() if p.name != parameter]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*ours, *options)]
        shown: Any = run
        shown.__signature__ = signature.replace(parameters=keyword_only)
        shown.__annotations__ = {p.name: p.annotation for p in keyword_only}
        # Whoever asks for type hints would look at the command itself else.
        del shown.__wrapped__
        return run

    return decorate


def option(name: str, kind: Any, default: Any, text: str, panel: str) -> inspect.Parameter:
    """One option of a group; `text` is a clause, whose first letter may be small."""
    told = typer.Option(help=f"{text[0].upper()}{text[1:]}.", rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told]
    )
