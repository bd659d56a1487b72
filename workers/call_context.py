"""What each call of a worker is about, for its log lines and spans: bound once, as it comes in.

A gRPC interceptor, so that the calls themselves need not think of it. Knows nothing about what they
do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from workers.logs import log_about
from workers.tracing import Tracing

_log = logging.getLogger(__name__)

# Calls that take long enough to be looked for in a log.
WORK = {"RunSubtree", "Merge", "GenerateTokens"}


class CallContext(grpc.aio.ServerInterceptor):
    """Binds request, node and attempt of each call, and the trace that it belongs to."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        name = details.method.rsplit("/", 1)[-1]
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self._bind(request, context)
            with _logged(name):
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

        async def unary(request: Any, context: Any) -> Any:
            self._bind(request, context)
            with _logged(name):
                return await inner(request, context)

        # Health checks stream by writing, not by yielding; they are about no request.
        if handler.response_streaming and not name.startswith(("Watch",)):
            return handler._replace(unary_stream=stream)
        return handler if handler.response_streaming else handler._replace(unary_unary=unary)

    def _bind(self, request: Any, context: Any) -> None:
        log_about(**call_fields(request))
        self._tracing.follow(context.invocation_metadata())


def call_fields(request: Any) -> dict[str, Any]:
    """What a message of `homer.v1.Worker` says that its call is about."""
    fields: dict[str, Any] = {}
    names = request.DESCRIPTOR.fields_by_name
    if "request_id" in names:
        fields["request_id"] = request.request_id
    elif "request" in names:
        fields["request_id"] = request.request.request_id
    if "node" in names:
        fields["node"] = f"{request.node.height}/{request.node.index}"
    if "attempt" in names:
        fields["attempt"] = request.attempt
    return fields


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """Lines at the beginning and at the end of work; of other calls only for those who debug."""
    level = logging.INFO if name in WORK else logging.DEBUG
    started = time.perf_counter()
    _log.log(level, "%s begins", name)
    ended = "fails"
    try:
        yield
        ended = "is done"
    except (asyncio.CancelledError, GeneratorExit):
        ended = "is cancelled"
        raise
    finally:
        _log.log(level, "%s %s after %.3f s", name, ended, time.perf_counter() - started)
