"""Options that several commands have: each group is one parameter of the command itself.

So names, defaults and help have one home, and commands get one object in place of many values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

Command = Callable[..., Any]


def option_group(
    parameter: str, options: Sequence[inspect.Parameter], make: Callable[..., Any]
) -> Callable[[Command], Command]:
    """Give a command `options` in place of its `parameter`, which is what `make` makes of them.

    A command may be what makes another group, too: then groups are inside of groups.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> Any:
            made = make(**{option.name: given.pop(option.name) for option in options})
            return command(**{parameter: made}, **given)

        signature = inspect.signature(command, eval_str=True)
        parameters = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for given in signature.parameters.values()
            for one in (options if given.name == parameter else [given])
        ]
        shown: Any = run
        shown.__signature__ = signature.replace(parameters=parameters)
        shown.__annotations__ = {p.name: p.annotation for p in parameters}
        # Whoever asks for type hints would look at the command itself else.
        del shown.__wrapped__
        return run

    return decorate


def option(
    name: str, kind: Any, default: Any, text: str, panel: str | None = None, **more: Any
) -> inspect.Parameter:
    """One option of a group; `text` is a clause, whose first letter may be small.

    `more` is as `typer.Option` takes it.
    """
    told = typer.Option(help=f"{text[0].upper()}{text[1:]}.", rich_help_panel=panel, **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told]
    )


def options_of(make: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or dataclass as options; their types say what typer needs."""
    return list(inspect.signature(make, eval_str=True).parameters.values())
