"""A gRPC interceptor that lets in only calls with a token.

Knows nothing about what the calls do. Whoever is refused has sent nothing but headers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from grpc_health.v1 import health

from workers.logs import log_about
from workers.tokens import Tokens

AUTHORIZATION = "authorization"
# Load balancers ask for it, and it tells nothing.
OPEN_SERVICES = (health.SERVICE_NAME,)
NO_TOKEN = (
    "no token came with the call; send `authorization: Bearer TOKEN` (HomerClient(token=…), or "
    "--token-file or HOMER_TOKEN of the homer command)"
)
WRONG_TOKEN = "the token that came with the call is not one of those that count here"

caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the token of the call that runs; empty where none is asked for."""


class Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without a right token; where `tokens` is None, none."""

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        if self._tokens is None or is_open(details.method):
            return await continuation(details)
        given = next((v for k, v in details.invocation_metadata or () if k == AUTHORIZATION), "")
        name = self._tokens.name_of(str(given))
        if name is None:
            return refuse(grpc.StatusCode.UNAUTHENTICATED, WRONG_TOKEN if given else NO_TOKEN)
        caller.set(name)
        log_about(caller=name)
        return await continuation(details)


def is_open(method: str) -> bool:
    """Whether a method, by its path, is for everybody."""
    return method.strip("/").split("/")[0] in OPEN_SERVICES


def refuse(
    code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler for any method that refuses, before a message of the call is read."""

    async def abort(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(code, details, metadata)

    return grpc.stream_unary_rpc_method_handler(abort)
