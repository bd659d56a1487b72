"""What stands before the HTTP door's routes: counting, tokens, and limits for slow or large calls.

Knows nothing about what the routes do.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import prometheus_client
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.client_wire import MAX_MESSAGE_BYTES
from cluster.http.errors import RETRY_SECONDS, HttpError
from workers.guard import AUTHORIZATION
from workers.tokens import Tokens

# For load balancers, and the page that asks for a token itself.
OPEN_PATHS = ("/", "/health", "/version")
OPEN_FOLDERS = ("/page/",)


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """The most that a call may take before it is answered.

    Parameters
    ----------
    body_bytes, header_bytes : int
    all_bodies_bytes : int
        Of all calls that are being read or answered.
    body_seconds : float
        For the whole body to come.
    stall_seconds : float
        For a caller who reads nothing of the answer.
    """

    body_bytes: int = MAX_MESSAGE_BYTES
    header_bytes: int = 16 << 10
    all_bodies_bytes: int = 1 << 30
    body_seconds: float = 120.0
    stall_seconds: float = 60.0


class Counted:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, answered: prometheus_client.Counter) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._answered.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


class TokenGuard:
    """Refuses calls without a right token, before their body is read; without `tokens`, none."""

    def __init__(self, app: ASGIApp, tokens: Tokens | None) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._tokens is None or is_open(scope["path"]):
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(AUTHORIZATION, "")
        if self._tokens.name_of(given) is None:
            wrong = "the token is not one of those that count here"
            missing = "no token came with the request"
            refusal = HttpError(
                401,
                f"{wrong if given else missing}; send `Authorization: Bearer TOKEN` (an api_key)",
                code="invalid_api_key",
            ).response()
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return await refusal(scope, receive, send)
        await self._app(scope, receive, send)


class Limited:
    """Reads a body before the application does, within limits; hangs up on who does not read."""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app = app
        self._limits = limits
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = bytearray()
        try:
            try:
                whole = await self._read(body, scope, receive)
            except HttpError as refusal:
                return await refusal.response()(scope, receive, send)
            await self._answer(whole, scope, receive, send)
        finally:
            self.held_bytes -= len(body)

    async def _answer(self, whole: Message, scope: Scope, receive: Receive, send: Send) -> None:
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return whole

        async def patient(message: Message) -> None:
            async with asyncio.timeout(self._limits.stall_seconds):
                await send(message)

        await self._app(scope, replayed, patient)

    async def _read(self, body: bytearray, scope: Scope, receive: Receive) -> Message:
        """The whole body as one message; or what came in its place, when the caller has gone."""
        limits = self._limits
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > limits.header_bytes:
            raise HttpError(431, f"the headers have more than {limits.header_bytes} bytes")
        too_large = HttpError(
            413,
            f"the body has more than {limits.body_bytes} bytes; send a shorter document",
            code="request_too_large",
        )
        length = dict(headers).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message
                    piece = message.get("body", b"")
                    body += piece
                    self.held_bytes += len(piece)
                    if len(body) > limits.body_bytes:
                        raise too_large
                    if self.held_bytes > limits.all_bodies_bytes:
                        raise HttpError(
                            429,
                            "other documents take all the memory that there is for them; try again",
                            retry_after_seconds=RETRY_SECONDS,
                        )
                    if not message.get("more_body"):
                        return {"type": "http.request", "body": bytes(body), "more_body": False}
        except TimeoutError:
            raise HttpError(
                408, f"the body did not come whole within {limits.body_seconds:g} seconds"
            ) from None


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
