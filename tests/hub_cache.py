"""A cache of the hub with models in it, as the hub's own client leaves it; nothing asks a hub."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

MODEL_ID = "mill/tiny"


def use_hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have this process look for models in `folder` and nowhere else."""
    cache = folder / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def fill_hub_cache(
    cache: Path, files: Path, model_id: str = MODEL_ID, revision: str = "main"
) -> Path:
    """Put a model's files there as `revision` of `model_id`; returns their snapshot."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    shutil.copytree(files, snapshot)
    ref = repository / "refs" / revision
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(commit)
    return snapshot
