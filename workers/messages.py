"""A gRPC interceptor for the messages of calls: it refuses what is none, and waits for nobody long.

By itself gRPC answers bytes that it cannot parse with UNKNOWN, and waits for ever for a message
that comes in drops, or for a caller that does not read. Knows nothing about what the calls do.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

# A status goes out behind what the caller has not read: perhaps never.
LAST_WORD_SECONDS = 1.0
Behaviour = Callable[[Any, Any], Awaitable[Any]]


class Messages(grpc.aio.ServerInterceptor):
    """Parses, and bounds the time for, each message.

    The handlers that it gives are coroutine functions of an iterator of requests and the context,
    whatever they were before.

    Parameters
    ----------
    read_seconds : float, optional
        How long a message may take to come.
    write_seconds : float, optional
        How long a caller may have no room for the next message.
    """

    def __init__(
        self, read_seconds: float | None = None, write_seconds: float | None = None
    ) -> None:
        self._read_seconds = read_seconds
        self._write_seconds = write_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        inner = (
            handler.stream_stream
            or handler.stream_unary
            or handler.unary_stream
            or handler.unary_unary
        )
        parse = handler.request_deserializer or bytes

        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            patient = _Patient(context, self._write_seconds)
            try:
                async with aclosing(self._parsed(requests, parse, context)) as messages:
                    given = messages if handler.request_streaming else await _one(messages, context)
                    if not inspect.isasyncgenfunction(inner):
                        return await inner(given, patient)
                    async with aclosing(inner(given, patient)) as responses:
                        async for response in responses:
                            await patient.write(response)
            except _StalledError:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_SECONDS):
                        await context.abort(
                            grpc.StatusCode.DEADLINE_EXCEEDED,
                            f"nothing of the answer was read for {self._write_seconds:g} seconds",
                        )
                raise asyncio.CancelledError from None

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(call, response_serializer=handler.response_serializer)

    async def _parsed(
        self, requests: AsyncIterator[bytes], parse: Callable[[bytes], Any], context: Any
    ) -> AsyncGenerator[Any, None]:
        while True:
            try:
                async with asyncio.timeout(self._read_seconds):
                    raw = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"the request did not come within {self._read_seconds:g} seconds",
                )
            try:
                message = parse(raw)
            except DecodeError as error:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"the request is no such message: {error}"
                )
            yield message


class _StalledError(asyncio.CancelledError):
    """The caller reads nothing; to the handler it is one who hung up."""


class _Patient:
    """A call's context whose `write` does not wait for ever."""

    def __init__(self, context: Any, seconds: float | None) -> None:
        self._context = context
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._context.write(message)
        except TimeoutError:
            raise _StalledError from None


async def _one(messages: AsyncIterator[Any], context: Any) -> Any:
    async for message in messages:
        return message
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call came without its message")
