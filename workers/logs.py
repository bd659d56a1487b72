"""Log lines that say which request, node, attempt and worker they are about.

Standard logging, one handler on stderr. What a task is about is bound to it once and stands on
every line that it logs; nobody passes it around. No line holds a prompt, an answer or their tokens.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from homer.errors import ConfigError

LOG_FORMATS = ("text", "json")
# Fields are names: longer ones are a caller's, who is refused for that only later.
LONGEST = 256
# What a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")

_NOTHING: Mapping[str, str] = {}
_about: ContextVar[Mapping[str, str]] = ContextVar("homer_log_about", default=_NOTHING)


def log_about(**fields: object) -> None:
    """From here to its end this task logs about `fields`, and about nothing else.

    Also the tasks and compute steps that it starts. For tasks of one purpose: a call, a piece.
    """
    _about.set(_texts(fields))


@contextmanager
def logging_about(**fields: object) -> Iterator[None]:
    """Lines within are about `fields`, and about nothing else. Not around a `yield` or `await`
    of an asynchronous generator, which may go on in another task."""
    token = _about.set(_texts(fields))
    try:
        yield
    finally:
        _about.reset(token)


def log_fields() -> Mapping[str, str]:
    """What the running task logs about."""
    return _about.get()


def set_up_logging(log_format: str, stream: TextIO | None = None, **constant: object) -> None:
    """Let this process log to `stream` (stderr) as "text" or "json", from INFO on.

    `constant` fields stand on every line, like the name of a worker.

    Raises
    ------
    ConfigError
        When there is no such format.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(make_formatter(log_format, **constant))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def make_formatter(log_format: str, **constant: object) -> logging.Formatter:
    """The formatter of a format's name."""
    if log_format not in LOG_FORMATS:
        raise ConfigError(f"log format is {log_format!r}; use {' or '.join(LOG_FORMATS)}")
    kind = TextFormatter if log_format == "text" else JsonFormatter
    return kind(_texts(constant))


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, logger, message, then `name=value` fields.

    A message of several lines, such as a traceback, has the fields on each of them, so that all of
    it is found by the request's id. The further ones are indented: only what is a record of its own
    begins like one, whatever a caller had written into a message.
    """

    def __init__(self, constant: Mapping[str, str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._constant = constant

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = {**self._constant, **_about.get()}
        suffix = "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
        lines = (_CONTROL.sub("?", line) for line in text.splitlines())
        return "\n    ".join(line + suffix for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the fields, the traceback."""

    def __init__(self, constant: Mapping[str, str]) -> None:
        super().__init__()
        self._constant = constant

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._constant,
            **_about.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _texts(fields: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value)[:LONGEST] for name, value in fields.items() if value not in (None, "")}


def _quoted(value: str) -> str:
    plain = value.isprintable() and not set(value) & set(' "=')
    return value if plain else json.dumps(value, ensure_ascii=True)
