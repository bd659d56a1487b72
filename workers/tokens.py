"""Bearer tokens: who may call. Knows nothing about gRPC or HTTP.

A list of tokens is text of lines `NAME=TOKEN`; names are for logs and for counting, tokens are what
callers send. Blank lines and lines that begin with # do not count.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
from pathlib import Path

from homer.errors import ConfigError

_log = logging.getLogger(__name__)

SCHEME = "bearer"
FEWEST_CHARACTERS = 16
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
# What RFC 6750 lets a bearer token be.
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{FEWEST_CHARACTERS},512}}=*")
MAKE_ONE = "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"


class Tokens:
    """The tokens that are accepted, from text or from a file that is read again when it changes.

    Parameters
    ----------
    text : str, optional
    path : str, optional
        The file, where there is no text.

    Raises
    ------
    ConfigError
        When the file cannot be read, or a line is wrong, or there are no tokens. No message has a
        token in it.
    """

    def __init__(self, text: str | None = None, path: str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._stamp = self._file_stamp()
        self._tokens = parse_tokens(text or "") if path is None else read_tokens(path)

    def name_of(self, authorization: str) -> str | None:
        """Whose token an `authorization` header has; None where it has no known one.

        Takes as long for a token that is nearly right as for any other.
        """
        scheme, _, token = authorization.strip().partition(" ")
        given = _digest(token.strip())
        found = None
        for name, known in self._now().items():
            if hmac.compare_digest(given, _digest(known)):
                found = name
        return found if scheme.lower() == SCHEME else None

    @property
    def first(self) -> str:
        """The token to call others with that have the same list."""
        return next(iter(self._now().values()))

    def _now(self) -> dict[str, str]:
        """The tokens, from the file as it is now; where that is broken, as it was."""
        with self._lock:
            stamp = self._file_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._tokens = read_tokens(str(self._path))
                    _log.info("%s has changed: %d token(s)", self._path, len(self._tokens))
                except ConfigError as error:
                    _log.error("the tokens stay as they were: %s", error)
            return self._tokens

    def _file_stamp(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_tokens(path: str) -> dict[str, str]:
    """The tokens of a file, by name.

    Raises
    ------
    ConfigError
        As for `Tokens`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tokens file {path}: {error}") from error
    return parse_tokens(text, f"the tokens file {path}")


def parse_tokens(text: str, where: str = "the list of tokens") -> dict[str, str]:
    """Tokens by name.

    Raises
    ------
    ConfigError
        As for `Tokens`.
    """
    tokens: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, token = line.partition("=")
        name, token = name.strip(), token.strip()
        if not (equals and _NAME.fullmatch(name) and _TOKEN.fullmatch(token)):
            raise ConfigError(
                f"{where}, line {number}: write NAME=TOKEN, the token of {FEWEST_CHARACTERS} or "
                f"more letters, digits and -._~+/; {MAKE_ONE}"
            )
        if name in tokens or token in tokens.values():
            raise ConfigError(f"{where}, line {number}: its name or its token is there twice")
        tokens[name] = token
    if not tokens:
        raise ConfigError(f"{where} has no tokens; write a line NAME=TOKEN; {MAKE_ONE}")
    return tokens


def own_token(file: str | Path | None, variable: str) -> str | None:
    """The one token to call with: from `file`, else from an environment variable, else None.

    It never comes from a command line, which every user of a machine can read. A list of one
    token is as good as the token alone.

    Raises
    ------
    ConfigError
        When the file cannot be read, or has no token or more than one.
    """
    if file is None:
        text, where = os.environ.get(variable, "").strip(), variable
        if not text:
            return None
    else:
        try:
            text, where = Path(file).read_text(encoding="utf-8").strip(), f"the token file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token file {file}: {error}") from error
    if _TOKEN.fullmatch(text):
        return text
    tokens = parse_tokens(text, where)
    if len(tokens) > 1:
        raise ConfigError(f"{where} has {len(tokens)} tokens; write only the one to call with")
    return next(iter(tokens.values()))


def check_token(token: str | None) -> str | None:
    """The token as it is.

    Raises
    ------
    ConfigError
        When it cannot be one; the message does not have it.
    """
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"the token must have {FEWEST_CHARACTERS} to 512 letters, digits and -._~+/; it is "
            "the part behind the = of a line of the service's tokens file"
        )
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
