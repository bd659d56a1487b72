"""What the clients of `homer.v1.LongContext` share: requests, events, errors and channel settings.

Knows nothing about whether its caller waits or awaits.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from cluster.errors import ServiceError
from cluster.retry import RETRY_AFTER
from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import sampling_pb2
from workers.plan_wire import PLAN_KINDS

MAX_MESSAGE_BYTES = 64 << 20
SEED_BITS = 63
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A service that restarts is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Event = pb.Accepted | pb.Progress | pb.Token | pb.Summary


def build_request(
    *,
    context: str | Sequence[int],
    question: str | Sequence[int],
    prefix: str | Sequence[int] = "",
    request_id: str = "",
    sampling: Mapping[str, Any] | None = None,
    compression: Mapping[str, Any] | None = None,
    return_kept_indices: bool = False,
    priority: int = 0,
    repeatable: bool = False,
) -> pb.GenerateRequest:
    """A request as it travels. Where it is to be `repeatable` and samples, it has a seed.

    Raises
    ------
    TypeError
        When its parts are neither all text nor all token ids.
    """
    request = pb.GenerateRequest(
        request_id=request_id,
        sampling=sampling_pb2.SamplingParams(**(sampling or {})),
        compression=compression_to_wire(compression or {}),
        return_kept_indices=return_kept_indices,
        priority=priority,
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
    if repeatable and request.sampling.temperature and not request.sampling.HasField("seed"):
        request.sampling.seed = secrets.randbits(SEED_BITS)
    return request


def event_of(response: pb.GenerateResponse) -> Event:
    """The event in a message of the answer."""
    event: Event = getattr(response, response.WhichOneof("event") or "")
    return event


def service_error(error: grpc.RpcError, address: str) -> ServiceError:
    """What a failed call means to a user."""
    call: Any = error
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no Homer service answers at {address} ({details})"
    return ServiceError(code.name, details, _retry_after(call))


def compression_to_wire(settings: Mapping[str, Any]) -> pb.CompressionOptions:
    """Fields of `homer.HomerConfig` as a message.

    Raises
    ------
    ConfigError
        When there is no such field or plan.
    """
    wire = {name: value for name, value in settings.items() if value is not None}
    if wire.get("plan", "balanced") not in PLAN_KINDS:
        raise ConfigError(f"plan is {wire['plan']!r}; use one of {list(PLAN_KINDS)}")
    if "plan" in wire:
        wire["plan"] = PLAN_KINDS[wire["plan"]]
    try:
        return pb.CompressionOptions(**wire)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"compression settings: {error}") from error


def _retry_after(call: Any) -> float | None:
    """Seconds after which the service wants to be asked again."""
    for name, value in call.trailing_metadata() or ():
        if name == RETRY_AFTER:
            try:
                return max(0.0, float(value))
            except ValueError:
                return None
    return None
