"""How far each worker's clock is ahead of ours, as far as messages tell.

A worker's time in a message lies between when we asked and when we heard: each message bounds the
difference. Bounds are loosened as they age, for clocks drift. Knows nothing about what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Twice what a quartz clock may be off, which no time service corrects.
DRIFT = 1e-4


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a clock is ahead, in seconds."""

    low: float = float("-inf")
    high: float = float("inf")

    def within(self, other: Bounds) -> Bounds:
        """Both at once; `self` alone where they cannot both be true: a clock was set."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Bounds(low, high) if low <= high else self

    def loosened(self, seconds: float) -> Bounds:
        """What is still true after so long."""
        return Bounds(self.low - DRIFT * seconds, self.high + DRIFT * seconds)

    @property
    def ahead(self) -> float:
        """The best guess: no difference where there may be none, else the middle."""
        if self.low <= 0 <= self.high:
            return 0.0
        return (self.low + self.high) / 2


class Clocks:
    """Bounds on every worker's clock.

    Parameters
    ----------
    now : callable
        Our own clock, unix seconds.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self._bounds: dict[str, tuple[Bounds, float]] = {}

    def bounds(self, worker: str) -> Bounds:
        """What is known of a worker's clock."""
        known, at = self._bounds.get(worker, (Bounds(), 0.0))
        return known.loosened(max(self.now() - at, 0.0))

    def answered(self, worker: str, asked: float, there: float) -> None:
        """An answer has come that was written at `there`; we asked for it at `asked`."""
        new = Bounds(there - self.now(), there - asked)
        self._bounds[worker] = (new.within(self.bounds(worker)), self.now())

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._bounds.pop(worker, None)
