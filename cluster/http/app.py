"""The HTTP door's routes, over a client of the gRPC service.

Knows nothing about Ray, or about how prompts are cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cluster.async_client import AsyncHomerClient
from cluster.client_wire import Event
from cluster.errors import ServiceError
from cluster.http.asking import Served
from cluster.http.bodies import ChatBody, CompletionBody
from cluster.http.errors import HttpError
from cluster.http.middleware import Counted, HttpLimits, Limited, TokenGuard
from cluster.http.page import add_page
from homer import __version__
from homer.errors import ConfigError, HomerError, PromptError
from workers.guard import AUTHORIZATION
from workers.tls import Tls
from workers.tokens import Tokens

HEALTH_SECONDS = 5.0
LIMITS = HttpLimits()
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,100}")


class HttpDoor:
    """Answers HTTP requests by asking the gRPC service at `address`.

    Parameters
    ----------
    address : str
        "host:port" of the gRPC service.
    model_name : str
        What clients call the model.
    tokens : Tokens, optional
        Those that callers must bring, which are the service's own: a caller's token goes on to the
        service, and the first is the door's.
    tls : Tls, optional
        TLS between the door and the service.
    """

    def __init__(
        self,
        address: str,
        model_name: str = "",
        tokens: Tokens | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.tokens = tokens
        self._address = address
        self._tls = tls
        self._clients: dict[str | None, AsyncHomerClient] = {}
        self._model_name = model_name
        self._served: Served | None = None
        self._loading = asyncio.Lock()

    async def served(self) -> Served:
        """What is served; asked for once."""
        async with self._loading:
            if self._served is None:
                info = await self._own.server_info()
                self._served = await asyncio.to_thread(Served.of, info, self._model_name)
        return self._served

    async def ready(self) -> None:
        """Returns where the service can answer.

        Raises
        ------
        ServiceError
            Where it cannot, with the reason.
        """
        info = await self._own.server_info(HEALTH_SECONDS)
        if not any(worker.ready for worker in info.workers):
            raise ServiceError("UNAVAILABLE", "no worker is ready")

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def answer(self, body: ChatBody | CompletionBody, headers: Mapping[str, str]) -> Response:
        """Answer one request, at once or as a stream."""
        served = await self.served()
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        asked = await asyncio.to_thread(served.asked, body, request_id)
        answer = asked.answer
        events = self._client_for(headers).generate(**asked.request)
        extra = {"X-Request-Id": request_id}
        if not body.stream:
            async with aclosing(events):
                return JSONResponse(await answer.whole(events), headers=extra)
        usage = body.stream_options is not None and body.stream_options.include_usage
        # The first event tells whether there will be an answer: until then there is a status.
        first = await anext(events)
        extra["Cache-Control"] = "no-cache"
        return StreamingResponse(
            answer.stream(_resumed(first, events), usage),
            media_type="text/event-stream",
            headers=extra,
        )

    @property
    def _own(self) -> AsyncHomerClient:
        """The client with the door's token, which is the first, as the tokens are now."""
        return self._client(None if self.tokens is None else self.tokens.first)

    def _client_for(self, headers: Mapping[str, str]) -> AsyncHomerClient:
        """The client with the caller's token, which the service counts requests by."""
        known = self.tokens is not None
        return self._client(headers.get(AUTHORIZATION, "").split(" ")[-1] if known else None)

    def _client(self, token: str | None) -> AsyncHomerClient:
        if token not in self._clients:
            self._clients[token] = AsyncHomerClient(self._address, token=token, tls=self._tls)
        return self._clients[token]


def build_http(door: HttpDoor, limits: HttpLimits = LIMITS) -> FastAPI:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await door.close()

    app = FastAPI(title="Homer", version=__version__, lifespan=lifespan)
    registry = prometheus_client.CollectorRegistry()
    answered = prometheus_client.Counter(
        "homer_http_requests", "HTTP requests.", ("path", "code"), registry=registry
    )
    # The last one is the first that a call comes to.
    app.add_middleware(Limited, limits=limits)
    app.add_middleware(TokenGuard, tokens=door.tokens)
    app.add_middleware(Counted, answered=answered)

    @app.exception_handler(HttpError)
    async def on_error(request: Request, error: HttpError) -> Response:
        return error.response()

    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, error: ServiceError) -> Response:
        return HttpError.of_service(error).response()

    # A setting that no message has room for is a mistake of the caller's too.
    @app.exception_handler(ConfigError)
    @app.exception_handler(PromptError)
    async def on_mistake(request: Request, error: HomerError) -> Response:
        return HttpError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return HttpError.of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return HttpError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def on_crash(request: Request, error: Exception) -> Response:
        return HttpError(500, "the HTTP door failed; its log has the cause").response()

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await door.answer(body, request.headers)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await door.answer(body, request.headers)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(await door.served())]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served = await door.served()
        if name != served.name:
            raise HttpError(
                404,
                f"the model {name!r} does not exist; this service has {served.name!r}",
                code="model_not_found",
                param="model",
            )
        return _model(served)

    @app.get("/health")
    async def health() -> Response:
        await door.ready()
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            prometheus_client.generate_latest(registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    add_page(app)
    return app


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "homer",
        "max_model_len": served.info.max_context_tokens,
        "homer": {
            "model_window": served.info.model_window,
            "max_chunk_len": served.info.max_chunk_len,
            "target_len": served.info.target_len,
            "calibrated": served.info.calibrated,
            "chat": served.prompts.chats,
        },
    }


async def _resumed(first: Event, events: Any) -> AsyncIterator[Event]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
