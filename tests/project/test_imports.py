"""Imports point one way: cluster to workers to homer, and the algorithm knows no machines."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "homer" / "v1"

FORBIDDEN = {
    "homer": {"workers", "cluster", "ray", "grpc"},
    "workers": {"cluster", "ray"},
    "cluster": set[str](),
}


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path} has a relative import; write the package's name")


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if GENERATED not in path.parents)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = sources(package)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(path)
        if module.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_the_algorithm_does_not_know_the_wire_format() -> None:
    """`homer.v1` holds the stubs that `workers` and `cluster` use, and nothing else does."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources("homer")
        for module in imported_modules(path)
        if module == "homer.v1" or module.startswith("homer.v1.")
    ]
    assert not wrong


def test_proto_holds_no_python() -> None:
    """A package named `proto` would hide the proto-plus that Ray uses."""
    assert not list((ROOT / "proto").rglob("*.py"))
    assert list((ROOT / "proto").rglob("*.proto"))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("homer", {"torch", "transformers", "numpy", "grpc", "ray"}),
        ("homer.model", {"grpc", "ray", "workers", "cluster"}),
        ("workers", {"ray", "cluster"}),
        ("cluster.cli", {"torch", "transformers", "ray"}),
    ],
)
def test_importing_does_not_load_what_is_not_needed(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not absent & set(done.stdout.split())
