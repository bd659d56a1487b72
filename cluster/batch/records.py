"""Files of results, one JSON object a line, which a crash at any moment leaves usable.

A record is on the disk before the next one is written. What a crash tore is the end of the file,
which is found by its missing line break and dropped. Knows nothing about what is asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.batch.lines import Key, Line
from cluster.http.errors import HttpError
from homer.errors import ConfigError, HomerError

# How every record begins: by this a torn one is told from the end of somebody else's file.
_HEAD = b'{"custom_id": '


class RecordFile:
    """Records that are in a file, and more of them; no other batch writes it meanwhile.

    Parameters
    ----------
    path : Path
        Made where it is not there.

    Attributes
    ----------
    keys : set
        What the records are about; see `Line.key`.

    Raises
    ------
    ConfigError
        When the file cannot be written, another batch writes it, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no plain file, which results need to go on from")
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._lock()
            self.keys = set(self._recover())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, key: Key, record: dict[str, Any]) -> None:
        """Write a record; it is on the disk when this returns.

        Raises
        ------
        HomerError
            When there is no room for it, for example.
        """
        # What is no UTF-8 is escaped, as JSON has it.
        text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        left = memoryview(text + b"\n")
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise HomerError(f"cannot write {self.path}: {error.strerror}") from error
        self.keys.add(key)

    def clear(self) -> None:
        """Forget all records."""
        self._file.truncate(0)
        self.keys.clear()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another homer batch writes {self.path}; wait for it, or name another file"
            ) from error
        except OSError:
            # A file system without locks.
            pass

    def _recover(self) -> Iterator[Key]:
        with self.path.open("rb") as file:
            yield from self._keys(file)

    def _keys(self, raw_lines: Iterable[bytes]) -> Iterator[Key]:
        whole = 0
        for number, raw in enumerate(raw_lines, start=1):
            if not raw.endswith(b"\n"):
                # A machine that lost its power may have written the length and not the bytes.
                torn = raw.rstrip(b"\0")
                if not (torn.startswith(_HEAD) or _HEAD.startswith(torn)):
                    raise self._foreign(number)
                self._file.truncate(whole)
                return
            whole += len(raw)
            yield self._key(number, raw)

    def _key(self, number: int, raw: bytes) -> Key:
        try:
            record = json.loads(raw)
            if record["custom_id"] is not None:
                return str(record["custom_id"])
            return int(record["line"]), str(record["hash"])
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise self._foreign(number) from error

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self.path}, line {number} is no result of homer batch; name a file that is not "
            "there yet, or the output of the batch that is to go on"
        )


def answered(line: Line, answer: dict[str, Any], request_id: str) -> dict[str, Any]:
    """The record of a line that was answered."""
    if not line.openai:
        return {**_head(line), **answer}
    return _openai(line, 200, answer, request_id)


def failed(line: Line, error: HttpError, request_id: str = "") -> dict[str, Any]:
    """The record of a line that was not."""
    if not line.openai:
        return {**_head(line), **error.body}
    return _openai(line, error.status, error.body, request_id)


def _head(line: Line) -> dict[str, Any]:
    return {"custom_id": line.custom_id, "line": line.number, "hash": line.digest}


def _openai(line: Line, status: int, body: dict[str, Any], request_id: str) -> dict[str, Any]:
    return {
        "custom_id": line.custom_id,
        "id": f"batch_req_{uuid.uuid4().hex}",
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
