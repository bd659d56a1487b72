"""A gRPC interceptor that bounds how much of the door one caller has at once.

Knows nothing about what the calls do, or how tokens are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from cluster.retry import retry_entries
from workers.guard import caller, is_open

RETRY_SECONDS = 1.0
# Of health, which anybody may watch, and without end.
MOST_WATCHES = 256
_WATCHES = "watches of health"


class CallLimit(grpc.aio.ServerInterceptor):
    """Lets each token have at most so many calls at once; those without one are one caller.

    Of health there may be `MOST_WATCHES` watches, whoever has them.

    Parameters
    ----------
    most : int
        0 is no limit.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._running: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        watches = is_open(details.method)
        # A check is over at once.
        if not (handler.response_streaming if watches else self._most):
            return handler
        inner = handler.stream_stream or handler.stream_unary

        async def counted(requests: AsyncIterator[bytes], context: Any) -> Any:
            name = _WATCHES if watches else caller.get()
            if watches and self._running[name] >= MOST_WATCHES:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"there are {MOST_WATCHES} watches of health already; call Check instead",
                )
            if not watches and self._running[name] >= self._most:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{name or 'callers without a token'} may have {self._most} calls at once; "
                    "wait for one to end, or have the service run with a higher "
                    "--max-calls-per-token",
                    retry_entries(RETRY_SECONDS),
                )
            self._running[name] += 1
            try:
                return await inner(requests, context)
            finally:
                self._running[name] -= 1

        kind = "stream_stream" if handler.response_streaming else "stream_unary"
        return handler._replace(**{kind: counted})
