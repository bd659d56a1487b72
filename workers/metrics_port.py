"""The HTTP port that shows a process's metrics to Prometheus.

Knows nothing about what the numbers are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from socket import AF_INET, AF_INET6
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from homer.errors import ConfigError
from workers.addresses import join_port
from workers.security import Security
from workers.tokens import Tokens

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

OPEN = Security()
# Whoever sends or reads nothing for so long is hung up on.
STALL_SECONDS = 30.0


class MetricsPort:
    """Serves a registry's metrics over HTTP, in threads of its own.

    Parameters
    ----------
    registry : CollectorRegistry
    host : str
    port : int
        0 takes a free one.
    targets : callable, optional
        Addresses ("host:port") of others that serve metrics: `/targets` names them as Prometheus's
        HTTP service discovery asks for it. Called from those threads.
    security : Security
        Which tokens callers must bring, and TLS.

    Raises
    ------
    ConfigError
        When the port cannot be listened on, or must not be without a token.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        targets: Callable[[], Sequence[str]] | None = None,
        security: Security = OPEN,
    ) -> None:
        security.check_host(host)

        contexts = None if security.tls is None else security.tls.server_contexts()

        class Server(ThreadingWSGIServer):
            address_family = AF_INET6 if ":" in host else AF_INET

            def get_request(self) -> tuple[Any, Any]:
                connection, address = super().get_request()
                if contexts is not None:
                    # The thread of each connection shakes hands: one that waits holds up no other.
                    connection = contexts().wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                return connection, address

        app = make_wsgi_app(registry)
        if targets is not None:
            app = _with_targets(app, targets)
        if (tokens := security.open_tokens()) is not None:
            app = _with_tokens(app, tokens)
        try:
            self._server = make_server(host, port, app, Server, _QuietHandler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for metrics: {error}; choose another "
                "--metrics-port, or 0 for any free one"
            ) from error
        self._thread = Thread(target=self._server.serve_forever, name="homer-metrics", daemon=True)
        self._thread.start()
        self.port: int = self._server.server_port
        self.address = join_port(host, self.port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _QuietHandler(WSGIRequestHandler):
    """A scrape every few seconds is nothing to log."""

    timeout = STALL_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        return None


def _with_targets(
    metrics: WSGIApplication, targets: Callable[[], Sequence[str]]
) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/targets":
            return metrics(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps([{"targets": list(targets())}]).encode()]

    return app


def _with_tokens(app: WSGIApplication, tokens: Tokens) -> WSGIApplication:
    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if tokens.name_of(environ.get("HTTP_AUTHORIZATION", "")) is not None:
            return app(environ, start_response)
        headers = [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")]
        start_response("401 Unauthorized", headers)
        return [b"send `Authorization: Bearer TOKEN` with a token that counts here\n"]

    return guarded
