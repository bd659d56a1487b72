"""Ends an answer's text before a stop string, wherever its pieces are cut.

Knows nothing about tokens or requests.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Gives the text that is certain to come before every one of `stops`."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; returns what may be shown. After a stop string there is nothing more."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        held = self._held + text
        starts = [start for stop in self._stops if (start := held.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return held[: min(starts)]
        # What could be the beginning of a stop string is not shown yet.
        keep = max(self._beginning(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How many characters at the end of `text` begin `stop`."""
        return next(
            n for n in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:n])
        )
