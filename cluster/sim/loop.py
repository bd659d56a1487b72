"""An asyncio event loop whose clock jumps to the next timer when nothing else is to be done.

What takes an hour of `asyncio.sleep` is over at once, in the same order. For programs that wait for
timers alone: there are no sockets and no threads in virtual time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from homer.errors import HomerError

T = TypeVar("T")


class DeadlockError(HomerError):
    """Everything waits for something that no timer will bring."""


class _NoWaiting(selectors.DefaultSelector):
    """Where the loop would sleep, time passes."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("nothing is left that could happen: a task waits for ever")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Use it through `run_virtual`."""

    def __init__(self) -> None:
        self._no_waiting = _NoWaiting()
        super().__init__(self._no_waiting)

    def time(self) -> float:
        return self._no_waiting.now


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in virtual time, which starts at 0.

    Raises
    ------
    DeadlockError
        When it waits for what never comes.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
