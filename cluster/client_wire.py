"""What the clients of `homer.v1.LongContext` share: events, errors, channel settings.

Knows nothing about whether its caller waits or awaits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cluster.client_request import ClientRequest
from cluster.errors import ServiceError
from cluster.retry import RETRY_AFTER
from homer.v1 import long_context_pb2 as pb
from workers.tracing import caller_metadata

MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_SECONDS = 20
PING_TIMEOUT_SECONDS = 10
# A peer that has gone without a word is found by pings, while there are calls.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    # Where this is longer, it is what counts.
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    # A tree may take minutes between two events.
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A service that restarts is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Event = pb.Accepted | pb.Progress | pb.Token | pb.Summary


def start_call(
    stub: Any, request: ClientRequest, message: pb.GenerateRequest, timeout: float | None
) -> Any:
    """The call that answers `request`, whose `message` has no document where that is long."""
    options: dict[str, Any] = {"timeout": timeout, "metadata": caller_metadata()}
    if not request.is_long:
        return stub.Generate(message, **options)
    first = pb.GenerateFromStreamRequest(request=message)
    return stub.GenerateFromStream(chain([first], request.pieces()), **options)


def event_of(response: pb.GenerateResponse | pb.GenerateFromStreamResponse) -> Event:
    """The event in a message of the answer."""
    event: Event = getattr(response, str(response.WhichOneof("event")))
    return event


@contextmanager
def service_errors(address: str) -> Iterator[None]:
    """Calls of the service at `address`, whose failures are told as `ServiceError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise _service_error(error, address) from error


def _service_error(error: grpc.RpcError, address: str) -> ServiceError:
    call: Any = error
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no Homer service answers at {address} ({details})"
    return ServiceError(code.name, details, _retry_after(call))


def message_fields(message: Message) -> dict[str, Any]:
    """A message as JSON: its fields by their names, zeros included."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def summary_to_json(summary: pb.Summary) -> dict[str, Any]:
    """A summary as JSON: the fields of `homer.v1.Summary` by their names, zeros included."""
    fields = message_fields(summary)
    # JSON from protobuf writes 64-bit integers as text.
    for name in ("prompt_tokens", "moved_bytes"):
        fields[name] = int(fields[name])
    for answer in (fields, *fields["answers"]):
        reason = answer["finish_reason"]
        answer["finish_reason"] = reason.removeprefix("FINISH_REASON_").lower()
    return fields


def _retry_after(call: Any) -> float | None:
    """Seconds after which the service wants to be asked again."""
    for name, value in call.trailing_metadata() or ():
        if name == RETRY_AFTER:
            try:
                return max(0.0, float(value))
            except ValueError:
                return None
    return None
