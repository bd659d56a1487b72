"""Who may call a port, and how its connections are protected: settings of every server here."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

import grpc

from homer.errors import ConfigError
from workers.addresses import join_port
from workers.tls import Tls
from workers.tokens import Tokens

TOKENS_VARIABLE = "HOMER_TOKENS"
SECURITY_HELP = {
    "tokens_file": "file of lines NAME=TOKEN: callers must send one of these tokens; by default "
    f"{TOKENS_VARIABLE} holds such lines, or no token is asked for",
    "tls_cert": "certificate of this server (PEM): connections are TLS",
    "tls_key": "key of this certificate (PEM)",
    "tls_ca": "authorities (PEM) of which callers must have a certificate: mutual TLS",
    "insecure_no_token": "listen on other addresses than the loopback though no token is asked for",
}
"""What command lines say of the options of a server."""


@dataclass(frozen=True, kw_only=True)
class Security:
    """Who may call.

    Parameters
    ----------
    tokens_file : str, optional
        Lines `NAME=TOKEN`, read again when the file changes: every call must bring one of these.
    tokens : str, optional
        Such lines themselves; in no repr.
    tls : Tls, optional
        Connections are TLS, and with a `ca` mutual TLS.
    insecure_no_token : bool
        Listen where others reach the port though no token is asked for.
    """

    tokens_file: str | None = None
    tokens: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    insecure_no_token: bool = False

    def __post_init__(self) -> None:
        if self.tokens_file is not None and self.tokens is not None:
            raise ConfigError(f"give tokens once: as a file, or in {TOKENS_VARIABLE}")
        # What is wrong with them is said now, and not by a process that starts later.
        self.open_tokens()

    @classmethod
    def given(
        cls, tokens_file: str | None, tls: Tls | None = None, insecure_no_token: bool = False
    ) -> Security:
        """As a command line says it; without a file the environment's tokens count."""
        lines = None if tokens_file is not None else os.environ.get(TOKENS_VARIABLE) or None
        return cls(
            tokens_file=tokens_file, tokens=lines, tls=tls, insecure_no_token=insecure_no_token
        )

    def open_tokens(self) -> Tokens | None:
        """The tokens; None where none is asked for.

        Raises
        ------
        ConfigError
            When they cannot be read.
        """
        if self.tokens_file is None and self.tokens is None:
            return None
        return Tokens(self.tokens, self.tokens_file)

    def check_host(self, host: str) -> None:
        """Refuse to listen without a token where other machines reach the port.

        Raises
        ------
        ConfigError
            With what to change.
        """
        asks = self.tokens_file is not None or self.tokens is not None
        if not (asks or self.insecure_no_token or is_loopback(host)):
            raise ConfigError(
                f"everybody who reaches {host} could call this port, which asks for no token: give "
                f"a tokens file (--tokens-file, or {TOKENS_VARIABLE}), listen on 127.0.0.1, or say "
                "that it is meant so with --insecure-no-token"
            )

    def bind(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Have a server listen; returns the port.

        Raises
        ------
        ConfigError
            When it must not listen there without a token, or TLS files are wrong.
        RuntimeError
            When it cannot.
        """
        self.check_host(host)
        address = join_port(host.strip("[]"), port)
        if self.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.tls.server_credentials())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
