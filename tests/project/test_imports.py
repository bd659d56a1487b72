"""Imports point one way: cluster to workers to homer, and the algorithm knows no machines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from homer import HomerModel
from homer.shape import ModelShape
from tests.golden_cases import model_dir

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
        ("homer.model", {"grpc", "ray", "workers", "cluster", "deepspeed"}),
        ("workers", {"ray", "cluster"}),
        ("cluster.cli", {"torch", "transformers", "ray"}),
        ("cluster.launch", {"torch", "transformers"}),
        ("cluster.coordinator", {"torch", "transformers"}),
    ],
)
def test_importing_does_not_load_what_is_not_needed(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not absent & set(done.stdout.split())


def test_a_worker_imports_deepspeed_only_where_its_engine_is_asked_for(tmp_path: Path) -> None:
    # Python itself tells what a process imports.
    command = [sys.executable, "-X", "importtime", "-m", "workers", "--device", "cpu"]
    log = tmp_path / "log.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*command, "--model", str(model_dir("A"))],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
        ) as worker,
    ):
        assert worker.stdout is not None
        assert worker.stdout.readline().startswith("homer-worker ready ")
        worker.terminate()
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", log.read_text(), re.M))
    assert {"torch", "transformers", "accelerate"} <= imported
    assert "deepspeed" not in imported


def test_a_bench_that_writes_its_model_does_without_deepspeed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import homer.bench.bench_model as bench; "
        "bench.save_bench_model(Path(sys.argv[1]), bench.BenchSize(layers=2, hidden=64)); "
        "print('deepspeed' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert ModelShape.load(tmp_path).num_layers == 2
    assert HomerModel.from_pretrained(tmp_path, device="cpu").stack.num_layers == 2
