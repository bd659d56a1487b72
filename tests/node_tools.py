"""Tools that npm brings: installed once, in a temporary folder that later runs find again."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "cluster" / "node" / "package.json"
INSTALL_SECONDS = 300
# What npm says where it reaches no registry.
UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH")


@cache
def node_folder() -> Path:
    """A folder with `node_modules`; skips the test where there is no node, npm or registry."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    name = hashlib.sha256(PACKAGE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"homer-node-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.copy(PACKAGE, folder)
            done = subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
            )
            if done.returncode and any(code in done.stderr for code in UNREACHABLE):
                pytest.skip("npm reaches no registry")
            assert not done.returncode, done.stderr
            (folder / "complete").touch()
    return folder
