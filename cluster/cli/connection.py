"""How commands reach a service, and how a service lets itself be reached: tokens and TLS.

The one home of these options. A token is never one of them: it comes from a file or the
environment, since every user of a machine can read command lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.option_group import option, option_group
from workers.security import SECURITY_HELP, Security
from workers.tls import SERVER_NAME_HELP, Tls
from workers.tokens import own_token

if TYPE_CHECKING:
    from cluster.async_client import AsyncHomerClient
    from cluster.client import HomerClient

TOKEN_VARIABLE = "HOMER_TOKEN"
_ASKING = "Reaching the service"
_SERVING = "Who may call"


@dataclass(frozen=True)
class Connection:
    """What a command shows to a service."""

    token_file: Path | None = None
    tls: Tls | None = None

    def client(self, server: str, *, retries: int = 0) -> HomerClient:
        """A client of the service at `server`.

        Raises
        ------
        ConfigError
            When a file cannot be used.
        """
        from cluster.client import HomerClient

        return HomerClient(server, retries=retries, token=self._token, tls=self.tls)

    def async_client(self, server: str) -> AsyncHomerClient:
        """The same for asyncio; make it in the event loop that uses it."""
        from cluster.async_client import AsyncHomerClient

        return AsyncHomerClient(server, token=self._token, tls=self.tls)

    @property
    def _token(self) -> str | None:
        return own_token(self.token_file, TOKEN_VARIABLE)


def _connection(
    token_file: Path | None, tls: bool, tls_server_name: str | None, **files: Path | None
) -> Connection:
    return Connection(token_file, _tls(files, server_name=tls_server_name, wanted=tls))


asks_a_service = option_group(
    "connection",
    [
        option(
            "token_file", Path | None, None,
            f"file with the token to call with; by default {TOKEN_VARIABLE} says it", _ASKING,
        ),
        option("tls", bool, False, "use TLS, with the system's certificate authorities", _ASKING),
        option("tls_ca", Path | None, None, "use TLS, with these authorities (PEM)", _ASKING),
        option("tls_cert", Path | None, None, "own certificate (PEM), for mutual TLS", _ASKING),
        option("tls_key", Path | None, None, "key of this certificate (PEM)", _ASKING),
        option("tls_server_name", str | None, None, SERVER_NAME_HELP, _ASKING),
    ],
    _connection,
)  # fmt: skip
"""Give a command the options of a client, as its parameter `connection`."""


@dataclass(frozen=True)
class Doors:
    """Who may call a service's door, and TLS among its workers."""

    security: Security
    worker_tls: Tls | None


def _doors(
    tokens_file: Path | None,
    insecure_no_token: bool,
    worker_tls_server_name: str | None,
    **files: Path | None,
) -> Doors:
    return Doors(
        Security.given(
            None if tokens_file is None else str(tokens_file), _tls(files), insecure_no_token
        ),
        _tls(files, "worker_", server_name=worker_tls_server_name),
    )


_WORKERS = "TLS between coordinator and workers, the same files on each node:"
lets_in = option_group(
    "doors",
    [
        option("tokens_file", Path | None, None, SECURITY_HELP["tokens_file"], _SERVING),
        option("insecure_no_token", bool, False, SECURITY_HELP["insecure_no_token"], _SERVING),
        option("tls_cert", Path | None, None, SECURITY_HELP["tls_cert"], _SERVING),
        option("tls_key", Path | None, None, SECURITY_HELP["tls_key"], _SERVING),
        option("tls_ca", Path | None, None, SECURITY_HELP["tls_ca"], _SERVING),
        option("worker_tls_cert", Path | None, None, f"{_WORKERS} certificate (PEM)", _SERVING),
        option("worker_tls_key", Path | None, None, "key of this certificate (PEM)", _SERVING),
        option("worker_tls_ca", Path | None, None, "its authorities (PEM)", _SERVING),
        option(
            "worker_tls_server_name", str | None, None,
            "the name in all workers' certificates, where it is not their address", _SERVING,
        ),
    ],
    _doors,
)  # fmt: skip
"""Give a command the options of a service, as its parameter `doors`."""


def _tls(files: dict[str, Path | None], before: str = "", **more: Any) -> Tls | None:
    def path(name: str) -> str | None:
        file = files.get(f"{before}tls_{name}")
        return None if file is None else str(file)

    return Tls.given(path("ca"), path("cert"), path("key"), **more)
