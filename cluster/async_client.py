"""The client of `homer.v1.LongContext` for asyncio.

Knows nothing about Ray: it needs an address and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any, Self, cast

import grpc

from cluster.client_wire import CHANNEL_OPTIONS, Event, build_request, event_of, service_error
from cluster.errors import ServiceError
from cluster.retry import Replay, delay_seconds
from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from workers.tracing import caller_metadata


class AsyncHomerClient:
    """As `cluster.client.HomerClient`, for asyncio; made and used in one event loop.

    Parameters
    ----------
    address : str
        "host:port" of the service.
    retries : int
        As for `HomerClient`.

    Examples
    --------
    >>> async with AsyncHomerClient("127.0.0.1:50051") as client:       # doctest: +SKIP
    ...     async for event in client.generate(context=document, question="\\nWho did it?"):
    ...         if isinstance(event, Token):
    ...             print(event.text, end="")
    """

    def __init__(self, address: str, *, retries: int = 0) -> None:
        if retries < 0:
            raise ConfigError(f"retries is {retries}; use 0 or more")
        self.address = address
        self.retries = retries
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        # The generated stub works with both kinds of channel; its types know one.
        self._stub: Any = long_context_pb2_grpc.LongContextStub(cast(Any, self._channel))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        await self._channel.close()

    async def generate(
        self,
        *,
        context: str | Sequence[int],
        question: str | Sequence[int],
        prefix: str | Sequence[int] = "",
        request_id: str = "",
        sampling: Mapping[str, Any] | None = None,
        compression: Mapping[str, Any] | None = None,
        return_kept_indices: bool = False,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[Event]:
        """As `HomerClient.generate`. Closing the generator cancels the request.

        Raises
        ------
        ServiceError
            When the service refuses or fails the request, or cannot be reached.
        """
        request = build_request(
            context=context,
            question=question,
            prefix=prefix,
            request_id=request_id,
            sampling=sampling,
            compression=compression,
            return_kept_indices=return_kept_indices,
            priority=priority,
            repeatable=self.retries > 0,
        )
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        replay = Replay()
        for failures in itertools.count(1):
            replay.begin()
            try:
                async with aclosing(self._events(request, deadline)) as events:
                    async for event in events:
                        if not isinstance(event, pb.Token) or replay.is_new(event.token_id):
                            yield event
                return
            except ServiceError as error:
                delay = delay_seconds(error, failures)
                if delay is None or failures > self.retries:
                    raise
                if deadline is not None and time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)

    async def _events(
        self, request: pb.GenerateRequest, deadline: float | None
    ) -> AsyncGenerator[Event]:
        """The events of one attempt."""
        timeout_seconds = None if deadline is None else deadline - time.monotonic()
        with _errors(self.address):
            call = self._stub.Generate(request, timeout=timeout_seconds, metadata=caller_metadata())
            try:
                async for response in call:
                    yield event_of(response)
            finally:
                call.cancel()

    async def server_info(self, timeout_seconds: float = 30.0) -> pb.GetServerInfoResponse:
        """The service's model, settings and workers.

        Raises
        ------
        ServiceError
            When the service cannot be reached.
        """
        with _errors(self.address):
            info: pb.GetServerInfoResponse = await self._stub.GetServerInfo(
                pb.GetServerInfoRequest(), timeout=timeout_seconds
            )
            return info


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise service_error(error, address) from error
