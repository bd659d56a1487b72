"""How many requests are with a service at once: as many as it takes, and no more than asked for.

Like TCP: half as many after a refusal, and from there one more for each round of answers. Knows
nothing about requests.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType


class Gate:
    """Entered around each request; used in one event loop.

    Parameters
    ----------
    most : int
        Requests at once while the service takes all.

    Attributes
    ----------
    limit : float
        Requests at once now.
    """

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        self._most = most
        self._inside = 0
        self._opens_at = 0.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            while self._inside >= int(self.limit) or self._closed_seconds() > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._closed_seconds() or None):
                        await self._changed.wait()
            self._inside += 1

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inside -= 1
        async with self._changed:
            self._changed.notify_all()

    def answered(self) -> None:
        """The service took a request: it may have room for more."""
        self.limit = min(float(self._most), self.limit + 1 / self.limit)

    def refused(self, seconds: float) -> bool:
        """The service has no room; nobody enters for so long. Whether that is news."""
        now = asyncio.get_running_loop().time()
        # Others that were sent together with this one say the same thing.
        news = now >= self._opens_at
        if news:
            self.limit = max(1.0, self.limit / 2)
        self._opens_at = max(self._opens_at, now + seconds)
        return news

    def _closed_seconds(self) -> float:
        return max(0.0, self._opens_at - asyncio.get_running_loop().time())
