"""The examples in docstrings, run as they stand: those of clients against a real service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.client import HomerClient
from homer.demo import MODEL_DIR
from tests.cluster.test_service import CONTEXT

ROOT = Path(__file__).parents[2]
ROOMS = ("homer", "workers", "cluster")
# A process of its own: it has loops of its own for asynchronous gRPC.
RUN = """
import doctest, importlib, sys
address, document, model, *modules = sys.argv[1:]
names = {"address": address, "document": document, "model": model}
for module in modules:
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    print(module, result.attempted, result.failed)
"""


def modules_with_examples() -> list[str]:
    files = (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if ">>> " in file.read_text(encoding="utf-8")
    ]


def test_the_examples_in_docstrings_do_what_they_say(service: HomerClient) -> None:
    modules = modules_with_examples()
    assert {"cluster.client", "cluster.async_client", "homer.model"} <= set(modules)
    command = [sys.executable, "-c", RUN, service.address, CONTEXT, str(MODEL_DIR), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in done.stdout.splitlines() if line.startswith(ROOMS)]
    assert [module for module, _, _ in ran] == modules, done.stdout
    assert all(int(attempted) > 0 and int(failed) == 0 for _, attempted, failed in ran), done.stdout


def test_no_example_is_left_out() -> None:
    for module in modules_with_examples():
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert "doctest: +SKIP" not in file.read_text(encoding="utf-8")
