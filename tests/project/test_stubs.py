"""The checked-in stubs are what `make proto` makes of `proto/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_checked_in_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted(str(path) for path in (ROOT / "proto" / "homer" / "v1").glob("*.proto"))
    assert protos
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, *protos]
    subprocess.run(command, check=True)

    fresh = {path.name: path.read_text() for path in (tmp_path / "homer" / "v1").iterdir()}
    checked_in = {
        path.name: path.read_text() for path in (ROOT / "homer" / "v1").glob("*_pb2*.py*")
    }
    assert fresh.keys() == checked_in.keys(), "run `make proto`"
    stale = [name for name, text in fresh.items() if checked_in[name] != text]
    assert not stale, "run `make proto`"
