"""The client of `homer.v1.LongContext` for asyncio.

Knows nothing about Ray: it needs an address and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, cast

from cluster.client_request import ClientRequest, from_keywords
from cluster.client_wire import CHANNEL_OPTIONS, Event, event_of, service_errors, start_call
from cluster.errors import ServiceError
from cluster.retry import Attempts, check_retries
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from workers.channels import Credentials
from workers.tls import Tls


class AsyncHomerClient:
    """As `cluster.client.HomerClient`, for asyncio; made and used in one event loop.

    Parameters
    ----------
    address : str
        "host:port" of the service.
    retries, token, tls
        As for `HomerClient`.

    Examples
    --------
    >>> import asyncio
    >>> from cluster.client import AsyncHomerClient
    >>> async def count_tokens():
    ...     async with AsyncHomerClient(address) as client:
    ...         answer = client.generate(
    ...             context=document, question="\\nWho did it?", sampling={"max_tokens": 8}
    ...         )
    ...         return len([event async for event in answer if type(event).__name__ == "Token"])
    >>> asyncio.run(count_tokens())
    8
    """

    def __init__(
        self, address: str, *, retries: int = 0, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self.address = address
        self.retries = check_retries(retries)
        self._channel = Credentials(token, tls).aio_channel(address, CHANNEL_OPTIONS)
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

    @from_keywords(ClientRequest)
    async def generate(self, request: ClientRequest) -> AsyncGenerator[Event]:
        """As `HomerClient.generate`. Closing the generator cancels the request.

        Raises
        ------
        ServiceError
            When the service refuses or fails the request, or cannot be reached.
        """
        message = request.to_wire(repeatable=self.retries > 0)
        attempts = Attempts(self.retries, request.timeout_seconds)
        while True:
            try:
                async with aclosing(self._events(request, message, attempts.begin())) as events:
                    async for event in events:
                        if not isinstance(event, pb.Token) or attempts.is_new(
                            event.token_id, event.answer
                        ):
                            yield event
                return
            except ServiceError as error:
                delay = attempts.delay_after(error)
            await asyncio.sleep(delay)

    async def _events(
        self, request: ClientRequest, message: pb.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Event]:
        """The events of one attempt."""
        with service_errors(self.address):
            call = start_call(self._stub, request, message, timeout)
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
        with service_errors(self.address):
            info: pb.GetServerInfoResponse = await self._stub.GetServerInfo(
                pb.GetServerInfoRequest(), timeout=timeout_seconds
            )
            return info

    async def abort(self, request_id: str, timeout_seconds: float = 30.0) -> int:
        """End the requests of a name; returns how many. Their callers get CANCELLED.

        Raises
        ------
        ServiceError
            NOT_FOUND where none of that name that this token began waits or runs.
        """
        request = pb.AbortRequest(request_id=request_id)
        with service_errors(self.address):
            aborted = await self._stub.Abort(request, timeout=timeout_seconds)
            return int(aborted.aborted_requests)

    async def count_tokens(
        self,
        context: str,
        question: str = "",
        prefix: str = "",
        timeout_seconds: float = 30.0,
    ) -> pb.CountTokensResponse:
        """How many tokens a prompt has, by the service's tokenizer.

        Raises
        ------
        ServiceError
            When the service has no tokenizer, or cannot be reached.
        """
        text = pb.TextPrompt(prefix=prefix, context=context, suffix=question)
        request = pb.CountTokensRequest(text=text)
        with service_errors(self.address):
            counts: pb.CountTokensResponse = await self._stub.CountTokens(
                request, timeout=timeout_seconds
            )
            return counts

    async def model_info(self, timeout_seconds: float = 30.0) -> pb.GetModelInfoResponse:
        """The model, its limits, and the settings for requests that bring none.

        Raises
        ------
        ServiceError
            When the service cannot be reached.
        """
        with service_errors(self.address):
            info: pb.GetModelInfoResponse = await self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), timeout=timeout_seconds
            )
            return info
