"""A thin Python client of `homer.v1.LongContext`.

Knows nothing about Ray: it needs an address and nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.errors import ServiceError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc, sampling_pb2
from workers.plan_wire import PLAN_KINDS

MAX_MESSAGE_BYTES = 64 << 20

Event = pb.Accepted | pb.Progress | pb.Token | pb.Summary


class HomerClient:
    """Asks a Homer service about documents.

    Parameters
    ----------
    address : str
        "host:port" of the service.

    Examples
    --------
    >>> with HomerClient("127.0.0.1:50051") as client:
    ...     for event in client.generate(context=document, question="\\nWho did it?"):
    ...         if isinstance(event, Token):
    ...             print(event.text, end="")
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(
            address,
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ),
        )
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
        timeout_seconds : float, optional
            After this long the request is cancelled everywhere.

        Raises
        ------
        ServiceError
            When the service refuses or fails the request, or cannot be reached.

        Notes
        -----
        Closing the iterator, or leaving it to the garbage collector, cancels the request.
        """
        request = pb.GenerateRequest(
            request_id=request_id,
            sampling=sampling_pb2.SamplingParams(**(sampling or {})),
            compression=compression_to_wire(compression or {}),
            return_kept_indices=return_kept_indices,
        )
        if isinstance(context, str) and isinstance(question, str) and isinstance(prefix, str):
            request.text.CopyFrom(pb.TextPrompt(prefix=prefix, context=context, suffix=question))
        elif not isinstance(context, str) and not isinstance(question, str):
            request.tokens.CopyFrom(
                pb.TokenPrompt(
                    prefix_ids=[] if isinstance(prefix, str) else prefix,
                    context_ids=context,
                    suffix_ids=question,
                )
            )
        else:
            raise TypeError("give prefix, context and question all as text or all as token ids")
        with _errors(self.address):
            call = self._stub.Generate(request, timeout=timeout_seconds)
            try:
                for response in call:
                    yield getattr(response, response.WhichOneof("event"))
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


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        call: Any = error
        code, details = call.code(), call.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            details = f"no Homer service answers at {address} ({details})"
        raise ServiceError(code.name, details) from error


def compression_to_wire(settings: Mapping[str, Any]) -> pb.CompressionOptions:
    """Fields of `homer.HomerConfig` as a message."""
    wire = {name: value for name, value in settings.items() if value is not None}
    if "plan" in wire:
        wire["plan"] = PLAN_KINDS[wire["plan"]]
    return pb.CompressionOptions(**wire)
