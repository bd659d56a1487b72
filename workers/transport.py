"""How gRPC is set up between workers, the same on both ends: message limits, keepalive, codecs.

Knows nothing about what the calls do.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from homer.v1 import tensor_pb2, worker_pb2

# A request carries at most the token ids of a subtree, up to five bytes each.
MAX_MESSAGE_BYTES = 64 << 20
MAX_METADATA_BYTES = 16 << 10
KEEPALIVE_SECONDS = 20
PING_TIMEOUT_SECONDS = 10

_COMMON: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    # Where this is longer, it is what counts.
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON,
    # Workers talk to each other directly, whatever proxy the environment names for the web.
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON,
    # Accept the pings that the channel options above send.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # A port that is taken must be an error, not a second listener.
    ("grpc.so_reuseport", 0),
)

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"]


def method_path(name: str) -> str:
    """The path of a method of `homer.v1.Worker`."""
    return f"/{SERVICE.full_name}/{name}"


def worker_handlers(servicer: object) -> grpc.GenericRpcHandler:
    """Handlers for a servicer of `homer.v1.Worker`, as generated code makes them but for one thing.

    Methods that stream tensors give frames that are encoded already.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in SERVICE.methods:
        request = GetMessageClass(method.input_type)
        response = GetMessageClass(method.output_type)
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=request.FromString,
            response_serializer=(
                None if response is tensor_pb2.TensorFrame else response.SerializeToString
            ),
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def tensor_call(channel: grpc.aio.Channel, name: str, request: Any) -> Any:
    """Call a method that streams tensors; yields its frames as they came, for `decode_frame`."""
    multi: Any = channel.unary_stream(
        method_path(name),
        request_serializer=type(request).SerializeToString,
        response_deserializer=None,
    )
    return multi(request)
