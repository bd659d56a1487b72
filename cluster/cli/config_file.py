"""The configuration file of the `homer` command: defaults for its options.

Keys are the options' long names. A key outside of sections counts for every command beside it that
has such an option, a section is a command's own. Knows the options from the parser alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from homer.errors import ConfigError

# An option that chooses the file has no place in it.
_OUTSIDE = ("config", "version", "help", "install-completion", "show-completion")


def read_defaults(file: Path, command: Any) -> dict[str, Any]:
    """What a file says, as a `default_map`: by command, then by parameter.

    Parameters
    ----------
    file : Path
        TOML; or YAML where its name ends in .yaml or .yml.
    command : typer's group
        The whole command line.

    Raises
    ------
    ConfigError
        When the file cannot be read, or has a key that is no option or command.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = _read_yaml(text) if file.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error}") from error
    return _Reader(file).group(command, values)


def option_names(command: Any) -> dict[str, str]:
    """What the code of a command calls its options, by their long names without dashes."""
    return {
        name: parameter.name
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (option.removeprefix("--") for option in parameter.opts)
        if name not in _OUTSIDE
    }


class _Reader:
    """Goes through sections and commands side by side."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def group(self, group: Any, values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """The defaults of the commands in a group, each by its name."""
        commands = group.commands
        options = {n for one in commands.values() if not _is_group(one) for n in option_names(one)}
        given = self._known(values, options | set(commands), section)
        shared = {name: value for name, value in given.items() if name not in commands}
        found = {}
        for name, command in commands.items():
            inner, below = given.get(name, {}), f"{section}{name}"
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{self._file}: {below} is a command; its options go into a section [{below}]"
                )
            if _is_group(command):
                found[name] = self.group(command, inner, f"{below}.")
            else:
                names = option_names(command)
                own = self._known(inner, set(names), f"{below}.")
                defaults = {**shared, **own}
                found[name] = {names[key]: defaults[key] for key in defaults if key in names}
        return found

    def _known(self, values: Mapping[str, Any], known: set[str], section: str) -> dict[str, Any]:
        """The values by their options' names as they are written on a command line."""
        given = {name.replace("_", "-"): value for name, value in values.items()}
        for name in given:
            if name not in known:
                where = f"in section [{section.rstrip('.')}]" if section else "outside of sections"
                near = get_close_matches(name, known, n=1, cutoff=0.5)
                mend = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"{self._file}: there is no option {name} {where}; {mend}")
        return given


def _is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def _read_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("it holds no keys with values")
    return values
