"""What the clients of `homer.v1.LongContext` share: events, errors, channel settings.

Knows nothing about whether its caller waits or awaits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from cluster.errors import ServiceError
from cluster.retry import RETRY_AFTER
from homer.v1 import long_context_pb2 as pb

MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A service that restarts is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Event = pb.Accepted | pb.Progress | pb.Token | pb.Summary


def event_of(response: pb.GenerateResponse) -> Event:
    """The event in a message of the answer."""
    event: Event = getattr(response, response.WhichOneof("event") or "")
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


def summary_to_json(summary: pb.Summary) -> dict[str, Any]:
    """A summary as JSON: the fields of `homer.v1.Summary` by their names, zeros included."""
    fields: dict[str, Any] = MessageToDict(
        summary,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    # JSON from protobuf writes 64-bit integers as text.
    for name in ("prompt_tokens", "moved_bytes"):
        fields[name] = int(fields[name])
    fields["finish_reason"] = fields["finish_reason"].removeprefix("FINISH_REASON_").lower()
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
