"""TLS by files: what a server and a client need of them. Knows nothing about what is called."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from homer.errors import ConfigError

_log = logging.getLogger(__name__)

T = TypeVar("T")

SERVER_NAME_HELP = "the name that the server's certificate has, where it is not its address"


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files in PEM format for one end of TLS connections.

    Parameters
    ----------
    ca : str, optional
        Certificate authorities of the other end. A client trusts the system's by default. A server
        that has some takes only clients with a certificate of theirs (mutual TLS).
    cert, key : str, optional
        The own certificate, with those between it and the authority, and its key. A server needs
        them, a client where the server asks for one.
    server_name : str, optional
        For a client: the name that the server's certificate has, where it is not the address.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("TLS needs both, certificate and key: give tls-cert and tls-key")

    @classmethod
    def given(
        cls,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
        wanted: bool = False,
    ) -> Tls | None:
        """None where nothing is given and TLS is not `wanted` anyhow."""
        if not (wanted or ca or cert or key or server_name):
            return None
        return cls(ca=ca, cert=cert, key=key, server_name=server_name)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client.

        Raises
        ------
        ConfigError
            When a file cannot be read, or does not hold what it should.
        """
        _check(self)
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    @property
    def channel_options(self) -> tuple[tuple[str, Any], ...]:
        """What a client's channel is told beside its credentials."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server; files that change count from the next connection on.

        Raises
        ------
        ConfigError
            As for `channel_credentials`, and when there is no certificate.
        """
        files = _ServerFiles(self, _grpc_configuration)
        # gRPC takes None too, but its types do not say so.
        changed: Any = files.changed
        return grpc.dynamic_ssl_server_credentials(
            files.made, changed, require_client_authentication=self.ca is not None
        )

    def server_contexts(self) -> Callable[[], ssl.SSLContext]:
        """For a server that is not gRPC's: gives the context of the connection that comes.

        Raises
        ------
        ConfigError
            As for `server_credentials`.
        """
        return _ServerFiles(self, _context).now


class _ServerFiles(Generic[T]):
    """What is made of a server's certificates, and again when their files have changed."""

    def __init__(self, tls: Tls, make: Callable[[Tls], T]) -> None:
        self._tls = tls
        self._make = make
        self._stamps = self._look()
        self.made = make(tls)

    def now(self) -> T:
        """As the files are now; where they do not fit together, as they were."""
        self.changed()
        return self.made

    def changed(self) -> T | None:
        """Something new, or None for what is used. gRPC asks at handshakes."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        try:
            self.made = self._make(self._tls)
        except ConfigError as error:
            # Perhaps half of it is written: the next handshake looks again.
            _log.error("the certificates stay as they were: %s", error)
            return None
        self._stamps = stamps
        _log.info("the certificates have changed")
        return self.made

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self._tls.ca, self._tls.cert, self._tls.key)]


def _grpc_configuration(tls: Tls) -> Any:
    _check(tls, server=True)
    pair: Any = (_read(tls.key), _read(tls.cert))
    return grpc.ssl_server_certificate_configuration([pair], _read(tls.ca))


def _context(tls: Tls) -> ssl.SSLContext:
    _check(tls, server=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cert or "", tls.key)
    if tls.ca is not None:
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check(tls: Tls, server: bool = False) -> None:
    """Refuse files that gRPC would take, only to fail at every handshake."""
    if server and tls.cert is None:
        raise ConfigError("a server needs a certificate for TLS: give tls-cert and tls-key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.cert is not None:
            what = f"{tls.cert} and {tls.key} are no certificate and its key"
            # An empty password: nobody is asked for one at a terminal.
            context.load_cert_chain(tls.cert, tls.key, password="")
        if tls.ca is not None:
            what = f"{tls.ca} has no certificate of an authority"
            context.load_verify_locations(tls.ca)
    except OSError as error:
        raise ConfigError(f"TLS: {what}, in PEM format and without a password: {error}") from error


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: cannot read {path}: {error.strerror}") from error


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    try:
        stat = Path(path or "").stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
