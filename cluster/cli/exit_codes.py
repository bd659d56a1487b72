"""The exit codes of the `homer` command, and which error means which."""

from __future__ import annotations

from enum import IntEnum

from cluster.errors import OverloadedError, PlacementError, ServiceError
from homer.errors import BiasError, ConfigError, HomerError, ModelError, PlanError, PromptError


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    NO_SERVICE = 3
    LINES_FAILED = 4
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.DONE: "it is done",
    ExitCode.FAILED: "the service, the machine or a check of `homer doctor` failed",
    ExitCode.MISTAKE: "a mistake in the command, a file or the request: change it",
    ExitCode.NO_SERVICE: "no service answers, or it has no room now: try again later",
    ExitCode.LINES_FAILED: "`homer batch` came to its end, and some lines have no answer",
    ExitCode.INTERRUPTED: "ended by Ctrl-C or SIGTERM",
}

_MISTAKES = (BiasError, ConfigError, ModelError, PlanError, PromptError)
_MISTAKE_CODES = (
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
)


def exit_code(error: HomerError) -> ExitCode:
    """The exit code that an error means."""
    if isinstance(error, ServiceError):
        if error.code in _MISTAKE_CODES:
            return ExitCode.MISTAKE
        # Other requests leave room later; a message that is too long stays too long.
        full = error.code == "RESOURCE_EXHAUSTED" and error.retry_after_seconds is not None
        away = error.code == "UNAVAILABLE"
        return ExitCode.NO_SERVICE if full or away else ExitCode.FAILED
    if isinstance(error, PlacementError | OverloadedError):
        return ExitCode.NO_SERVICE
    return ExitCode.MISTAKE if isinstance(error, _MISTAKES) else ExitCode.FAILED
