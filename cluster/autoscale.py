"""When a pool grows and when it gives workers back: a pure decision from what there is to do.

Knows nothing about Ray; the pool carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.job import SchedulerLoad
from cluster.options import ServeOptions


@dataclass(frozen=True)
class Decision:
    """What to change: workers to ask for, waiting ones to ask for no longer, idle ones to drain."""

    ask: int = 0
    withdraw: int = 0
    give_back: tuple[str, ...] = ()


class Autoscaler:
    """Decides again and again, with a memory of how long things have been as they are.

    Parameters
    ----------
    options : ServeOptions
    """

    def __init__(self, options: ServeOptions) -> None:
        self._fewest = options.fewest
        self._most = options.most
        self._grow_after_seconds = options.grow_after_seconds
        self._idle_seconds = options.idle_seconds
        self._pressed_since: float | None = None
        self._relaxed_since: float | None = None
        self._idle_since: dict[str, float] = {}

    def decide(
        self, now: float, load: SchedulerLoad, workers: Sequence[str], waiting: int
    ) -> Decision:
        """What to do at `now`, in seconds of any clock.

        Parameters
        ----------
        workers : sequence of str
            Names of the workers that may be given back, oldest first. Of them some may have ended.
        waiting : int
            Workers that were asked for, or lost, and do not serve yet.
        """
        self._note(now, load)
        count = len(workers) + waiting
        if self._pressed_since is not None:
            if now - self._pressed_since < self._grow_after_seconds or count >= self._most:
                return Decision()
            # A moment for what was asked for, before more is.
            self._pressed_since = now
            # At most twice as many: what waits may be short.
            wanted = max(1, min(load.queued_jobs, count)) - waiting
            return Decision(ask=max(0, min(wanted, self._most - count)))
        spare = max(0, count - self._fewest)
        if self._relaxed_since is None or not spare:
            return Decision()
        if waiting and now - self._relaxed_since >= self._idle_seconds:
            return Decision(withdraw=min(waiting, spare))
        unused = [
            name
            for name in reversed(workers)
            if now - self._idle_since.get(name, now) >= self._idle_seconds
        ]
        return Decision(give_back=tuple(unused[:spare]))

    def _note(self, now: float, load: SchedulerLoad) -> None:
        busy = not load.idle_workers and load.running_jobs + load.queued_jobs > 0
        # What waits for memory needs more workers, whatever those that there are do.
        pressed = busy or load.growing_jobs > 0
        if not pressed:
            self._pressed_since = None
            self._relaxed_since = now if self._relaxed_since is None else self._relaxed_since
        else:
            self._relaxed_since = None
            self._pressed_since = now if self._pressed_since is None else self._pressed_since
        self._idle_since = {name: self._idle_since.get(name, now) for name in load.idle_workers}
