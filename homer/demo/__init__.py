"""The demo model: two retrieval tasks in plain English and a small model trained to solve them.

``tasks`` makes the texts, ``train`` makes the model in ``model/``.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""Where the shipped model lies: weights, tokenizer, calibration bias and recommended settings."""
