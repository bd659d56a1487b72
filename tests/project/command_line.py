"""The `homer` command in this process: quicker than one that starts, and the same `main`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


Homer = Callable[..., Done]


@pytest.fixture
def homer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Homer:
    """Runs a command line in a folder of its own, with no variables but those that a test sets."""
    for name in os.environ:
        if name.startswith("HOMER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr("sys.argv", ["homer", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        wrote = capfd.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, wrote.out, wrote.err)

    return run
