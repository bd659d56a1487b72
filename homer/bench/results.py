"""Single answers, the file that keeps them, and their sums.

Knows nothing about models or methods.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from homer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer. `key_kept` says whether all tokens of the key were there when it was given."""

    identity: str
    task: str
    method: str
    length: int
    seed: int
    right: bool
    key_kept: bool
    answer: str
    generated: str
    prompt_tokens: int
    seconds: float


class ResultsFile:
    """Records as JSON lines. What a stopped run left half written is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                path.write_bytes(whole)
            try:
                self.records = [Record(**json.loads(line)) for line in whole.splitlines()]
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path} holds lines that are no results ({error}); name another file or "
                    "remove it"
                ) from error

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.records.append(record)


@dataclass(frozen=True)
class Cell:
    """All answers of one method at one length."""

    method: str
    length: int
    samples: int
    right: int
    keys_kept: int
    seconds: float

    @property
    def share(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the share (Wilson)."""
        z, n, p = 1.959964, self.samples, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)
