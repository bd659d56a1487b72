"""Shows how a batch is doing on stderr: a bar on a terminal, plain lines elsewhere.

Knows nothing about where results come from.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from cluster.batch.lines import Line
from cluster.batch.run import Counts
from cluster.http.errors import HttpError

SECONDS_BETWEEN_LINES = 10.0
# Of what the rate is an average: documents take very different times.
RATE_SECONDS = 600.0
# The errors file has them all.
TOLD_PROBLEMS = 20


class BatchProgress:
    """A view of one batch; a context manager that ends it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._drawn = sys.stderr.isatty()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed, {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=RATE_SECONDS,
            disable=not self._drawn,
        )
        self._task = self._bar.add_task("", total=None, failed=0, rate="")
        self._next = 0.0
        self._problems = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def began(self, counts: Counts) -> None:
        if counts.before:
            self.note(f"{counts.before} of {counts.lines} lines are answered already")
        if counts.left:
            self._bar.update(
                self._task, total=counts.lines, completed=counts.before + counts.failed
            )
            self._bar.start()
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def went_on(self, counts: Counts) -> None:
        done = counts.lines - counts.left
        self._bar.update(self._task, completed=done, failed=counts.failed)
        task = self._bar.tasks[0]
        rate = f"{60 * task.speed:.1f} lines/min" if task.speed else ""
        self._bar.update(self._task, rate=rate)
        if not self._drawn and (not counts.left or time.monotonic() >= self._next):
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            left = f", about {_clock(task.time_remaining)} left" if task.time_remaining else ""
            said = f", {rate}" if rate else ""
            self.note(f"{done} of {counts.lines} lines, {counts.failed} failed{said}{left}")

    def problem(self, line: Line, error: HttpError) -> None:
        self._problems += 1
        named = f" ({line.custom_id})" if line.custom_id else ""
        if self._problems <= TOLD_PROBLEMS:
            self.note(f"line {line.number}{named}: {' '.join(str(error).split())}")
        elif self._problems == TOLD_PROBLEMS + 1:
            self.note("more lines fail; the file of errors has them all")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
