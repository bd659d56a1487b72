"""One tiny model for all tests of the measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.homer.bench.demo_llama import save_demo_llama


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_demo_llama(folder)
    return folder
