"""A thin Python client of `homer.v1.LongContext`.

Knows nothing about Ray: it needs an address and nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.async_client import AsyncHomerClient
from cluster.client_wire import (
    CHANNEL_OPTIONS,
    Event,
    build_request,
    event_of,
    service_error,
)
from cluster.errors import ServiceError
from cluster.retry import Replay, delay_seconds
from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from workers.tracing import caller_metadata

__all__ = ["AsyncHomerClient", "HomerClient"]


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

    Examples
    --------
    >>> with HomerClient("127.0.0.1:50051") as client:
    ...     for event in client.generate(context=document, question="\\nWho did it?"):
    ...         if isinstance(event, Token):
    ...             print(event.text, end="")
    """

    def __init__(self, address: str, *, retries: int = 0) -> None:
        if retries < 0:
            raise ConfigError(f"retries is {retries}; use 0 or more")
        self.address = address
        self.retries = retries
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
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

    def generate(
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
    ) -> Generator[Event]:
        """Ask `question` about `context`; yields events as they come, the summary last.

        Parameters
        ----------
        context, question, prefix : str, or sequence of int
            All as text, or all as token ids (an empty prefix goes with both).
        request_id : str
            Made by the service when empty.
        sampling : mapping, optional
            Fields of `homer.v1.SamplingParams`: max_tokens, temperature, top_p, …
        compression : mapping, optional
            Fields of `homer.HomerConfig` that override the service's settings.
        return_kept_indices : bool
            Ask for the context indices that survived, in the summary.
        priority : int
            From -8 to 8: higher ones start first and get a larger share of the workers.
        timeout_seconds : float, optional
            After this long, all attempts together, the request is cancelled everywhere.

        Raises
        ------
        ServiceError
            When the service refuses or fails the request, or cannot be reached.

        Notes
        -----
        Closing the iterator, or leaving it to the garbage collector, cancels the request.
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
                with closing(self._events(request, deadline)) as events:
                    for event in events:
                        if not isinstance(event, pb.Token) or replay.is_new(event.token_id):
                            yield event
                return
            except ServiceError as error:
                delay = delay_seconds(error, failures)
                if delay is None or failures > self.retries:
                    raise
                if deadline is not None and time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)

    def _events(self, request: pb.GenerateRequest, deadline: float | None) -> Generator[Event]:
        """The events of one attempt."""
        timeout_seconds = None if deadline is None else deadline - time.monotonic()
        with _errors(self.address):
            call = self._stub.Generate(request, timeout=timeout_seconds, metadata=caller_metadata())
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
        with _errors(self.address):
            return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_seconds)

    def trace(self, request_id: str, timeout_seconds: float = 30.0) -> pb.GetTraceResponse:
        """What happened when and where for a request that runs or ended not long ago.

        Raises
        ------
        ServiceError
            When the service cannot be reached, or does not know the request (any more).
        """
        request = pb.GetTraceRequest(request_id=request_id)
        with _errors(self.address):
            return self._stub.GetTrace(request, timeout=timeout_seconds)


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise service_error(error, address) from error
