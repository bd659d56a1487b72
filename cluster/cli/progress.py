"""Shows how a request is doing: bars on a terminal, plain lines elsewhere, or nothing.

Always on stderr: stdout belongs to the answer. Knows nothing about where events come from.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from homer.v1 import long_context_pb2 as pb

SECONDS_BETWEEN_LINES = 2.0


class ProgressView(Protocol):
    """Follows one request; a context manager that ends the view."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def status(self, text: str) -> None:
        """What happens before the first event."""

    def accepted(self, event: pb.Accepted) -> None: ...

    def progress(self, event: pb.Progress) -> None: ...


def progress_view(quiet: bool = False) -> ProgressView:
    """Bars where stderr is a terminal, else lines; nothing when `quiet`."""
    if quiet:
        return NoProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


class NoProgress:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def status(self, text: str) -> None:
        return None

    def accepted(self, event: pb.Accepted) -> None:
        return None

    def progress(self, event: pb.Progress) -> None:
        return None


class LineProgress(NoProgress):
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self._next = 0.0

    def status(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def accepted(self, event: pb.Accepted) -> None:
        self.status(describe_accepted(event))
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def progress(self, event: pb.Progress) -> None:
        if event.kind == pb.Progress.KIND_GATHER:
            self.status(f"kept {event.context_tokens_out} context tokens")
            return
        last = event.leaves_done == event.leaves_total and event.merges_done == event.merges_total
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            self.status(
                f"leaves {event.leaves_done}/{event.leaves_total}, "
                f"merges {event.merges_done}/{event.merges_total} ({event.worker})"
            )


class BarProgress(NoProgress):
    """Two bars: leaves and merges."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[worker]}"),
            console=self._console,
        )
        self._status = self._console.status("")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._status.stop()
        self._bars.stop()

    def status(self, text: str) -> None:
        self._status.update(text)

    def accepted(self, event: pb.Accepted) -> None:
        self._status.stop()
        self._console.print(describe_accepted(event), style="dim", highlight=False)
        # A request that is made again starts anew.
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.start()
        self._leaves = self._bars.add_task("leaves", total=event.leaves, worker="")
        self._merges = self._bars.add_task("merges", total=event.merges or None, worker="")

    def progress(self, event: pb.Progress) -> None:
        if event.kind == pb.Progress.KIND_GATHER:
            self._bars.stop()
            return
        task = self._leaves if event.kind == pb.Progress.KIND_LEAF else self._merges
        self._bars.update(self._leaves, completed=event.leaves_done)
        self._bars.update(self._merges, completed=event.merges_done)
        self._bars.update(task, worker=event.worker)


def describe_accepted(event: pb.Accepted) -> str:
    """The plan of a request in one line."""
    return (
        f"{event.prompt_tokens:,} prompt tokens: {event.leaves} leaves in {event.levels} level(s), "
        f"{event.merges} merges, {event.subtrees} subtrees for the workers"
    )


def describe_summary(event: pb.Summary) -> str:
    """What a request took, in one line."""
    seconds = event.seconds
    return (
        f"kept {event.kept_tokens} of {event.prompt_tokens:,} tokens; queue {seconds.queue:.2f} s, "
        f"leaves {seconds.leaves:.2f} s, merges {seconds.merges:.2f} s, "
        f"gather {seconds.gather:.2f} s, first token after {seconds.time_to_first_token:.2f} s, "
        f"{event.generated_tokens} tokens in {seconds.decode:.2f} s; "
        f"{event.moved_bytes / 1e6:.2f} MB between workers"
    )
