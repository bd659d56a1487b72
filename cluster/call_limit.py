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


class CallLimit(grpc.aio.ServerInterceptor):
    """Lets each token have at most so many calls at once; those without one are one caller.

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
        if handler is None or not self._most or is_open(details.method):
            return handler
        inner = handler.stream_stream or handler.stream_unary

        async def counted(requests: AsyncIterator[bytes], context: Any) -> Any:
            name = caller.get()
            if self._running[name] >= self._most:
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
