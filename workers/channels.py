"""Channels that carry a token and use TLS, for callers that wait and for those that await.

Knows nothing about what is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from workers.guard import AUTHORIZATION
from workers.security import Security
from workers.tls import Tls
from workers.tokens import check_token

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Credentials:
    """What a caller shows: a token, which is in no repr, and TLS files; None is neither."""

    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __post_init__(self) -> None:
        check_token(self.token)

    @classmethod
    def of(cls, security: Security) -> Credentials:
        """What a server shows to others that have the same settings."""
        tokens = security.open_tokens()
        return cls(None if tokens is None else tokens.first, security.tls)

    def channel(self, address: str, options: Options) -> grpc.Channel:
        """A channel for callers that wait.

        Raises
        ------
        ConfigError
            When TLS files cannot be used.
        """
        if self.tls is None:
            made = grpc.insecure_channel(address, options=list(options))
        else:
            options = [*options, *self.tls.channel_options]
            made = grpc.secure_channel(address, self.tls.channel_credentials(), options=options)
        return made if self.token is None else cast(Any, _WithToken(made, self.token))

    def aio_channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """A channel for callers that await; make it in the event loop that uses it.

        Raises
        ------
        ConfigError
            When TLS files cannot be used.
        """
        if self.tls is None:
            made = grpc.aio.insecure_channel(address, options=options)
        else:
            options = [*options, *self.tls.channel_options]
            made = grpc.aio.secure_channel(address, self.tls.channel_credentials(), options=options)
        return made if self.token is None else cast(Any, _WithToken(made, self.token))


NO_CREDENTIALS = Credentials()


class _WithToken:
    """A channel whose every call has a token.

    gRPC's own call credentials want TLS, and its interceptors cost each message of a stream.
    """

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._entry = (AUTHORIZATION, f"Bearer {token}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def unary_unary(self, *arguments: Any, **named: Any) -> Callable[..., Any]:
        return self._called(self._channel.unary_unary(*arguments, **named))

    def unary_stream(self, *arguments: Any, **named: Any) -> Callable[..., Any]:
        return self._called(self._channel.unary_stream(*arguments, **named))

    def stream_unary(self, *arguments: Any, **named: Any) -> Callable[..., Any]:
        return self._called(self._channel.stream_unary(*arguments, **named))

    def stream_stream(self, *arguments: Any, **named: Any) -> Callable[..., Any]:
        return self._called(self._channel.stream_stream(*arguments, **named))

    def _called(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any = None, *, metadata: Any = None, **named: Any) -> Any:
            return method(request, metadata=(*(metadata or ()), self._entry), **named)

        return call
