"""Requests of mixed fates leave nothing behind. `make chaos` has the long run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.chaos.fleet import REPOSITORY

SECONDS = 240


@pytest.mark.timeout(SECONDS + 30)
def test_nothing_is_left_of_requests_whatever_became_of_them() -> None:
    command = [sys.executable, "-m", "tests.chaos.leaks", "--requests", "40", "--warm-up", "16"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
