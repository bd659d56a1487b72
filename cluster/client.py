"""A thin Python client of `homer.v1.LongContext`.

Knows nothing about Ray: it needs an address and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from types import TracebackType
from typing import Self

from cluster.async_client import AsyncHomerClient
from cluster.client_request import ClientRequest, from_keywords
from cluster.client_wire import CHANNEL_OPTIONS, Event, event_of, service_errors, start_call
from cluster.errors import ServiceError
from cluster.retry import Attempts, check_retries
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from workers.channels import Credentials
from workers.tls import Tls

__all__ = ["AsyncHomerClient", "ClientRequest", "HomerClient", "Tls"]


class HomerClient:
    """Asks a Homer service about documents.

    Parameters
    ----------
    address : str
        "host:port" of the service.
    retries : int
        How often a request is made again when the service is overloaded or not there for now
        (RESOURCE_EXHAUSTED, UNAVAILABLE), after the time that it asks for, or after half a second,
        one, two, … In doing so

        - `Accepted` and progress come anew for each attempt;
        - tokens that were given already are not given again. The answer is the same each time: a
          request that samples without a seed is given one.
    token : str, optional
        One of the tokens that the service asks for.
    tls : Tls, optional
        The connection is TLS; `Tls()` trusts the system's certificate authorities.

    Examples
    --------
    >>> from cluster.client import HomerClient
    >>> with HomerClient(address) as client:
    ...     *events, summary = client.generate(
    ...         context=document, question="\\nWho did it?", sampling={"max_tokens": 8}
    ...     )
    >>> summary.generated_tokens
    8
    >>> [type(event).__name__ for event in (events[0], events[1], events[-1])]
    ['Accepted', 'Progress', 'Token']
    """

    def __init__(
        self, address: str, *, retries: int = 0, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self.address = address
        self.retries = check_retries(retries)
        self._channel = Credentials(token, tls).channel(address, CHANNEL_OPTIONS)
        self._stub = long_context_pb2_grpc.LongContextStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        self._channel.close()

    @from_keywords(ClientRequest)
    def generate(self, request: ClientRequest) -> Generator[Event]:
        """Ask a question about a document; yields events as they come, the summary last.

        Takes what `ClientRequest` is made from: `generate(context=…, question=…)`.

        Raises
        ------
        ServiceError
            When the service refuses or fails the request, or cannot be reached.

        Notes
        -----
        Closing the iterator, or leaving it to the garbage collector, cancels the request.
        """
        message = request.to_wire(repeatable=self.retries > 0)
        attempts = Attempts(self.retries, request.timeout_seconds)
        while True:
            try:
                with closing(self._events(request, message, attempts.begin())) as events:
                    for event in events:
                        if not isinstance(event, pb.Token) or attempts.is_new(
                            event.token_id, event.answer
                        ):
                            yield event
                return
            except ServiceError as error:
                delay = attempts.delay_after(error)
            time.sleep(delay)

    def _events(
        self, request: ClientRequest, message: pb.GenerateRequest, timeout: float | None
    ) -> Generator[Event]:
        """The events of one attempt."""
        with service_errors(self.address):
            call = start_call(self._stub, request, message, timeout)
            try:
                for response in call:
                    yield event_of(response)
            finally:
                call.cancel()

    def server_info(self, timeout_seconds: float = 30.0) -> pb.GetServerInfoResponse:
        """The service's model, settings and workers.

        Raises
        ------
        ServiceError
            When the service cannot be reached.
        """
        with service_errors(self.address):
            return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_seconds)

    def trace(self, request_id: str, timeout_seconds: float = 30.0) -> pb.GetTraceResponse:
        """What happened when and where for a request that runs or ended not long ago.

        Raises
        ------
        ServiceError
            When the service cannot be reached, or does not know the request (any more).
        """
        request = pb.GetTraceRequest(request_id=request_id)
        with service_errors(self.address):
            return self._stub.GetTrace(request, timeout=timeout_seconds)

    def abort(self, request_id: str, timeout_seconds: float = 30.0) -> int:
        """End the requests of a name; returns how many. Their callers get CANCELLED.

        Raises
        ------
        ServiceError
            NOT_FOUND where none of that name that this token began waits or runs.
        """
        request = pb.AbortRequest(request_id=request_id)
        with service_errors(self.address):
            aborted = self._stub.Abort(request, timeout=timeout_seconds)
            return int(aborted.aborted_requests)

    def count_tokens(
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
            counts: pb.CountTokensResponse = self._stub.CountTokens(
                request, timeout=timeout_seconds
            )
            return counts

    def model_info(self, timeout_seconds: float = 30.0) -> pb.GetModelInfoResponse:
        """The model, its limits, and the settings for requests that bring none.

        Raises
        ------
        ServiceError
            When the service cannot be reached.
        """
        with service_errors(self.address):
            info: pb.GetModelInfoResponse = self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), timeout=timeout_seconds
            )
            return info
