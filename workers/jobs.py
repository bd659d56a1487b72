"""A job: one piece of work whose events any number of calls may follow, each from the first event.

That makes a repeated call harmless: it follows the job that the first call started. Knows nothing
about what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from workers.errors import StaleCallError

E = TypeVar("E")


class Job(Generic[E]):
    """Runs `work` in a task of its own, which ends when nobody follows it any more.

    Parameters
    ----------
    attempt : int
        The attempt that started it.
    variant : hashable
        What the events depend on beside the work's name: calls that differ in it cannot share them.
    work : callable
        Given a function to emit events with.
    """

    def __init__(
        self,
        attempt: int,
        variant: Hashable,
        work: Callable[[Callable[[E], None]], Awaitable[None]],
    ) -> None:
        self.attempt = attempt
        self.variant = variant
        self._events: list[E] = []
        self._changed = asyncio.Event()
        self._followers = 0
        self._stopped: str | None = None
        self._task = asyncio.create_task(self._run(work))

    @property
    def done(self) -> bool:
        """Whether the work was completed."""
        ended = self._task.done() and not self._task.cancelled()
        return ended and self._task.exception() is None and self._stopped is None

    @property
    def running(self) -> bool:
        """Whether the work goes on and may be joined."""
        return not self._task.done() and self._stopped is None

    def stop(self, reason: str) -> None:
        """Cancel the work; who follows it is told the reason."""
        if self._stopped is None:
            self._stopped = reason
        self._task.cancel()
        self._changed.set()

    async def follow(self) -> AsyncGenerator[E, None]:
        """All events from the first to the last.

        Raises
        ------
        StaleCallError
            When the job was stopped.
        Exception
            What ended the work.
        """
        seen = 0
        self._followers += 1
        try:
            while True:
                while seen < len(self._events):
                    yield self._events[seen]
                    seen += 1
                if self._stopped is not None:
                    raise StaleCallError(self._stopped)
                if self._task.done():
                    self._task.result()
                    return
                await self._changed.wait()
        finally:
            self._followers -= 1
            if not self._followers and self.running:
                self.stop("every caller of this work has gone")

    def _emit(self, event: E) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        """Wake every follower, and let those that come back wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self, work: Callable[[Callable[[E], None]], Awaitable[None]]) -> None:
        try:
            await work(self._emit)
        finally:
            # Followers look at the task, which is done only after this; wake them then.
            asyncio.get_running_loop().call_soon(self._wake)
