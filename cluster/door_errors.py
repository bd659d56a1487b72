"""What an error of the service means to a caller: a gRPC status, with details that programs read.

Knows nothing about gRPC servers.
"""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import (
    CapacityError,
    NotServingError,
    NoWorkersError,
    OverloadedError,
    RequestAbortedError,
    WorkerCallError,
    WorkerLostError,
)
from cluster.retry import retry_entries
from homer.errors import HomerError
from workers.errors import status_code

# The richer error model, which every gRPC library has something to read: a google.rpc.Status.
STATUS_DETAILS = "grpc-status-details-bin"
DOMAIN = "homer"
# A worker takes about so long to come back.
LOST_RETRY_SECONDS = 5.0

Metadata = tuple[tuple[str, str | bytes], ...]

# A status and its details are metadata, of which clients take 8 KiB.
LONGEST_MESSAGE = 600


def wire_code(error: HomerError) -> grpc.StatusCode:
    """The status that an error means to a user."""
    if isinstance(error, RequestAbortedError):
        return grpc.StatusCode.CANCELLED
    if isinstance(error, WorkerLostError | NoWorkersError | NotServingError):
        return grpc.StatusCode.UNAVAILABLE
    if isinstance(error, OverloadedError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, CapacityError):
        # Not RESOURCE_EXHAUSTED, after which clients try again.
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, WorkerCallError):
        return grpc.StatusCode[error.code]
    return status_code(error)


def message(error: HomerError) -> str:
    """What the caller is told; an error may quote what the caller sent, of whatever length."""
    text = str(error)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"


def retry_seconds(error: HomerError) -> float | None:
    """When to ask again; None where that does not help."""
    if isinstance(error, OverloadedError | NoWorkersError):
        return error.retry_after_seconds
    return LOST_RETRY_SECONDS if isinstance(error, WorkerLostError) else None


def error_metadata(error: HomerError) -> Metadata:
    """Trailing metadata of a call that ends with `error`.

    When to ask again, in seconds and as gRPC's own retries read it; and a `google.rpc.Status` with
    `ErrorInfo` (the error's name as its reason), `RetryInfo` where asking again helps, and
    `BadRequest` where the request is at fault.
    """
    code, seconds = wire_code(error), retry_seconds(error)
    reason = type(error).__name__.removesuffix("Error")
    told_text = message(error)
    status = status_pb2.Status(code=code.value[0], message=told_text)
    info = error_details_pb2.ErrorInfo(
        reason="".join(f"_{c}" if c.isupper() else c for c in reason).strip("_").upper(),
        domain=DOMAIN,
    )
    status.details.add().Pack(info)
    if seconds is not None:
        delay = Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(description=told_text)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    told: Metadata = ((STATUS_DETAILS, status.SerializeToString()),)
    if seconds is not None:
        told += retry_entries(seconds)
    return told
